"""The convolutions of equinox models: their geometry, and the extents of their inputs.

>>> model = eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=jax.random.key(0))
>>> (layer,) = conv_layers(model, jax.ShapeDtypeStruct((3, 32, 32), model.weight.dtype))
>>> layer.path, layer.conv.layout, layer.conv.stride, layer.input_shape
('weight', 'OIHW', (2, 2), (32, 32))

`convsv_adapters.optax` bounds and penalises them in training.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax

from convsv_adapters._jax.batch_norm import check_batch_norm, normalised_layers
from convsv_adapters._jax.equinox_batch_norm import equinox_normalisations, with_forward
from convsv_adapters._jax.geometry import (
    COMPUTED_BY,
    FoundConv,
    computed_layer,
    linear_conv,
    make_conv,
    make_traced_layer,
    make_transposed_conv,
)
from convsv_adapters._jax.tracing import evaluate, trace
from convsv_adapters._layers import ConvLayer, model_layer
from convsv_core import Conv, analyze
from convsv_core.conv import SPATIAL_LETTERS
from convsv_core.layers import Extents, Layer

__all__ = ["ConvLayer", "analyze", "conv_layers"]

CONVOLUTIONS = (eqx.nn.Conv, eqx.nn.ConvTranspose)
"""The modules that are found, and their subclasses."""

REPARAMETRISED = (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)
"""The modules that compute the weight of a module inside of them."""

MODES = {"ZEROS": "zeros", "CIRCULAR": "circular", "REFLECT": "reflect", "REPLICATE": "replicate"}
"""The padding modes of `Conv`, by their names in equinox."""


def conv_layers(
    model: eqx.Module,
    example_input: object = None,
    *,
    linear: bool = False,
    batch_norm: Literal["fold"] | None = None,
) -> list[ConvLayer]:
    """Find every convolution of an equinox model, with its geometry and the true extents of its inputs.

    Parameters
    ----------
    model : equinox.Module
    example_input : array, jax.ShapeDtypeStruct, tuple, list or mapping, optional
        The argument of the model, its positional arguments or its keyword arguments; as a rule one example without the
        axis of a batch. The model is not run: its shapes are traced, in inference mode.
    linear : bool, default False
        List `Linear` modules too, as convolutions with one tap on an extent of one pixel.
    batch_norm : "fold", optional
        List batch normalisations too, as what they do in inference mode. A layer whose output a `BatchNorm` takes
        directly is listed with its `normalisation`, and stands for both. It is listed without one too if anything else
        uses its output. A normalisation that takes anything else stands alone. Needs an `example_input` with the
        model's `State`, such as ``(image, state)``.

    Returns
    -------
    list of ConvLayer
        In the order of the tree. `path` is the path of the weight among the leaves of `model`, or of
        ``equinox.filter(model, equinox.is_array)``.

    Raises
    ------
    TypeError
        `model` is not an equinox module.
    ValueError
        `batch_norm` has another value, or is given without an `example_input` that holds the state, or the call does
        not reach a normalisation, or one has no factors.

    Notes
    -----
    Weights that `WeightNorm` or `SpectralNorm` compute in the forward pass, and transposed convolutions in groups of
    several channels, have no geometry; `note` says why. A transposed convolution gets the geometry of the reflected
    one, which has the same singular values: equinox does not flip its taps.

    Examples
    --------
    >>> keys = jax.random.split(jax.random.key(0))
    >>> model = eqx.nn.Sequential([eqx.nn.Conv2d(3, 8, 3, key=keys[0]), eqx.nn.Conv2d(8, 8, 3, key=keys[1])])
    >>> [(layer.path, layer.input_shape) for layer in conv_layers(model, jax.numpy.zeros((3, 32, 32)))]
    [('layers/0/weight', (32, 32)), ('layers/1/weight', (30, 30))]
    """
    if not isinstance(model, eqx.Module):
        raise TypeError(f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted an equinox.Module")
    check_batch_norm(batch_norm, example_input)
    kinds = (*CONVOLUTIONS, eqx.nn.Linear) if linear else CONVOLUTIONS
    modules = _modules(model, kinds)
    seen: dict[str, dict[Extents, None]] = {name: {} for name in modules}
    if example_input is not None:

        def call(model: eqx.Module, *args: object, **kwargs: object) -> None:
            _noting(eqx.nn.inference_mode(model), seen, kinds)(*args, **kwargs)

        trace(call, model, example_input)
    layers = [
        make_traced_layer(
            found.module,
            "equinox",
            _geometry(found, tuple(seen[name])),
            name=name,
            path="weight" if name == "." else f"{name}/weight",
            kernel_shape=_kernel_shape(found.module),
            input_shapes=tuple(seen[name]),
            traced=example_input is not None,
            computed=bool(found.computed_by),
            linear=isinstance(found.module, eqx.nn.Linear),
        )
        for name, found in modules.items()
    ]
    if batch_norm is None:
        return layers
    return normalised_layers(layers, *equinox_normalisations(model, example_input, kinds))


def model_layers(model: eqx.Module, example_input: object, linear: bool = False) -> list[Layer]:
    """Return the convolutions with their weights, as a report of the core takes them.

    A weight that `WeightNorm` or `SpectralNorm` computes is the one that the layer uses in the call, if there is an
    `example_input`. With `linear` the `Linear` layers are among the rows.
    """
    kinds = (*CONVOLUTIONS, eqx.nn.Linear) if linear else CONVOLUTIONS
    modules = _modules(model, kinds)
    layers = conv_layers(model, example_input, linear=linear)
    used: dict[str, list[jax.Array]] = {}
    if example_input is not None and any(layer.computed_in_forward and not layer.linear for layer in layers):

        def call(model: eqx.Module, *args: object, **kwargs: object) -> dict[str, list[jax.Array]]:
            kernels: dict[str, list[jax.Array]] = {name: [] for name in modules}
            _noting(eqx.nn.inference_mode(model), {name: {} for name in modules}, kinds, kernels)(*args, **kwargs)
            return kernels

        used = evaluate(call, model, example_input)
    rows = []
    for layer in layers:
        found = modules[layer.name]
        if layer.linear:
            rows.append(model_layer(layer, None if layer.conv is None else found.module.weight[..., None]))
        elif layer.computed_in_forward:
            plain = _geometry(found._replace(computed_by=""), layer.input_shapes)
            rows.append(computed_layer(layer, plain, used.get(layer.name, []), found.computed_by))
        else:
            rows.append(model_layer(layer, found.module.weight))
    return rows


def _kernel_shape(module: Any) -> tuple[int, ...]:
    shape = tuple(module.weight.shape)
    return (*shape, 1) if isinstance(module, eqx.nn.Linear) else shape


class Found(NamedTuple):
    """A layer of a model, and the class of the module that computes its weight in the forward pass, or ""."""

    module: Any
    computed_by: str


def _modules(model: eqx.Module, kinds: tuple[type, ...]) -> dict[str, Found]:
    """Return every layer of the given classes in a model, by its path."""

    def find(root: object, above: str, computed_by: str) -> dict[str, Found]:
        found: dict[str, Found] = {}
        inner = (*REPARAMETRISED, *kinds)
        nodes = jax.tree_util.tree_flatten_with_path(
            root, is_leaf=lambda node: isinstance(node, inner) and (node is not root or isinstance(node, kinds))
        )[0]
        for keys, node in nodes:
            path = "/".join(filter(None, [above, jax.tree_util.keystr(keys, simple=True, separator="/")]))
            if isinstance(node, kinds):
                found[path or "."] = Found(node, computed_by)
            elif isinstance(node, REPARAMETRISED):
                found |= find(node, path, type(node).__name__)
        return found

    return find(model, "", type(model).__name__ if isinstance(model, REPARAMETRISED) else "")


def _noting(
    model: eqx.Module,
    seen: dict[str, dict[Extents, None]],
    kinds: tuple[type, ...],
    kernels: dict[str, list[jax.Array]] | None = None,
) -> Any:
    """Return a copy of a model whose layers note their calls.

    They add the extents of their inputs to `seen`, and their weights to `kernels`.
    """

    def replaced(keys: Any, node: Any) -> Any:
        name = jax.tree_util.keystr(keys, simple=True, separator="/") or "."
        return _noting_copy(node, seen[name], (kernels or {}).get(name, [])) if isinstance(node, kinds) else node

    return jax.tree_util.tree_map_with_path(replaced, model, is_leaf=lambda node: isinstance(node, kinds))


def _noting_copy(module: Any, seen: dict[Extents, None], kernels: list[jax.Array]) -> Any:
    own = type(module)

    def noting(self: Any, x: jax.Array, **kwargs: object) -> jax.Array:
        seen[tuple(x.shape[1:])] = None  # of a linear layer it says only that there was a call
        kernels.append(self.weight)
        return own.__call__(self, x, **kwargs)

    return with_forward(module, noting)


def _geometry(found: Found, extents: tuple[Extents, ...]) -> FoundConv:
    module = found.module
    if found.computed_by:
        return FoundConv(None, COMPUTED_BY.format(found.computed_by))
    if isinstance(module, eqx.nn.Linear):
        return linear_conv("OIW")
    taps, ndim = module.kernel_size, module.num_spatial_dims
    if ndim not in SPATIAL_LETTERS:
        return FoundConv(None, f"it has {ndim} spatial axes: wanted 1 to 3")
    layout = f"OI{SPATIAL_LETTERS[ndim]}"
    if isinstance(module, eqx.nn.ConvTranspose):
        return _transposed(module, layout)
    return make_conv(
        layout,
        taps,
        stride=module.stride,
        dilation=module.dilation,
        groups=module.groups,
        padding=module.padding,
        padding_mode=MODES[module.padding_mode],
        input_shapes=extents,
    )


def _transposed(module: Any, layout: str) -> FoundConv:
    if module.groups > 1:
        if tuple(module.weight.shape[:2]) != (module.groups, 1):
            return FoundConv(None, "it is transposed, in groups of several channels")
        layout = f"IO{layout[2:]}"  # with one channel in each group, the axes of input and output have the same roles
    geometry = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    if module.padding_mode == "CIRCULAR":
        return FoundConv(Conv(layout, transposed=True, **geometry))
    sides = []
    for axis, (k, s, d, extra) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, module.output_padding, strict=True)
    ):
        reach = d * (k - 1)
        if module.padding == "VALID":
            before, after = 0, 0
        elif isinstance(module.padding, str):
            total = max(reach - s + extra + 1, 0)
            before = (total + (module.padding == "SAME_LOWER")) // 2
            after, extra = total - before, max(-(reach - s + extra + 1), 0)
        else:
            before, after = module.padding[axis]
        sides.append((reach - before, reach - after + extra))
    return make_transposed_conv(layout, module.kernel_size, sides=tuple(sides), **geometry)
