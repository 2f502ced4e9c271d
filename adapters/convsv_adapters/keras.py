"""Operator norms of convolutions in Keras 3: a constraint, a regularizer and a callback, on torch, JAX and NumPy.

>>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()])
>>> layers = constrain(model, 1.0)  # the line that is added to a script
>>> layers[0].layer.kernel_constraint.bound
1.0

Keras's own `SpectralNormalization` divides by the norm of the reshaped kernel, which is not that of the layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras

import convsv_core
from convsv_adapters._keras_layers import ConvLayer, conv_layers, kernel_shape
from convsv_adapters._operators import Operator, check_penalty, layer_operators, layer_penalty
from convsv_core import Conv
from convsv_core._projection.certificate import CERTIFICATE_RTOL
from convsv_core._projection.projection import METHODS, ProjectionMethod
from convsv_core._projection.rescale import rescale_together
from convsv_core.conv import SPATIAL_LETTERS, as_int
from convsv_core.plugins import backend_of
from convsv_core.reports import LayerReport

__all__ = [
    "ConvLayer",
    "OperatorNorm",
    "OperatorNormPenalty",
    "OperatorNormProjection",
    "analyze",
    "constrain",
    "conv_layers",
    "penalize",
]

register = keras.saving.register_keras_serializable(package="convsv")

GEOMETRY = ("strides", "dilation_rate", "groups", "transposed", "depthwise", "input_shape")
"""What the constraint and the regularizer have to know of a layer beside its kernel."""


class Geometry:
    """How a kernel acts, in Keras's words: neither a constraint nor a regularizer is told of its layer.

    Parameters
    ----------
    strides, dilation_rate : int or tuple of int, default 1
    groups : int, default 1
    transposed : bool, default False
        The kernel of a `Conv1DTranspose` to `Conv3DTranspose`.
    depthwise : bool, default False
        The kernel of a `DepthwiseConv`, or the first of a `SeparableConv`.
    input_shape : tuple of int, optional
        Spatial extents of the input, for the circular convolution of these. Without it, what is meant holds for every
        input size and for the layer's own padding.
    """

    def __init__(
        self,
        strides: int | Iterable[int] = 1,
        dilation_rate: int | Iterable[int] = 1,
        groups: int = 1,
        transposed: bool = False,
        depthwise: bool = False,
        input_shape: Iterable[int] | None = None,
    ) -> None:
        self.strides = strides if isinstance(strides, int) else tuple(strides)
        self.dilation_rate = dilation_rate if isinstance(dilation_rate, int) else tuple(dilation_rate)
        self.groups, self.transposed, self.depthwise = groups, transposed, depthwise
        self.input_shape = None if input_shape is None else tuple(input_shape)
        if depthwise and (transposed or groups != 1):
            raise ValueError("depthwise=True: the groups follow from the kernel, and there is no transposed such layer")

    def conv(self, shape: tuple[int, ...]) -> Conv:
        """Describe the kernel of a variable's shape."""
        if len(shape) - 2 not in SPATIAL_LETTERS:
            raise ValueError(f"the kernel has shape {shape}: wanted that of a convolution, with 3 to 5 axes")
        layout = SPATIAL_LETTERS[len(shape) - 2] + ("OI" if self.transposed else "IO")
        groups = shape[-2] if self.depthwise else self.groups
        return Conv(layout, self.strides, self.dilation_rate, groups, transposed=self.transposed)

    def kernel(self, variable: Any) -> Any:
        """The kernel of a variable with the axes that `conv` names."""
        kernel = keras.ops.convert_to_tensor(variable)
        return keras.ops.reshape(kernel, kernel_shape(tuple(kernel.shape), self.depthwise))

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same from."""
        return {name: getattr(self, name) for name in GEOMETRY}


@register
class OperatorNorm(keras.constraints.Constraint):  # type: ignore[misc]
    """Keep the operator norm of a convolution at or below a bound after every update of its kernel.

    Parameters
    ----------
    bound : float, default 1
        Positive.
    method : {"rescale", "dykstra", "alternating", "newton-schulz"}, default "rescale"
        As for `convsv_core.project`: "rescale" multiplies the kernel by one number, "dykstra" comes near the nearest
        kernel in the bound.
    steps : int, default 10
        Iterations of the methods that have any.
    strides, dilation_rate, groups, transposed, depthwise, input_shape
        See `Geometry`; `constrain` fills them in for the layers of a model.

    Notes
    -----
    Called on a variable, it returns a tensor of its shape and dtype, float32 or float64 (with mixed precision variables
    are float32). Traceable: Keras's trainer on JAX compiles it, and there the certificate is that of a fixed grid, 1 %
    above the norm. What is stored is left 1e-3 below the bound, so that `convsv_core.norm_bounds` finds it within. A
    constant to differentiation.

    Examples
    --------
    >>> layer = keras.layers.Conv2D(8, 3, strides=2, kernel_constraint=OperatorNorm(1.0, strides=2))
    >>> OperatorNorm.from_config(layer.kernel_constraint.get_config()).geometry.strides
    2
    """

    def __init__(
        self, bound: float = 1.0, method: ProjectionMethod = "rescale", steps: int = 10, **geometry: Any
    ) -> None:
        self.bound, self.method, self.steps = (
            _check_bound(bound),
            _check_method(method),
            as_int("steps", steps, least=1),
        )
        self.geometry = Geometry(**geometry)

    def __call__(self, w: Any) -> Any:
        """The kernel within the bound."""
        kernel = self.geometry.kernel(w)
        _check_dtype(kernel, getattr(w, "path", "kernel"))
        conv, extents = self.geometry.conv(tuple(w.shape)), self.geometry.input_shape
        backend, bound = backend_of(kernel), self.bound / (1 + CERTIFICATE_RTOL)
        traced = backend.truth(keras.ops.all(keras.ops.isfinite(kernel))) is None
        if self.method == "rescale" and not traced:
            ((found, _),) = rescale_together([backend.stop_gradient(kernel)], extents, conv, bound)
        else:
            options: dict[str, Any] = {"steps": self.steps} if traced else {"max_iterations": self.steps}
            found = convsv_core.project(kernel, extents, conv, bound, method=self.method, **options).kernel
        return keras.ops.reshape(keras.ops.cast(found, kernel.dtype), tuple(w.shape))

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same from."""
        return {"bound": self.bound, "method": self.method, "steps": self.steps, **self.geometry.get_config()}


@register
class OperatorNormPenalty(keras.regularizers.Regularizer):  # type: ignore[misc]
    """Add a penalty on the singular values of a convolution to the loss.

    Parameters
    ----------
    kind : str, default "norm_hinge"
        A function of `convsv_core.penalties`. Without an `input_shape`, "norm_hinge", "squared_norm" and
        "orthogonality" alone, for every input size.
    weight : float, default 0.001
    options : mapping, optional
        Of that function; a bound of 1 for "norm_hinge" unless given.
    strides, dilation_rate, groups, transposed, depthwise, input_shape
        See `Geometry`; `penalize` fills them in for the layers of a model.

    Notes
    -----
    Differentiable and traceable, on torch and JAX.

    Examples
    --------
    >>> penalty = OperatorNormPenalty("orthogonality", 0.01)
    >>> layer = keras.layers.Conv2D(8, 3, kernel_regularizer=penalty)
    """

    def __init__(
        self,
        kind: str = "norm_hinge",
        weight: float = 1e-3,
        options: Mapping[str, Any] | None = None,
        **geometry: Any,
    ) -> None:
        check_penalty(kind)
        self.kind, self.weight = kind, float(weight)
        self.options = dict(options) if options is not None else {"bound": 1.0} if kind == "norm_hinge" else {}
        self.geometry = Geometry(**geometry)

    def __call__(self, x: Any) -> Any:
        """The weighted penalty: a 0-d tensor."""
        extents = self.geometry.input_shape
        conv = self.geometry.conv(tuple(x.shape))
        name, shapes = getattr(x, "path", "kernel"), () if extents is None else (extents,)
        return self.weight * layer_penalty(name, self.geometry.kernel(x), conv, shapes, self.kind, self.options)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same from."""
        return {"kind": self.kind, "weight": self.weight, "options": self.options, **self.geometry.get_config()}


@register
class OperatorNormProjection(keras.callbacks.Callback):  # type: ignore[misc]
    """Bring every convolution of the model within a bound after batches of training, and log the certified norms.

    Unlike `OperatorNorm` it looks at values, so that it is exact on JAX too, and it need not be done after every batch.

    Parameters
    ----------
    bound : float, default 1
        Positive.
    every : int, default 1
        Batches from one projection to the next; there is one at the end of every epoch besides.
    method : str, default "rescale"
        As for `convsv_core.project`.
    circular : bool, default False
        Bound the circular convolution at each layer's extents, instead of the layer with its own padding for every
        input size.
    example_input : optional
        As for `conv_layers`; needed where `circular`.

    Attributes
    ----------
    norms : dict of str to float
        Certified upper bound of each kernel's norm at the last projection, by the path of its variable.

    Notes
    -----
    The logs of an epoch get ``"operator_norm"``, the largest of these. What is stored is left 1e-3 below the bound, so
    that `convsv_core.norm_bounds` finds it within.

    Examples
    --------
    >>> OperatorNormProjection(1.0, every=10).get_config()["every"]
    10
    """

    def __init__(
        self,
        bound: float = 1.0,
        every: int = 1,
        method: ProjectionMethod = "rescale",
        circular: bool = False,
        example_input: Any = None,
    ) -> None:
        super().__init__()
        self.bound, self.every = _check_bound(bound), as_int("every", every, least=1)
        self.method, self.circular, self.example_input = _check_method(method), circular, example_input
        self.norms: dict[str, float] = {}
        self._batches = 0

    def project(self, model: keras.Model | None = None) -> dict[str, float]:
        """Project now: the convolutions of `model`, or of the one that is trained; returns `norms`."""
        model = self.model if model is None else model  # on JAX, reading `self.model` writes the trainer's state back
        groups: dict[Any, list[ConvLayer]] = {}
        for layer in conv_layers(model, self.example_input):
            operators = layer_operators(layer.name, layer.kernel_shape, layer.conv, layer.input_shapes, self.circular)
            groups.setdefault((layer.kernel_shape, str(layer.kernel.dtype), operators), []).append(layer)
        self.norms = {}
        for (*_, operators), layers in groups.items():
            for layer, norm in zip(layers, self._project(layers, operators), strict=True):
                self.norms[layer.name] = norm
        return self.norms

    def _project(self, layers: list[ConvLayer], operators: tuple[Operator, ...]) -> list[float]:
        backend = backend_of(layers[0].kernel)
        _check_dtype(layers[0].kernel, layers[0].name)
        kernels = [backend.stop_gradient(layer.kernel) for layer in layers]
        norms = [0.0] * len(layers)
        for operator in operators:
            bound = self.bound / (1 + CERTIFICATE_RTOL) / operator.padding_norm
            if self.method == "rescale":
                found = rescale_together(kernels, operator.input_shape, operator.conv, bound)
            else:
                project = functools.partial(
                    convsv_core.project, input_shape=operator.input_shape, conv=operator.conv, bound=bound
                )
                projections = [project(kernel, method=self.method) for kernel in kernels]
                found = [(one.kernel, float(one.norm)) for one in projections]
            kernels = [kernel for kernel, _ in found]
            norms = [max(norm, one * operator.padding_norm) for norm, (_, one) in zip(norms, found, strict=True)]
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.variable.assign(keras.ops.reshape(kernel, tuple(layer.variable.shape)))
        return norms

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Project where it is due."""
        self._batches += 1
        if self._batches % self.every == 0:
            self.project()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Project, and log the largest norm."""
        self.project()
        if logs is not None:
            logs["operator_norm"] = max(self.norms.values(), default=math.nan)

    def get_config(self) -> dict[str, Any]:
        """What ``OperatorNormProjection(**config)`` makes the same from, the `example_input` left out."""
        return {"bound": self.bound, "every": self.every, "method": self.method, "circular": self.circular}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OperatorNormProjection:
        """Make one from what `get_config` returns."""
        return cls(**config)


def constrain(
    model: keras.layers.Layer,
    bound: float = 1.0,
    *,
    method: ProjectionMethod = "rescale",
    steps: int = 10,
    circular: bool = False,
    example_input: object = None,
) -> list[ConvLayer]:
    """Give every convolution kernel of a model an `OperatorNorm` constraint of its geometry: one line of a script.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer
        Built, and not yet trained: a trainer that has compiled its step does not look again.
    bound, method, steps
        As for `OperatorNorm`.
    circular : bool, default False
        Bound the circular convolution at each layer's extents, in place of the layer with its own padding for every
        input size.
    example_input : optional
        As for `conv_layers`; needed where `circular`.

    Returns
    -------
    list of ConvLayer

    Raises
    ------
    TypeError, ValueError
        As for `conv_layers`; also where there is no convolution, a kernel has a constraint already, or `circular` finds
        no extents, or several, for a layer.

    Notes
    -----
    The constraints hold from the first update on, and are saved with the model, which needs this module to be imported
    to be loaded.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.DepthwiseConv2D(3)])
    >>> [layer.name for layer in constrain(model, 0.5)] == [model.layers[0].kernel.path]
    True
    """

    def make(layer: ConvLayer, geometry: dict[str, Any]) -> OperatorNorm:
        _check_dtype(layer.kernel, layer.name)
        return OperatorNorm(bound, method, steps, **geometry)

    return _attach("constraint", make, conv_layers(model, example_input), circular)


def penalize(
    model: keras.layers.Layer,
    kind: str = "norm_hinge",
    weight: float = 1e-3,
    *,
    circular: bool = False,
    example_input: object = None,
    **options: Any,
) -> list[ConvLayer]:
    """Give every convolution kernel of a model an `OperatorNormPenalty` of its geometry.

    Parameters
    ----------
    model
        As for `constrain`.
    kind, weight
        As for `OperatorNormPenalty`.
    circular, example_input
        As for `constrain`. Penalties other than those for every input size need both.
    **options
        Of the penalty, such as ``bound=1.0``.

    Returns
    -------
    list of ConvLayer

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3)])
    >>> _ = penalize(model, "orthogonality", 0.01)
    >>> len(model.losses)
    1
    """

    def make(layer: ConvLayer, geometry: dict[str, Any]) -> OperatorNormPenalty:
        return OperatorNormPenalty(kind, weight, options or None, **geometry)

    return _attach("regularizer", make, conv_layers(model, example_input), circular)


def analyze(model: keras.layers.Layer, example_input: object = None, **options: Any) -> list[LayerReport]:
    """Report the singular values of every convolution, as `convsv spectrum` does for a file.

    Parameters
    ----------
    model, example_input
        As for `conv_layers`.
    **options
        `backend`, `dtype` and `device` of `convsv_core.analyze`, which this calls.

    Returns
    -------
    list of LayerReport
    """
    return convsv_core.analyze(model, example_input, **options)


def _attach(
    attribute: str, make: Callable[[ConvLayer, dict[str, Any]], Any], found: list[ConvLayer], circular: bool
) -> list[ConvLayer]:
    """Give kernels a constraint or a regularizer, as their variables and their layers hold it."""
    if not found:
        raise ValueError(f"model has no convolution to give a {attribute} to")
    for layer in found:
        held = getattr(layer.variable, attribute)
        if held is not None:
            raise ValueError(f"{layer.name!r} has a {attribute}, {held!r}: wanted a kernel without one")
    for layer, geometry in [(layer, _geometry(layer, circular)) for layer in found]:
        made = make(layer, geometry)
        setattr(layer.variable, attribute, made)
        setattr(layer.layer, f"{layer.part}_{attribute}", made)
    return found


def _geometry(layer: ConvLayer, circular: bool) -> dict[str, Any]:
    conv = layer.conv
    geometry: dict[str, Any] = {
        "strides": conv.strides,
        "dilation_rate": conv.dilations,
        "groups": 1 if layer.depthwise else conv.groups,
        "transposed": conv.transposed,
        "depthwise": layer.depthwise,
    }
    if circular:
        operators = layer_operators(layer.name, layer.kernel_shape, conv, layer.input_shapes, circular)
        if len(operators) > 1:
            raise ValueError(
                f"{layer.name!r} takes inputs of several extents, {layer.input_shapes}: wanted circular=False, which "
                f"bounds every input size"
            )
        geometry["input_shape"] = operators[0].input_shape
    return geometry


def _check_bound(bound: float) -> float:
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < math.inf:
        raise ValueError(f"bound={bound!r}: wanted a positive number")
    return float(bound)


def _check_method(method: ProjectionMethod) -> ProjectionMethod:
    if method not in METHODS:
        raise ValueError(f"method={method!r}: wanted one of {', '.join(METHODS)}")
    return method


def _check_dtype(kernel: Any, name: str) -> None:
    dtype = keras.backend.standardize_dtype(kernel.dtype)
    if dtype not in ("float32", "float64"):
        raise TypeError(
            f"{name!r} is a variable of {dtype}: wanted float32 or float64, which variables are under the policy "
            f"'mixed_{dtype}' too"
        )
