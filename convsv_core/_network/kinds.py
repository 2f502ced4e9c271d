"""The kinds of maps that a network consists of, each with the data that its exact evaluation needs.

The docstring of each kind says which inputs it takes and what it computes, in the notation of NumPy. Where several
inputs have different shapes, they are broadcast. A kind that another package adds is a subclass of `Kind`; its rule
comes through the hook `convsv_network_rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from convsv_core.conv import Conv, Pads

__all__ = [
    "AveragePool",
    "AxisMaps",
    "BranchMatmul",
    "Concatenate",
    "Constant",
    "Convolution",
    "Elementwise",
    "Expand",
    "Extremum",
    "Gather",
    "Identity",
    "Input",
    "Kind",
    "LocalResponse",
    "LogSoftmax",
    "Matmul",
    "MaxPool",
    "Normalize",
    "NumberArray",
    "Pad",
    "Permute",
    "Product",
    "Quotient",
    "Reduce",
    "Reshape",
    "Scale",
    "Slice",
    "Softmax",
    "Sum",
    "Unsupported",
]

NumberArray: TypeAlias = npt.NDArray[Any]
"""An array of real numbers on the host, in the dtype in which the model stores it."""


@dataclass(frozen=True, eq=False)
class Kind:
    """The base class of all kinds of maps."""


# ---- leaves ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Input(Kind):
    """An input of the network; a node of this kind takes no inputs.

    Parameters
    ----------
    example : array, optional
        An example that the caller gave, of the node's shape. The lower bound is measured at it.
    """

    example: NumberArray | None = None


@dataclass(frozen=True, eq=False)
class Constant(Kind):
    """A tensor that does not depend on the network's input, such as a learned embedding; it takes no inputs."""

    value: NumberArray


# ---- linear maps with weights ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Convolution(Kind):
    """A convolution, or transposed one, of an input of shape ``(batch, channels, *extents)`` in `layout`'s order.

    Parameters
    ----------
    kernel : array
        It has the axes that ``conv.layout`` names.
    conv : Conv
        The geometry, with the layer's own padding. Spatial axes are in the order of ``conv.spatial``.
    bias : array, shape (output channels,), optional
    layout : str, default ""
        The axes of the input and of the output: ``N``, ``C`` and the letters of ``conv.spatial``, such as "NHWC".
        "" stands for "NC" and the spatial letters in the order of ``conv.spatial``.
    """

    kernel: NumberArray
    conv: Conv
    bias: NumberArray | None = None
    layout: str = ""

    def __post_init__(self) -> None:
        layout = self.layout or "NC" + self.conv.spatial
        if sorted(layout) != sorted("NC" + self.conv.spatial):
            raise ValueError(f"layout={layout!r}: wanted the letters N, C and {', '.join(self.conv.spatial)}")
        object.__setattr__(self, "layout", layout)  # A frozen dataclass refuses plain assignment to its fields.


@dataclass(frozen=True, eq=False)
class Matmul(Kind):
    """Compute ``numpy.matmul(x, matrix) + bias``, or ``numpy.matmul(matrix, x) + bias`` if `side` is "left".

    Parameters
    ----------
    matrix : array
        A matrix, or a stack of matrices with leading axes that broadcast as `numpy.matmul` does. 1-D for a vector.
    side : {"right", "left"}, default "right"
        Where the constant stands.
    bias : array, optional
        It broadcasts against the product, and does not enlarge it.
    """

    matrix: NumberArray
    side: Literal["right", "left"] = "right"
    bias: NumberArray | None = None


@dataclass(frozen=True, eq=False)
class Scale(Kind):
    """Compute ``x * scale + shift``: inference batch normalisation, a bias, a mask, a multiplication by a constant.

    Parameters
    ----------
    scale, shift : array
        They broadcast against x, whose shape may grow by it.
    """

    scale: NumberArray = field(default_factory=lambda: np.ones(()))
    shift: NumberArray = field(default_factory=lambda: np.zeros(()))


# ---- pooling, sums over axes, resizing -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AveragePool(Kind):
    """Average the elements of each window.

    Every tuple has one entry for each axis of x, batch and channels too (a window of 1 there).

    Parameters
    ----------
    window, strides, dilations : tuple of int
        Number of elements of a window, step between windows, step between elements of a window.
    padding : tuple of pairs of int
        Zeros added before and after each axis. The output has
        ``(extent + before + after - dilation * (window - 1) - 1) // stride + 1`` elements along an axis. To round up,
        as with ceil_mode, add what is missing at the end.
    counted : tuple of pairs of int
        How much of the padding counts as elements in the divisor: all of it where padding is included, (0, 0) on each
        axis where it is not, and the declared padding where ceil_mode adds more. The divisor of a window is the number
        of its elements that are in the input or in this part of the padding.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: Pads
    counted: Pads


@dataclass(frozen=True, eq=False)
class MaxPool(Kind):
    """Take the largest element of each window; padding is never the largest. Parameters are as for `AveragePool`."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: Pads


@dataclass(frozen=True, eq=False)
class Reduce(Kind):
    """Reduce x along axes, to the node's shape, which may keep these axes with the extent 1 or drop them.

    Parameters
    ----------
    function : {"sum", "mean", "max", "min", "l1", "l2", "logsumexp"}
        Global pooling is a reduction.
    axes : tuple of int
    """

    function: Literal["sum", "mean", "max", "min", "l1", "l2", "logsumexp"]
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AxisMaps(Kind):
    """Apply one matrix along each of some axes: resizing, interpolation, upsampling, cumulative sums.

    Parameters
    ----------
    matrices : mapping from axis to array
        The matrix of an axis has shape (output extent, input extent).
    """

    matrices: Mapping[int, NumberArray]


# ---- rearranging ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Identity(Kind):
    """Return x: dropout at inference, a cast between floating dtypes."""


@dataclass(frozen=True, eq=False)
class Reshape(Kind):
    """Reshape x to the node's shape, in row-major order: flatten, squeeze, unsqueeze too."""


@dataclass(frozen=True, eq=False)
class Permute(Kind):
    """Compute ``numpy.transpose(x, permutation)``."""

    permutation: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Expand(Kind):
    """Broadcast x to the node's shape."""


@dataclass(frozen=True, eq=False)
class Slice(Kind):
    """Compute ``x[slices]``, with one slice for each axis: cropping, each part of a split, a flip by a step of -1."""

    slices: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Gather(Kind):
    """Compute ``numpy.take(x, indices, axis)``, with constant indices."""

    indices: npt.NDArray[np.integer[Any]]
    axis: int


@dataclass(frozen=True, eq=False)
class Pad(Kind):
    """Add elements around x, or crop it where a number is negative.

    Parameters
    ----------
    padding : tuple of pairs of int
        Elements added before and after each axis. Interior elements go first, cropping next.
    mode : {"constant", "reflect", "replicate", "circular"}, default "constant"
    value : float, default 0.0
        What "constant" adds.
    interior : tuple of int, optional
        Elements of `value` between neighbours along each axis, as JAX has it; none by default.
    """

    padding: Pads
    mode: Literal["constant", "reflect", "replicate", "circular"] = "constant"
    value: float = 0.0
    interior: tuple[int, ...] | None = None


# ---- functions of one input ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Elementwise(Kind):
    """Apply a function of one number to every element.

    Parameters
    ----------
    function : str
        A name in `ELEMENTWISE`: "relu", "leaky_relu" (alpha), "elu" (alpha), "selu" (alpha, gamma), "celu" (alpha),
        "gelu", "gelu_tanh", "silu" (beta: ``x * sigmoid(beta * x)``), "mish", "hard_sigmoid" (alpha, beta),
        "hard_swish" (alpha, beta: ``x * clip(alpha * x + beta, 0, 1)``), "clip" (low, high), "sigmoid", "log_sigmoid",
        "softplus" (beta), "softsign", "tanh", "abs", "soft_shrink" (alpha), "erf", "sin", "cos", "atan", "asinh",
        "exp", "log", "sqrt", "reciprocal", "square", "power" (exponent).
    parameters : mapping from str to float or array
        Values of the names in brackets. An array broadcasts against x, and does not enlarge it, as the slopes of a
        PReLU ("leaky_relu") do. Parameters that are left out have the function's usual values.
    """

    function: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Softmax(Kind):
    """Compute the softmax along axes: ``exp(x) / sum(exp(x))``."""

    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LogSoftmax(Kind):
    """Compute the logarithm of the softmax along axes."""

    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Normalize(Kind):
    """Divide by the spread along axes: ``(x - m) / sqrt(mean((x - m) ** 2) + epsilon)``, means along `axes`.

    m is the mean if `centred` (layer and instance normalisation; group normalisation with a `Reshape` before and
    behind it), and 0 otherwise (RMS normalisation). Scale and shift are a node of their own.
    """

    axes: tuple[int, ...]
    epsilon: float
    centred: bool = True


@dataclass(frozen=True, eq=False)
class LocalResponse(Kind):
    """Compute ``x / (bias + alpha / size * s) ** beta``; s sums the squares of `size` neighbours along an axis.

    The neighbours of element i are ``i - (size - 1) // 2`` to ``i + size // 2``, as far as they exist (ONNX's LRN).
    """

    axis: int
    size: int
    alpha: float
    beta: float
    bias: float


# ---- functions of several inputs ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sum(Kind):
    """Add the inputs, each times its weight: ``x - y`` has the weights (1, -1). No weights stand for ones."""

    weights: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Concatenate(Kind):
    """Concatenate the inputs along an axis."""

    axis: int


@dataclass(frozen=True, eq=False)
class Extremum(Kind):
    """Take the elementwise maximum or minimum of the inputs."""

    function: Literal["max", "min"]


@dataclass(frozen=True, eq=False)
class Product(Kind):
    """Multiply two inputs elementwise, both of which depend on the network's input."""


@dataclass(frozen=True, eq=False)
class Quotient(Kind):
    """Divide the first input by the second, elementwise. The first may be a `Constant`."""


@dataclass(frozen=True, eq=False)
class BranchMatmul(Kind):
    """Compute ``numpy.matmul(x, y)`` of two inputs that both depend on the network's input, as attention does."""


# ---- the rest ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unsupported(Kind):
    """A map that no kind describes: control flow, recurrent cells, custom operators.

    Its inputs are the tensors that depend on the network's input.

    Parameters
    ----------
    reason : str
        Why there is no figure, as a phrase for people: "a recurrent cell, whose gates multiply activations".
    """

    reason: str
