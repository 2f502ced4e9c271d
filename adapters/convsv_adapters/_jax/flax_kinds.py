"""The classes of flax whose modules are listed as layers."""

from __future__ import annotations

from typing import Any, TypeAlias

from flax import linen, nnx

__all__ = [
    "LINEAR",
    "LINEN_CONVOLUTIONS",
    "LINEN_LINEAR",
    "NNX_CONVOLUTIONS",
    "NNX_LINEAR",
    "Kinds",
    "flax_kinds",
]

Kinds: TypeAlias = tuple[type[Any], ...]
"""Classes of layers."""

NNX_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)
LINEN_CONVOLUTIONS = (linen.Conv, linen.ConvTranspose, linen.ConvLocal)
NNX_LINEAR = (nnx.Linear, nnx.LinearGeneral)
LINEN_LINEAR = (linen.Dense, linen.DenseGeneral)
LINEAR = (*NNX_LINEAR, *LINEN_LINEAR)


def flax_kinds(model: nnx.Module | linen.Module, linear: bool) -> Kinds:
    """Return the classes of the layers of a model, with linear layers or without."""
    if isinstance(model, nnx.Module):
        return (*NNX_CONVOLUTIONS, *NNX_LINEAR) if linear else NNX_CONVOLUTIONS
    return (*LINEN_CONVOLUTIONS, *LINEN_LINEAR) if linear else LINEN_CONVOLUTIONS
