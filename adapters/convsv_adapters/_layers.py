"""The convolutions of a model, in the same form for every framework, and their operators and penalties."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from convsv_core import Conv, norm_upper_bound, penalties
from convsv_core.layers import (
    Extents,
    Layer,
    Operator,
    UnknownExtents,
    circular_geometry,
    join_notes,
    lattice,
    layer_operators,
)
from convsv_core.training import METHODS, ProjectionMethod

__all__ = [
    "COLD_ITERATIONS",
    "SCALINGS",
    "ConvLayer",
    "call_arguments",
    "check_bound",
    "check_method",
    "check_penalty",
    "check_scaling",
    "geometry_of",
    "layer_penalty",
    "make_layer",
    "model_layer",
    "needs_extents",
    "one_tap_conv",
    "operators_of",
    "own_padding",
    "squared_excess",
    "step_factor",
    "with_normalisation",
]

SCALINGS = ("rms", "operator")
"""The factors of a learning rate for steps in the operator norm; see `step_factor`."""

COLD_ITERATIONS = 20
"""Iterations of "exact" in a layer's first step, which has no earlier step to go on from.

Measured on gradients of ResNet-32 in training: 20 iterations give 0.93 to 0.98 of the optimum on their grid.
"""


@dataclass(frozen=True, kw_only=True)
class ConvLayer:
    """One convolution kernel of a model: static, hashable and comparable.

    Two layers are equal if all of their attributes are, and they are in one module. Code decides by the attributes
    alone; `note` is for people.

    Attributes
    ----------
    name : str
        Path in the model: in PyTorch the first name in `torch.nn.Module.named_modules`, in Keras the path of the
        kernel's variable, in JAX's frameworks the path of the layer, with slashes.
    kernel_shape : tuple of int
        Shape of the kernel, with the axes that ``conv.layout`` names.
    conv : Conv or None
        Geometry of the layer, with its own padding. None where a `Conv` cannot express it; `note` says why.
    input_shapes : tuple of tuple of int
        All spatial extents that the layer's input had in the forward pass, in order of appearance. Empty where there
        was no pass, or where the pass did not reach the layer.
    note : str
        For people only: an assumption that was made, or why a figure is missing.
    path : str
        JAX's frameworks: the path of the kernel in the tree of parameters. Elsewhere "".
    module : torch.nn.Module or keras.layers.Layer or None
        The layer itself. None in JAX's frameworks, where layers are static.
    variable : keras.Variable or None
        Keras: the variable that holds the kernel.
    part : str
        Keras: "kernel", "depthwise" or "pointwise", with which Keras's arguments for the kernel begin, as in
        ``depthwise_constraint``. A separable layer has two kernels, which are two of these.
    reached : bool
        False if there was a forward pass that did not reach the layer.
    computed_in_forward : bool
        True if the forward pass computes the kernel anew from other parameters, so that a new kernel cannot be stored.
    unknown_forward : bool
        True for a user's class, whose forward pass may do more to kernel and padding than the framework's class does.
    linear : bool
        True for a linear layer. It is a convolution with one tap, on an extent of one pixel: `kernel` is its weight
        with one more axis, of extent 1.
    normalisation : torch.nn.Module, keras.layers.Layer, BatchNorm of JAX's adapters, or None
        The batch normalisation that follows the layer directly. `kernel` is then the one of both in evaluation mode:
        the layer's, with each output channel multiplied by the normalisation's scale. `module` may be the normalisation
        itself, which stands alone then, and acts on each channel by itself. In JAX's frameworks this holds paths.
    """

    name: str
    kernel_shape: tuple[int, ...]
    conv: Conv | None
    input_shapes: tuple[Extents, ...] = ()
    note: str = ""
    path: str = ""
    module: Any = None
    variable: Any = field(default=None, compare=False, repr=False)
    part: str = "kernel"
    reached: bool = True
    computed_in_forward: bool = False
    unknown_forward: bool = False
    linear: bool = False
    normalisation: Any = None
    read: Callable[[ConvLayer], Any] | None = field(default=None, compare=False, repr=False)
    """The framework's function that returns the layer's kernel."""

    @property
    def input_shape(self) -> Extents | None:
        """The first of `input_shapes`, or None."""
        return self.input_shapes[0] if self.input_shapes else None

    @property
    def largest_input_shape(self) -> Extents | None:
        """The one of `input_shapes` with the most pixels, or None."""
        return max(self.input_shapes, key=math.prod, default=None)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stored weight: `kernel_shape`, without the axis of the one tap for a linear layer."""
        if not self.linear or self.conv is None:
            return self.kernel_shape
        axis = self.conv.layout.index("W")
        return (*self.kernel_shape[:axis], *self.kernel_shape[axis + 1 :])

    @property
    def kernel(self) -> Any:
        """The kernel with the axes that ``conv.layout`` names; a parametrised kernel is computed on each access.

        AttributeError in JAX's frameworks, where the kernel is in the tree of parameters.
        """
        if self.read is None:
            raise AttributeError(f"the layer {self.name!r} holds no kernel: wanted the leaf {self.path!r} of the model")
        return self.read(self)

    @property
    def weight(self) -> Any:
        """`kernel`, by PyTorch's name."""
        return self.kernel

    @property
    def layer(self) -> Any:
        """`module`, by Keras's name."""
        return self.module

    @property
    def depthwise(self) -> bool:
        """Return whether Keras's kernel is depthwise: its axis of input channels is part of the axis O of `kernel`."""
        return self.part == "depthwise"


def make_layer(*remarks: str, reached: bool = True, unknown_forward: bool = False, **attributes: Any) -> ConvLayer:
    """Return a `ConvLayer` whose note puts its facts into words, before the remarks that are not empty."""
    facts = (
        "" if reached else "not reached by the forward pass",
        "a subclass with a forward pass of its own: what it does to kernel and padding is not known"
        if unknown_forward
        else "",
    )
    note = "; ".join(filter(None, (*facts, *remarks)))
    return ConvLayer(note=note, reached=reached, unknown_forward=unknown_forward, **attributes)


def with_normalisation(layer: ConvLayer, normalisation: Any, *, unknown_forward: bool) -> ConvLayer:
    """Return a layer with the normalisation that follows it, whose forward pass may not be known."""
    if not unknown_forward:
        return replace(layer, normalisation=normalisation)
    note = join_notes(layer.note, "followed by a normalisation of a subclass with a forward pass of its own")
    return replace(layer, normalisation=normalisation, unknown_forward=True, note=note)


def one_tap_conv(layout: str, groups: int = 1) -> Conv:
    """Return the convolution of one tap on one pixel that a linear layer is.

    With a group for each channel it is a product of each channel with a factor, as in a normalisation.

    Parameters
    ----------
    layout : {"OIW", "WIO"}
        The axes of the kernel, which is the layer's matrix with an axis W of extent 1.
    groups : int, default 1
    """
    return Conv(layout, groups=groups, padding=0, padding_mode="zeros")


def model_layer(layer: ConvLayer, kernel: Any, *, sure: bool = False) -> Layer:
    """Return the layer as a report of the core takes it, with the largest of its extents.

    A layer with an unknown forward pass has no kernel and the reason, unless it is `sure` that it uses its kernel as it
    is stored.
    """
    if layer.unknown_forward and not sure:
        return Layer(layer.name, None, None, None, layer.note, linear=layer.linear)
    note, extents = layer.note, layer.largest_input_shape
    if (count := len(layer.input_shapes)) > 1:
        note = "; ".join(filter(None, (note, f"takes {count} different extents, of which the largest is used")))
    return Layer(layer.name, kernel, layer.conv, extents, note, linear=layer.linear)


def call_arguments(example_input: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of a model from an argument, positional or keyword arguments."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)), {}


def geometry_of(layer: ConvLayer) -> Conv:
    """Return the layer's `conv`; raise ValueError if it has none."""
    if layer.conv is None:
        raise ValueError(f"the layer {layer.name!r} has no geometry: {layer.note}; wanted layers without it")
    return layer.conv


def operators_of(layer: ConvLayer, circular: bool) -> tuple[Operator, ...]:
    """Return the operators whose norms bound the norm of a layer: see `convsv_core.layers.layer_operators`.

    Raises
    ------
    ValueError
        The layer has no geometry, or extents are needed that are not known. The message names the layer.
    """
    conv = geometry_of(layer)
    try:
        return layer_operators(layer.kernel_shape, conv, layer.input_shapes, circular=circular)
    except UnknownExtents as error:
        raise ValueError(needs_extents(layer.name, str(error))) from None


def step_factor(kernel_shape: tuple[int, ...], conv: Conv, scaling: str) -> float:
    """Return the operator norm of an optimizer's step with a learning rate of 1.

    Parameters
    ----------
    kernel_shape : tuple of int
    conv : Conv
    scaling : str
        One of `SCALINGS`. "operator": 1. "rms": the root of the number of output elements of an image for each input
        element. A step of this norm changes outputs by at most the inputs, as root mean squares.
    """
    if scaling == "operator":
        return 1.0
    extents = dict(zip(conv.layout, kernel_shape, strict=True))
    outputs, inputs, strides = extents["O"], extents["I"], math.prod(conv.strides)
    if conv.transposed:
        return math.sqrt(outputs * conv.groups * strides / inputs)
    return math.sqrt(outputs / (inputs * conv.groups * strides))


def check_scaling(scaling: object) -> None:
    """Raise ValueError unless `scaling` is one of `SCALINGS`."""
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling!r}: wanted one of {', '.join(SCALINGS)}")


def needs_extents(name: str, reason: str) -> str:
    """Return the message of an error about a layer whose extents are needed."""
    return f"the extents of the layer {name!r} are not known: {reason}; wanted an example_input that reaches it"


def check_bound(bound: object, *, positive: bool, name: str = "bound") -> float:
    """Return a bound as a float; raise TypeError for another kind, ValueError unless it is finite and not negative.

    With `positive` it has to be positive too.
    """
    if not isinstance(bound, int | float):
        raise TypeError(f"{name}={bound!r}: wanted a number, not {type(bound).__name__}")
    if isinstance(bound, bool) or not 0 <= bound < math.inf:
        raise ValueError(f"{name}={bound!r}: wanted a finite number that is not negative")
    if positive and not bound:
        raise ValueError(f"{name}={bound!r}: wanted a positive number")
    return float(bound)


def check_method(method: Any) -> ProjectionMethod:
    """Return a method; raise ValueError unless `convsv_core.project` has it."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: wanted one of {', '.join(METHODS)}")
    return method


def check_penalty(kind: object) -> None:
    """Raise ValueError unless `kind` names a penalty."""
    if kind not in penalties.__all__:
        raise ValueError(f"kind={kind!r}: wanted one of {', '.join(penalties.__all__)}")


def own_padding(layer: ConvLayer) -> tuple[Conv, float]:
    """Return the convolution that bounds a layer with its own padding, and the logarithm of the padding's norm."""
    operators = operators_of(layer, circular=False)  # They differ in the norm of the padding alone.
    return operators[0].conv, math.log(max(operator.padding_norm for operator in operators))


def squared_excess(norm: Any, bound: float) -> Any:
    """Return the penalty "norm_hinge" of norms in an array of any library; NaN stays NaN."""
    excess = norm - bound
    return (excess * (excess > 0)) ** 2


def layer_penalty(layer: ConvLayer, kernel: Any, kind: str, options: Mapping[str, Any]) -> Any:
    """Return a penalty on the singular values of one layer.

    The operator is the circular one at the largest of the layer's extents. Without extents, "norm_hinge" and
    "squared_norm" are of the upper bound for every input size, and "orthogonality" is of the infinite lattice.
    "log_lipschitz" is always of a certified upper bound of the norm of the layer with its own padding. It holds for
    every input size, or for the layer's extents where the padding repeats pixels.

    Parameters
    ----------
    layer : ConvLayer
    kernel : array
        The layer's kernel, of ``layer.kernel_shape``.
    kind : str
        A function of `convsv_core.penalties`.
    options : mapping
        Arguments of this function.

    Raises
    ------
    ValueError
        The layer has no geometry, or the penalty needs extents that are not known.
    TypeError
        `options` are not the arguments of the penalty.
    """
    conv = geometry_of(layer)
    if kind == "log_lipschitz":
        own, padding = own_padding(layer)
        return penalties.log_lipschitz(kernel, None, own, **options) + padding
    if (largest := layer.largest_input_shape) is not None:
        extents, circular = circular_geometry(conv, largest)
        return getattr(penalties, kind)(kernel, extents, circular, **options)
    conv = lattice(conv)
    if kind == "orthogonality":
        return penalties.orthogonality(kernel, None, conv, **options)
    if kind == "squared_norm":
        return norm_upper_bound(kernel, conv, **options) ** 2
    if kind == "norm_hinge":
        if set(options) != {"bound"}:
            raise TypeError(f"options={dict(options)}: norm_hinge takes a bound")
        return squared_excess(norm_upper_bound(kernel, conv), options["bound"])
    raise ValueError(needs_extents(layer.name, f"kind={kind!r} is of one input size"))
