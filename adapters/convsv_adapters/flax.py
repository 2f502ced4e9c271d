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

from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
from flax import linen, nnx

from convsv_adapters._jax.geometry import (
    FoundConv,
    linear_conv,
    make_conv,
    make_traced_layer,
    make_transposed_conv,
    per_axis,
)
from convsv_adapters._jax.tracing import trace
from convsv_adapters._layers import ConvLayer, model_layer
from convsv_core import Conv, analyze
from convsv_core.conv import SPATIAL_LETTERS
from convsv_core.layers import Extents, Layer

__all__ = ["ConvLayer", "analyze", "conv_layers"]

Kinds: TypeAlias = tuple[type[Any], ...]
"""Classes of layers."""

NNX_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)
LINEN_CONVOLUTIONS = (linen.Conv, linen.ConvTranspose, linen.ConvLocal)
NNX_LINEAR = (nnx.Linear, nnx.LinearGeneral)
LINEN_LINEAR = (linen.Dense, linen.DenseGeneral)
LINEAR = (*NNX_LINEAR, *LINEN_LINEAR)


def conv_layers(
    model: nnx.Module | linen.Module, example_input: object = None, *, linear: bool = False
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
        `model` is a linen module, and there is no `example_input`.

    Notes
    -----
    A layer with a mask or a dilated input, a `linen.ConvLocal` and kernels that `nn.scan` stacks have no geometry;
    `note` says why. A transposed convolution whose taps are not flipped gets the geometry of the reflected one, which
    has the same singular values.

    Examples
    --------
    >>> from flax import nnx
    >>> model = nnx.Conv(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
    >>> (layer,) = conv_layers(model, jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"))
    >>> layer.path, layer.conv.stride, layer.input_shape
    ('kernel', (2, 2), (32, 32))
    """
    if isinstance(model, nnx.Module):
        return _nnx_layers(model, example_input, (*NNX_CONVOLUTIONS, *NNX_LINEAR) if linear else NNX_CONVOLUTIONS)
    if isinstance(model, linen.Module):
        return _linen_layers(
            model, example_input, (*LINEN_CONVOLUTIONS, *LINEN_LINEAR) if linear else LINEN_CONVOLUTIONS
        )
    raise TypeError(
        f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted a flax.nnx.Module or flax.linen.Module"
    )


def model_layers(model: nnx.Module | linen.Module, example_input: object) -> list[Layer]:
    """Return the convolutions with their kernels, as a report of the core takes them."""
    found = conv_layers(model, example_input)
    if isinstance(model, nnx.Module):
        modules = {_name(path): node for path, node in nnx.iter_graph(model) if isinstance(node, NNX_CONVOLUTIONS)}
        return [model_layer(layer, modules[layer.name].kernel[...]) for layer in found]
    if model.scope is None:
        raise ValueError(
            f"model is a {type(model).__qualname__} of flax.linen without its variables: wanted model.bind(variables)"
        )
    params = linen.meta.unbox(model.variables["params"])
    return [model_layer(layer, _at(params, layer.path.split("/"))) for layer in found]


# ---- nnx ---------------------------------------------------------------------------------------------------


def _nnx_layers(model: nnx.Module, example_input: object, kinds: Kinds) -> list[ConvLayer]:
    seen: dict[str, dict[Extents, None]] = {}
    if example_input is not None:
        graph, state = nnx.split(model)

        def call(state: object, *args: object, **kwargs: object) -> None:
            copy = nnx.merge(graph, state)
            copy.eval()
            for path, node in list(nnx.iter_graph(copy)):
                if isinstance(node, kinds):
                    _note_extents(node, seen.setdefault(_name(path), {}))
            copy(*args, **kwargs)

        trace(call, state, example_input)
    found = []
    for path, node in nnx.iter_graph(model):
        if isinstance(node, kinds):
            name = _name(path)
            extents = tuple(seen.get(name, ()))
            kernel_path = "/".join([*map(str, path), "kernel"])
            found.append(
                _conv_layer(name, kernel_path, node, tuple(node.kernel.shape), extents, example_input is not None)
            )
    return found


def _note_extents(module: nnx.Module, seen: dict[Extents, None]) -> None:
    """Let a copy of a user's module add the extents of its inputs to `seen` when it is called."""
    own = type(module)

    def noting(self: nnx.Module, inputs: jax.Array, *args: object, **kwargs: object) -> jax.Array:
        seen[_extents(self, inputs)] = None
        return own.__call__(self, inputs, *args, **kwargs)

    object.__setattr__(module, "__class__", type(own.__name__, (own,), {"__call__": noting}))


def _name(path: tuple[object, ...]) -> str:
    return "/".join(map(str, path)) or "."


# ---- linen -------------------------------------------------------------------------------------------------


def _linen_layers(model: linen.Module, example_input: object, kinds: Kinds) -> list[ConvLayer]:
    if example_input is None:
        raise ValueError(
            "example_input is None: wanted the arguments of the model, since the layers of a linen module are made in "
            "the call"
        )
    modules: dict[tuple[str, ...], linen.Module] = {}
    seen: dict[tuple[str, ...], dict[Extents, None]] = {}

    def note(following: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> object:
        module = context.module
        if isinstance(module, kinds) and context.method_name == "__call__":
            inputs = args[0] if args else kwargs["inputs"]
            modules.setdefault(module.path, module)
            seen.setdefault(module.path, {})[_extents(module, inputs)] = None
        return following(*args, **kwargs)

    unbound, variables = (model, None) if model.scope is None else model.unbind()
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}

    def call(variables: Any, *args: object, **kwargs: object) -> None:
        rngs = jax.random.key(0)
        with linen.intercept_methods(note):
            if variables is None:
                variables = unbound.init(rngs, *args, **kwargs)
            else:
                unbound.apply(variables, *args, rngs={"params": rngs}, mutable=True, **kwargs)
        params = linen.meta.unbox(variables["params"])
        shapes.update({path: tuple(_at(params, [*path, "kernel"]).shape) for path in modules})

    trace(call, variables, example_input)
    return [
        _conv_layer(_name(path), "/".join([*path, "kernel"]), module, shapes[path], tuple(seen[path]), True)
        for path, module in modules.items()
    ]


def _at(tree: Any, path: Iterable[str]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


# ---- the geometry ------------------------------------------------------------------------------------------


def _kernel_size(module: Any) -> Extents:
    return per_axis(module.kernel_size, 1) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)


def _extents(module: Any, inputs: jax.Array) -> Extents:
    """Return the extents of a layer's input: one pixel for a linear layer."""
    return (1,) if isinstance(module, LINEAR) else tuple(inputs.shape[-len(_kernel_size(module)) - 1 : -1])


def _conv_layer(
    name: str, path: str, module: Any, shape: tuple[int, ...], extents: tuple[Extents, ...], traced: bool
) -> ConvLayer:
    linear = isinstance(module, LINEAR)
    found = _linear_geometry(module, shape) if linear else _geometry(module, shape, extents)
    return make_traced_layer(
        module,
        "flax",
        found,
        name=name,
        path=path,
        kernel_shape=(1, *shape) if linear else shape,
        input_shapes=extents,
        traced=traced,
        linear=linear,
    )


def _linear_geometry(module: Any, shape: tuple[int, ...]) -> FoundConv:
    if isinstance(module, nnx.LinearGeneral | linen.DenseGeneral) or len(shape) != 2:
        return FoundConv(None, f"its kernel has the shape {shape}, and may map several axes: wanted a matrix")
    own = getattr(module, "dot_general", None)
    if own not in (None, jax.lax.dot_general) or getattr(module, "dot_general_cls", None):
        return FoundConv(None, "its product is a function of the user's")
    return linear_conv("WIO")


def _geometry(module: Any, shape: tuple[int, ...], extents: tuple[Extents, ...]) -> FoundConv:
    taps = _kernel_size(module)
    ndim = len(taps)
    if isinstance(module, linen.ConvLocal):
        return FoundConv(None, "its kernel differs from place to place")
    if ndim not in SPATIAL_LETTERS:
        return FoundConv(None, f"it has {ndim} spatial axes: wanted 1 to 3")
    if len(shape) != ndim + 2:
        return FoundConv(
            None, f"its kernel has the shape {shape}: wanted {ndim + 2} axes; nn.scan and nn.vmap stack kernels"
        )
    if module.mask is not None:
        return FoundConv(None, "a mask multiplies its kernel in the forward pass")
    stride, dilation = per_axis(module.strides, ndim), per_axis(module.kernel_dilation, ndim)
    if isinstance(module, linen.ConvTranspose | nnx.ConvTranspose):
        return _transposed(module, taps, stride, dilation)
    own = getattr(module, "conv_general_dilated", None)
    if (own is not None and own is not jax.lax.conv_general_dilated) or getattr(
        module, "conv_general_dilated_cls", None
    ):
        return FoundConv(None, "its convolution is a function of the user's")
    if set(per_axis(module.input_dilation, ndim)) != {1}:
        return FoundConv(None, f"its input is dilated by {per_axis(module.input_dilation, ndim)}")
    mode = "zeros"
    padding: Any = module.padding
    spans = [d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        mode = padding.lower()
        padding = tuple(((span - 1) // 2, span // 2) for span in spans)
    elif padding == "CAUSAL":
        padding = tuple((span - 1, 0) for span in spans)
    elif not isinstance(padding, str):
        padding = _pairs(padding, ndim)
    return make_conv(
        f"{SPATIAL_LETTERS[ndim]}IO",
        taps,
        stride=stride,
        dilation=dilation,
        groups=module.feature_group_count,
        padding=padding,
        padding_mode=mode,
        input_shapes=extents,
    )


def _transposed(module: Any, taps: Extents, stride: Extents, dilation: Extents) -> FoundConv:
    ndim = len(taps)
    adjoint = module.transpose_kernel
    layout = f"{SPATIAL_LETTERS[ndim]}{'OI' if adjoint else 'IO'}"
    if module.padding == "CIRCULAR":
        return FoundConv(Conv(layout, stride=stride, dilation=dilation, transposed=True))
    sides: Any = module.padding
    if isinstance(sides, str):
        sides = tuple(
            _transposed_sides(d * (k - 1) + 1, s, sides) for k, d, s in zip(taps, dilation, stride, strict=True)
        )
    else:
        sides = _pairs(sides, ndim)
    return make_transposed_conv(layout, taps, stride=stride, dilation=dilation, groups=1, sides=sides, adjoint=adjoint)


def _transposed_sides(span: int, stride: int, padding: str) -> tuple[int, int]:
    """Return the elements that `jax.lax.conv_transpose` adds before and after, for "SAME" and "VALID"."""
    if padding.upper() == "SAME":
        total = span + stride - 2
        before = span - 1 if stride > span - 1 else -(-total // 2)
    else:
        total = span + stride - 2 + max(span - stride, 0)
        before = span - 1
    return before, total - before


def _pairs(padding: Any, ndim: int) -> tuple[tuple[int, int], ...]:
    """Return flax's padding, which is ints or pairs, as one pair for each axis."""
    sides = (padding,) * ndim if isinstance(padding, int) else tuple(padding)
    return tuple((int(side), int(side)) if isinstance(side, int) else (int(side[0]), int(side[1])) for side in sides)
