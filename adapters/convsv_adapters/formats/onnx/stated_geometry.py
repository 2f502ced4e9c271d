"""Check that the attributes of a convolution in ONNX fit its kernel and its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_stated_geometry"]


def check_stated_geometry(
    values: Mapping[str, Any], kernel_shape: tuple[int, ...], channels: int | None, transposed: bool
) -> None:
    """Raise ValueError if the attributes of a convolution contradict its kernel or its input.

    Runtimes refuse such a node, so a figure of it would be one of no network.

    Parameters
    ----------
    values : mapping
        The attributes by name.
    kernel_shape : tuple of int
    channels : int or None
        The channels of the input; None if they are not known.
    transposed : bool
        Whether the node is a ConvTranspose.
    """
    taps = kernel_shape[2:]
    stated = values.get("kernel_shape")
    if stated is not None and tuple(stated) != taps:
        raise ValueError(f"kernel_shape={list(stated)}: its kernel has the shape {kernel_shape}")
    for name, entries in (("strides", 1), ("dilations", 1), ("output_padding", 1), ("pads", 2)):
        _check_length(name, values.get(name), entries * len(taps))
    groups = values.get("group", 1)
    if groups < 1 or kernel_shape[0] % groups:
        raise ValueError(f"group={groups} does not divide the {kernel_shape[0]} channels of its kernel {kernel_shape}")
    wanted = kernel_shape[0] if transposed else kernel_shape[1] * groups
    if channels is not None and channels != wanted:
        raise ValueError(f"its input has {channels} channels, and its kernel {kernel_shape} takes {wanted}")


def _check_length(name: str, values: Sequence[int] | None, wanted: int) -> None:
    if values is not None and len(values) != wanted:
        raise ValueError(f"{name}={list(values)}: {len(values)} entries, wanted {wanted}")
