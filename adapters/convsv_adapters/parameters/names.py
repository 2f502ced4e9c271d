"""Tell from the name, the shape and the dtype of an array whether it may be a kernel, and order names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from convsv_adapters.parameters.parts import HostArray
from convsv_core.conv import SPATIAL_LETTERS

__all__ = [
    "LAYOUTS",
    "OPTIMIZER_STATE",
    "in_natural_order",
    "is_kernel",
    "may_be_kernel",
    "natural_order",
    "not_floating",
]

LAYOUTS = {2 + ndim: f"OI{spatial}" for ndim, spatial in SPATIAL_LETTERS.items()}
"""The layout of a kernel by its rank, in PyTorch's and ONNX's order of axes."""

NOT_A_KERNEL = re.compile(
    r"(^|_)(embed|embeddings?|tokens?|pos|position|bias|mask|anchors?|grid|table|buffer|cache|gamma|beta|scale|"
    r"mean|var|std|kv|mem|latents?|queries|prompts?)(_|$)",
    re.IGNORECASE,
)
"""Words in the last part of a name that say that an array of rank 3 to 5 is no kernel.

The list is a guess: it names what common vision networks store beside their kernels.
"""

SCALE = re.compile(
    r"(^|[._/])([^._/]*norm\w*|rms|ls\d*|scale|layer_?scale)[._/][^._/]+$|"
    r"(^|[._/])(alpha|slope|gain|g|ia3_l\.\w+|magnitude)$|magnitude_vector",
    re.IGNORECASE,
)
"""Names that say that an array with a number for each channel is a scale, and not the kernel of one tap. A guess."""

OPTIMIZER_STATE = re.compile(
    r"((?:.*?[./])??(?:opt_state|optimi[sz]er\w*|exp_avg|exp_avg_sq|momentum_buffer))(?:[./].*)?$", re.IGNORECASE
)
"""Names of arrays that are the state of an optimizer, in files that hold a flat list of arrays. A guess."""


def is_kernel(name: str, array: HostArray | str) -> bool:
    """Return whether an array is taken for the kernel of a convolution; True for one that could not be read.

    See `layers_from_arrays` for the rule.
    """
    if isinstance(array, str):
        return True
    if array.dtype.kind not in "fc" or array.ndim not in LAYOUTS or not array.size or not may_be_kernel(name):
        return False
    return not (array.size == max(array.shape) and SCALE.search(name))


def may_be_kernel(name: str) -> bool:
    """Return whether an array of this name can be a kernel."""
    return not NOT_A_KERNEL.search(re.split(r"[./:]", name)[-1])


def not_floating(name: str, dtype: str) -> str:
    """Return why an array of integers is no kernel that can be read; "" unless its name says that it is a weight."""
    last = re.split(r"[./:]", name)[-1]
    is_weight = dtype in ("int8", "uint8") and re.search(r"weight|kernel", last) and not last.endswith("_mask")
    return f"integers ({dtype}), of which the file does not say what they stand for" if is_weight else ""


def in_natural_order(names: Iterable[str]) -> bool:
    """Return whether names are in an order of their own, or in an alphabetical one that puts numbers by value too."""
    found = list(names)
    return found != sorted(found) or found == sorted(found, key=natural_order)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts ``layer.10`` behind ``layer.2``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
