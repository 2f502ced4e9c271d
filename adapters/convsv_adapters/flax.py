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
from typing import Any

import jax
from flax import linen, nnx

from convsv_adapters._jax.geometry import FoundConv, make_conv, make_traced_layer, make_transposed_conv, per_axis
from convsv_adapters._jax.tracing import trace
from convsv_adapters._layers import ConvLayer, model_layer
from convsv_core import Conv, analyze
from convsv_core.conv import SPATIAL_LETTERS
from convsv_core.layers import Extents, Layer

__all__ = ["ConvLayer", "analyze", "conv_layers"]

NNX_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)
LINEN_CONVOLUTIONS = (linen.Conv, linen.ConvTranspose, linen.ConvLocal)


def conv_layers(model: nnx.Module | linen.Module, example_input: object = None) -> list[ConvLayer]:
    """Find every convolution of a flax model, with its geometry and the true extents of its inputs.

    Parameters
    ----------
    model : flax.nnx.Module or flax.linen.Module
        A linen module may be bound to variables, as by ``model.bind(variables)``. Otherwise the shapes are those that
        its `init` makes.
    example_input : array, jax.ShapeDtypeStruct, tuple, list or mapping, optional
        The argument of the model, its positional arguments or its keyword arguments. The model is not run: its shapes
        are traced, an nnx model's in evaluation mode. A linen module needs it, since its layers are made in the call.

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
        return _nnx_layers(model, example_input)
    if isinstance(model, linen.Module):
        return _linen_layers(model, example_input)
    raise TypeError(
        f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted a flax.nnx.Module or flax.linen.Module"
    )


def model_layers(model: nnx.Module | linen.Module, example_input: object, linear: bool = False) -> list[Layer]:
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


def _nnx_layers(model: nnx.Module, example_input: object) -> list[ConvLayer]:
    seen: dict[str, dict[Extents, None]] = {}
    if example_input is not None:
        graph, state = nnx.split(model)

        def call(state: object, *args: object, **kwargs: object) -> None:
            copy = nnx.merge(graph, state)
            copy.eval()
            for path, node in list(nnx.iter_graph(copy)):
                if isinstance(node, NNX_CONVOLUTIONS):
                    _note_extents(node, seen.setdefault(_name(path), {}))
            copy(*args, **kwargs)

        trace(call, state, example_input)
    found = []
    for path, node in nnx.iter_graph(model):
        if isinstance(node, NNX_CONVOLUTIONS):
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
    ndim = len(module.kernel_size)

    def noting(self: nnx.Module, inputs: jax.Array, *args: object, **kwargs: object) -> jax.Array:
        seen[tuple(inputs.shape[-ndim - 1 : -1])] = None
        return own.__call__(self, inputs, *args, **kwargs)

    object.__setattr__(module, "__class__", type(own.__name__, (own,), {"__call__": noting}))


def _name(path: tuple[object, ...]) -> str:
    return "/".join(map(str, path)) or "."


# ---- linen -------------------------------------------------------------------------------------------------


def _linen_layers(model: linen.Module, example_input: object) -> list[ConvLayer]:
    if example_input is None:
        raise ValueError(
            "example_input is None: wanted the arguments of the model, since the layers of a linen module are made in "
            "the call"
        )
    modules: dict[tuple[str, ...], linen.Module] = {}
    seen: dict[tuple[str, ...], dict[Extents, None]] = {}

    def note(following: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> object:
        module = context.module
        if isinstance(module, LINEN_CONVOLUTIONS) and context.method_name == "__call__":
            inputs = args[0] if args else kwargs["inputs"]
            ndim = len(_kernel_size(module))
            modules.setdefault(module.path, module)
            seen.setdefault(module.path, {})[tuple(inputs.shape[-ndim - 1 : -1])] = None
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


def _conv_layer(
    name: str, path: str, module: Any, shape: tuple[int, ...], extents: tuple[Extents, ...], traced: bool
) -> ConvLayer:
    found = _geometry(module, shape, extents)
    return make_traced_layer(
        module, "flax", found, name=name, path=path, kernel_shape=shape, input_shapes=extents, traced=traced
    )


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
