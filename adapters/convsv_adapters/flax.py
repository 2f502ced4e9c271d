"""The convolutions of flax models, nnx and linen: their geometry, and the extents of their inputs.

>>> from flax import linen
>>> import jax.numpy as jnp
>>> model = linen.Sequential([linen.Conv(8, (3, 3)), linen.relu, linen.Conv(8, (3, 3), strides=2)])
>>> for layer in conv_layers(model, jnp.zeros((1, 32, 32, 3))):
...     print(layer.path, layer.conv.layout, layer.conv.stride, layer.input_shape)
layers_0/kernel HWIO (1, 1) (32, 32)
layers_2/kernel HWIO (2, 2) (32, 32)

`convsv_adapters.optax` bounds and penalises them in training. `analyze` takes a linen module that is bound to its
variables: ``model.bind(variables)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
from flax import linen, nnx

from convsv_adapters._jax.batch_norm import check_batch_norm, normalised_layers
from convsv_adapters._jax.flax_batch_norm import flax_normalisations
from convsv_adapters._jax.flax_geometry import flax_geometry, kernel_size_of
from convsv_adapters._jax.flax_kinds import (
    LINEAR,
    LINEN_CONVOLUTIONS,
    LINEN_LINEAR,
    NNX_CONVOLUTIONS,
    NNX_LINEAR,
    Kinds,
    flax_kinds,
)
from convsv_adapters._jax.geometry import (
    COMPUTED_BY,
    FoundConv,
    computed_layer,
    linear_conv,
    make_traced_layer,
)
from convsv_adapters._jax.tracing import evaluate, trace
from convsv_adapters._layers import ConvLayer, model_layer
from convsv_core import analyze
from convsv_core.layers import Extents, Layer

__all__ = ["ConvLayer", "analyze", "conv_layers"]

NNX_WRAPPERS = tuple(getattr(nnx, name) for name in ("WeightNorm", "SpectralNorm") if hasattr(nnx, name))
LINEN_WRAPPERS = (linen.WeightNorm, linen.SpectralNorm)


def conv_layers(
    model: nnx.Module | linen.Module,
    example_input: object = None,
    *,
    linear: bool = False,
    batch_norm: Literal["fold"] | None = None,
) -> list[ConvLayer]:
    """Find every convolution of a flax model, with its geometry and the true extents of its inputs.

    Parameters
    ----------
    model : flax.nnx.Module or flax.linen.Module
        A linen module may be bound to variables, as by ``model.bind(variables)``. Otherwise the shapes are those that
        its `init` makes.
    example_input : array, jax.ShapeDtypeStruct, tuple, list or mapping, optional
        The argument of the model, its positional arguments or its keyword arguments. The model is not run: its shapes
        are traced, an nnx model's in evaluation mode. A linen module needs it, since its layers are made in the call.
    linear : bool, default False
        List linear layers too, as convolutions with one tap on an extent of one pixel. Those with several axes of
        inputs or outputs (`LinearGeneral`, `DenseGeneral`) have no geometry.
    batch_norm : "fold", optional
        List batch normalisations too, as what they do in evaluation mode. A layer whose output a `BatchNorm` takes
        directly is listed with its `normalisation`, and stands for both. It is listed without one too if anything else
        uses its output. A normalisation that takes anything else stands alone. Needs an `example_input`.

    Returns
    -------
    list of ConvLayer
        In the order of `nnx.iter_graph`, or for linen in the order of the calls. A module that is used at several
        places is one layer. `path` is the path in ``nnx.state(model, nnx.Param)`` or ``variables["params"]``.

    Raises
    ------
    TypeError
        `model` is of another class.
    ValueError
        `model` is a linen module, and there is no `example_input`. Or `batch_norm` has another value, or is given
        without an `example_input`, or the call does not reach a normalisation, or one has no factors.

    Notes
    -----
    A layer with a mask or a dilated input, a `linen.ConvLocal` and kernels that `nn.scan` stacks have no geometry;
    `note` says why. So it is with kernels that `WeightNorm` or `SpectralNorm` compute in the forward pass. A transposed
    convolution whose taps are not flipped gets the geometry of the reflected one, which has the same singular values.

    Examples
    --------
    >>> from flax import nnx
    >>> model = nnx.Conv(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
    >>> (layer,) = conv_layers(model, jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"))
    >>> layer.path, layer.conv.stride, layer.input_shape
    ('kernel', (2, 2), (32, 32))
    """
    check_batch_norm(batch_norm, example_input)
    if isinstance(model, nnx.Module):
        layers = _nnx_layers(model, example_input, linear)
    elif isinstance(model, linen.Module):
        layers = _linen_layers(model, example_input, linear)
    else:
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted a flax.nnx.Module or "
            f"flax.linen.Module"
        )
    if batch_norm is None:
        return layers
    return normalised_layers(layers, *flax_normalisations(model, example_input, flax_kinds(model, linear)))


def model_layers(model: nnx.Module | linen.Module, example_input: object, linear: bool = False) -> list[Layer]:
    """Return the convolutions with their kernels, as a report of the core takes them.

    A kernel that `WeightNorm` or `SpectralNorm` computes is the one that the layer uses in the call, if there is an
    `example_input`. With `linear` the layers of the class `nnx.Linear` or `linen.Dense` are among the rows.
    """
    if isinstance(model, nnx.Module):
        return _nnx_rows(model, example_input, linear)
    if model.scope is None:
        raise ValueError(
            f"model is a {type(model).__qualname__} of flax.linen without its variables: wanted model.bind(variables)"
        )
    return _linen_rows(model, example_input, linear)


def _row(layer: ConvLayer, module: Any, kernel: Any, used: Sequence[jax.Array]) -> Layer:
    """Return the row of a layer, whose stored kernel is `kernel` and which used the kernels `used` in a call."""
    if layer.linear:
        return model_layer(layer, None if layer.conv is None else kernel.reshape(layer.kernel_shape))
    if not layer.computed_in_forward:
        return model_layer(layer, kernel)
    plain = flax_geometry(module, layer.kernel_shape, layer.input_shapes)
    return computed_layer(layer, plain, used, "WeightNorm or SpectralNorm")


# ---- nnx ---------------------------------------------------------------------------------------------------


def _nnx_layers(model: nnx.Module, example_input: object, linear: bool) -> list[ConvLayer]:
    kinds = flax_kinds(model, linear)
    seen: dict[str, dict[Extents, None]] = {}
    if example_input is not None:
        graph, state = nnx.split(model)

        def call(state: object, *args: object, **kwargs: object) -> None:
            _called(graph, state, args, kwargs, kinds, seen)

        trace(call, state, example_input)
    found, wrapped = [], _wrapped(model)
    for path, node in nnx.iter_graph(model):
        if isinstance(node, kinds):
            name = _name(path)
            extents = tuple(seen.get(name, ()))
            kernel_path = "/".join([*map(str, path), "kernel"])
            shape = tuple(node.kernel.shape)
            traced = example_input is not None
            found.append(_conv_layer(name, kernel_path, node, shape, extents, traced, wrapped.get(id(node), "")))
    return found


def _nnx_rows(model: nnx.Module, example_input: object, linear: bool) -> list[Layer]:
    layers = {layer.name: layer for layer in _nnx_layers(model, example_input, linear)}
    used: dict[str, list[jax.Array]] = {}
    if example_input is not None and any(layer.computed_in_forward for layer in layers.values()):
        graph, state = nnx.split(model)

        def call(state: object, *args: object, **kwargs: object) -> dict[str, list[jax.Array]]:
            return _called(graph, state, args, kwargs, NNX_CONVOLUTIONS, {})

        used = evaluate(call, state, example_input)
    return [
        _row(layers[name], node, node.kernel[...], used.get(name, ()))
        for path, node in nnx.iter_graph(model)
        if (name := _name(path)) in layers and isinstance(node, (*NNX_CONVOLUTIONS, *NNX_LINEAR))
    ]


def _wrapped(model: nnx.Module) -> dict[int, str]:
    """Return the class of the wrapper around each module that has one, by the `id` of the module."""
    return {
        id(inner): type(node).__name__
        for _, node in nnx.iter_graph(model)
        if isinstance(node, NNX_WRAPPERS)
        for _, inner in nnx.iter_graph(node)
        if inner is not node
    }


def _called(
    graph: Any,
    state: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kinds: Kinds,
    seen: dict[str, dict[Extents, None]],
) -> dict[str, list[jax.Array]]:
    """Call a copy of a model in evaluation mode, note the extents of its layers, and return their kernels."""
    copy = nnx.merge(graph, state)
    copy.eval()
    kernels: dict[str, list[jax.Array]] = {}
    for path, node in list(nnx.iter_graph(copy)):
        if isinstance(node, kinds):
            name = _name(path)
            _note_calls(node, seen.setdefault(name, {}), kernels.setdefault(name, []))
    copy(*args, **kwargs)
    return kernels


def _note_calls(module: nnx.Module, seen: dict[Extents, None], kernels: list[jax.Array]) -> None:
    """Let a copy of a user's module note the extents of its inputs and its kernel when it is called."""
    own = type(module)

    def noting(self: nnx.Module, inputs: jax.Array, *args: object, **kwargs: object) -> jax.Array:
        seen[_extents(self, inputs)] = None
        kernels.append(self.kernel[...])
        return own.__call__(self, inputs, *args, **kwargs)

    object.__setattr__(module, "__class__", type(own.__name__, (own,), {"__call__": noting}))


def _name(path: tuple[object, ...]) -> str:
    return "/".join(map(str, path)) or "."


# ---- linen -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Calls:
    """The calls of one module of a linen model.

    Attributes
    ----------
    module : linen.Module
    wrapper : str
        The class of the wrapper in whose call the module was called, or "".
    extents : dict
        The extents of its inputs, as keys.
    kernels : list of array
        The kernel that it used in each call.
    """

    module: Any
    wrapper: str
    extents: dict[Extents, None] = dataclasses.field(default_factory=dict)
    kernels: list[Any] = dataclasses.field(default_factory=list)


class _Called(NamedTuple):
    """The calls of the convolutions and dense layers of a linen model, by path, and the model's variables."""

    calls: dict[tuple[str, ...], _Calls]
    variables: Any


def _linen_call(model: Any, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Called:
    """Call an unbound model, which is initialised if it has no variables yet."""
    calls: dict[tuple[str, ...], _Calls] = {}
    wrappers: list[str] = []

    def note(following: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> object:
        module = context.module
        if context.method_name != "__call__":
            return following(*args, **kwargs)
        if isinstance(module, LINEN_WRAPPERS):
            wrappers.append(type(module).__name__)
            try:
                return following(*args, **kwargs)
            finally:
                wrappers.pop()
        if isinstance(module, (*LINEN_CONVOLUTIONS, *LINEN_LINEAR)):
            found = calls.setdefault(module.path, _Calls(module, ""))
            found.wrapper = wrappers[-1] if wrappers else found.wrapper
            found.extents[_extents(module, args[0] if args else kwargs["inputs"])] = None
            if module.has_variable("params", "kernel"):
                found.kernels.append(linen.meta.unbox(module.get_variable("params", "kernel")))
        return following(*args, **kwargs)

    with linen.intercept_methods(note):
        if variables is None:
            variables = model.init(jax.random.key(0), *args, **kwargs)
        else:
            model.apply(variables, *args, rngs={"params": jax.random.key(0)}, mutable=True, **kwargs)
    return _Called(calls, variables)


def _linen_layers(model: linen.Module, example_input: object, linear: bool) -> list[ConvLayer]:
    kinds = flax_kinds(model, linear)
    if example_input is None:
        raise ValueError(
            "example_input is None: wanted the arguments of the model, since the layers of a linen module are made in "
            "the call"
        )
    unbound, variables = (model, None) if model.scope is None else model.unbind()
    calls: dict[tuple[str, ...], _Calls] = {}
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}

    def call(variables: Any, *args: object, **kwargs: object) -> None:
        found = _linen_call(unbound, variables, args, kwargs)
        calls.update({path: one for path, one in found.calls.items() if isinstance(one.module, kinds)})
        params = linen.meta.unbox(found.variables["params"])
        shapes.update({path: tuple(_at(params, [*path, "kernel"]).shape) for path in calls})

    trace(call, variables, example_input)
    return [
        _conv_layer(
            _name(path),
            "/".join([*path, "kernel"]),
            one.module,
            shapes[path],
            tuple(one.extents),
            True,
            one.wrapper,
        )
        for path, one in calls.items()
    ]


def _linen_rows(model: linen.Module, example_input: object, linear: bool) -> list[Layer]:
    layers = {layer.name: layer for layer in _linen_layers(model, example_input, linear)}
    unbound, variables = model.unbind()
    params = linen.meta.unbox(variables["params"])
    calls: dict[tuple[str, ...], _Calls] = {}

    def call(variables: Any, *args: object, **kwargs: object) -> dict[str, list[jax.Array]]:
        calls.update(_linen_call(unbound, variables, args, kwargs).calls)
        return {_name(path): one.kernels for path, one in calls.items()}

    if not any(layer.computed_in_forward and not layer.linear for layer in layers.values()):
        kernels = ((layer, _at(params, layer.path.split("/"))) for layer in layers.values())
        return [_row(layer, None, kernel, ()) for layer, kernel in kernels]
    used = evaluate(call, variables, example_input)
    return [
        _row(layers[name], one.module, _at(params, [*path, "kernel"]), used.get(name, ()))
        for path, one in calls.items()
        if (name := _name(path)) in layers
    ]


def _at(tree: Any, path: Iterable[str]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _extents(module: Any, inputs: jax.Array) -> Extents:
    """Return the extents of a layer's input: one pixel for a linear layer."""
    return (1,) if isinstance(module, LINEAR) else tuple(inputs.shape[-len(kernel_size_of(module)) - 1 : -1])


def _conv_layer(
    name: str,
    path: str,
    module: Any,
    shape: tuple[int, ...],
    extents: tuple[Extents, ...],
    traced: bool,
    wrapper: str,
) -> ConvLayer:
    """Return a layer, without geometry if a wrapper of this class computes its kernel in the forward pass."""
    linear = isinstance(module, LINEAR)
    if wrapper:
        found = FoundConv(None, COMPUTED_BY.format(wrapper))
    else:
        found = _linear_geometry(module, shape) if linear else flax_geometry(module, shape, extents)
    return make_traced_layer(
        module,
        "flax",
        found,
        name=name,
        path=path,
        kernel_shape=(1, *shape) if linear else shape,
        input_shapes=extents,
        traced=traced,
        computed=bool(wrapper),
        linear=linear,
    )


def _linear_geometry(module: Any, shape: tuple[int, ...]) -> FoundConv:
    if isinstance(module, nnx.LinearGeneral | linen.DenseGeneral) or len(shape) != 2:
        return FoundConv(None, f"its kernel has the shape {shape}, and may map several axes: wanted a matrix")
    own = getattr(module, "dot_general", None)
    if own not in (None, jax.lax.dot_general) or getattr(module, "dot_general_cls", None):
        return FoundConv(None, "its product is a function of the user's")
    return linear_conv("WIO")
