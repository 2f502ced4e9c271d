"""Several kernels of one shape side by side, as the groups of one kernel."""

from __future__ import annotations

from collections.abc import Sequence

from convsv_core._geometry.shapes import channel_letters
from convsv_core.backend import Array
from convsv_core.conv import Conv
from convsv_core.plugins import backend_of

__all__ = ["group_axis", "join_kernels"]


def group_axis(conv: Conv) -> int:
    """Return the axis of a kernel along which its groups lie side by side."""
    return conv.layout.index(channel_letters(conv)[0])


def join_kernels(kernels: Sequence[Array], conv: Conv) -> Array:
    """Return one kernel whose groups are those of one kernel after another.

    Raise ValueError unless all have one shape and dtype: groups of different sizes would be cut in the wrong places.
    """
    if len(kernels) == 1:
        return kernels[0]
    for kernel in kernels[1:]:
        if tuple(kernel.shape) != tuple(kernels[0].shape) or kernel.dtype != kernels[0].dtype:
            raise ValueError(
                f"kernels of shape {tuple(kernels[0].shape)} and dtype {kernels[0].dtype}, and of shape "
                f"{tuple(kernel.shape)} and dtype {kernel.dtype}: wanted one shape and dtype"
            )
    return backend_of(kernels[0]).namespace(kernels[0]).concat(list(kernels), axis=group_axis(conv))
