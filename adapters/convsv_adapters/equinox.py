"""The convolutions of equinox models: their geometry, and the extents that tracing shows.

>>> model = eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=jax.random.key(0))
>>> (layer,) = conv_layers(model, jax.ShapeDtypeStruct((3, 32, 32), model.weight.dtype))
>>> layer.path, layer.conv.layout, layer.conv.stride, layer.input_shape
('weight', 'OIHW', (2, 2), (32, 32))

`convsv_adapters.optax` bounds and penalises them in training.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

import convsv_core
from convsv_adapters._jax.geometry import LAYOUTS, USERS_CLASS, make_conv, make_transposed_conv
from convsv_adapters._jax.tracing import trace
from convsv_adapters._jax.trees import ConvLayer, joined, model_layer
from convsv_adapters._operators import Extents
from convsv_core import Conv
from convsv_core.analysis import LayerReport
from convsv_core.layers import Layer

__all__ = ["ConvLayer", "analyze", "conv_layers"]

CONVOLUTIONS = (eqx.nn.Conv, eqx.nn.ConvTranspose)
REPARAMETRISED = (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)
MODES = {"ZEROS": "zeros", "CIRCULAR": "circular", "REFLECT": "reflect", "REPLICATE": "replicate"}


def conv_layers(model: eqx.Module, example_input: object = None) -> list[ConvLayer]:
    """Find every convolution of an equinox model, with its geometry and the true extents of its inputs.

    Parameters
    ----------
    model : equinox.Module
    example_input : array, jax.ShapeDtypeStruct, tuple, list or mapping, optional
        What the model is called with, as a rule one example without the axis of a batch: an argument, positional
        arguments or keyword arguments. The model is not run: shapes are traced, in inference mode.

    Returns
    -------
    list of ConvLayer
        In the order of the tree. `path` is that of the weight among the leaves of `model`, or of
        ``equinox.filter(model, equinox.is_array)``.

    Raises
    ------
    TypeError
        `model` is no equinox module.

    Notes
    -----
    Weights that `WeightNorm` or `SpectralNorm` compute in the forward pass, and transposed convolutions in groups of
    several channels, are reported with a note in place of the geometry. A transposed convolution stands for the
    reflected one, which has the same singular values: equinox does not flip its taps.

    Examples
    --------
    >>> keys = jax.random.split(jax.random.key(0))
    >>> model = eqx.nn.Sequential([eqx.nn.Conv2d(3, 8, 3, key=keys[0]), eqx.nn.Conv2d(8, 8, 3, key=keys[1])])
    >>> [(layer.path, layer.input_shape) for layer in conv_layers(model, jax.numpy.zeros((3, 32, 32)))]
    [('layers/0/weight', (32, 32)), ('layers/1/weight', (30, 30))]
    """
    if not isinstance(model, eqx.Module):
        raise TypeError(f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted an equinox.Module")
    modules = _modules(model)
    seen: dict[str, dict[Extents, None]] = {name: {} for name in modules}
    if example_input is not None:

        def call(model: eqx.Module, *args: object, **kwargs: object) -> None:
            _noting(eqx.nn.inference_mode(model), seen)(*args, **kwargs)

        trace(call, model, example_input)
    found = []
    for name, (module, computed) in modules.items():
        extents = tuple(seen[name])
        note = "" if example_input is None or extents else "not reached by the traced call"
        users = "" if type(module).__module__.startswith("equinox.") else USERS_CLASS
        conv, why = (None, computed) if computed else _geometry(module, extents)
        path = "weight" if name == "." else f"{name}/weight"
        shape = tuple(module.weight.shape)
        found.append(ConvLayer(name, path, shape, conv, extents, joined(note, users, why)))
    return found


def analyze(model: eqx.Module, example_input: object = None, **options: Any) -> list[LayerReport]:
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


def model_layers(model: eqx.Module, example_input: object) -> list[Layer]:
    """The convolutions with their kernels, as a report of the core takes them."""
    modules = _modules(model)
    return [model_layer(layer, modules[layer.name][0].weight) for layer in conv_layers(model, example_input)]


def _is_convolution(node: object) -> bool:
    return isinstance(node, CONVOLUTIONS)


def _modules(model: eqx.Module) -> dict[str, tuple[Any, str]]:
    """Every convolution by its path, and why its weight is not what it convolves with, or ""."""

    def find(root: object, above: str, computed: str) -> dict[str, tuple[Any, str]]:
        found: dict[str, tuple[Any, str]] = {}
        inner = (*REPARAMETRISED, *CONVOLUTIONS)
        nodes = jax.tree_util.tree_flatten_with_path(
            root, is_leaf=lambda node: isinstance(node, inner) and (node is not root or _is_convolution(node))
        )[0]
        for keys, node in nodes:
            path = "/".join(filter(None, [above, jax.tree_util.keystr(keys, simple=True, separator="/")]))
            if _is_convolution(node):
                found[path or "."] = node, computed
            elif isinstance(node, REPARAMETRISED):
                found |= find(node, path, f"its weight is computed in the forward pass by {type(node).__name__}")
        return found

    if isinstance(model, REPARAMETRISED):
        return find(model, "", f"its weight is computed in the forward pass by {type(model).__name__}")
    return find(model, "", "")


def _noting(model: eqx.Module, seen: dict[str, dict[Extents, None]]) -> Any:
    """A copy of a model whose convolutions note the extents of each input."""

    def replaced(keys: Any, node: Any) -> Any:
        name = jax.tree_util.keystr(keys, simple=True, separator="/") or "."
        return _noting_copy(node, seen[name]) if _is_convolution(node) else node

    return jax.tree_util.tree_map_with_path(replaced, model, is_leaf=_is_convolution)


def _noting_copy(module: Any, seen: dict[Extents, None]) -> Any:
    own = type(module)

    def noting(self: Any, x: jax.Array, **kwargs: object) -> jax.Array:
        seen[tuple(x.shape[1:])] = None
        return own.__call__(self, x, **kwargs)

    copy: Any = object.__new__(type(own.__name__, (own,), {"__call__": noting}))
    for name, value in vars(module).items():
        object.__setattr__(copy, name, value)
    return copy


def _geometry(module: Any, extents: tuple[Extents, ...]) -> tuple[Conv | None, str]:
    """What the module does as a `Conv`, or None; and a note."""
    taps, ndim = module.kernel_size, module.num_spatial_dims
    if ndim not in LAYOUTS:
        return None, f"it has {ndim} spatial axes: wanted 1 to 3"
    layout = f"OI{LAYOUTS[ndim]}"
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


def _transposed(module: Any, layout: str) -> tuple[Conv | None, str]:
    if module.groups > 1:
        if tuple(module.weight.shape[:2]) != (module.groups, 1):
            return None, "it is transposed, in groups of several channels"
        layout = f"IO{layout[2:]}"  # one channel a group: the axes of input and output are alike
    geometry = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    if module.padding_mode == "CIRCULAR":
        return Conv(layout, transposed=True, **geometry), ""
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
