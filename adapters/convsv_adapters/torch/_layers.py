"""The layers of a PyTorch module: their geometry, and the extents of their inputs in one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from convsv_adapters._layers import ConvLayer, make_layer, one_tap_conv, with_normalisation
from convsv_adapters.torch._folding import Following, FollowingWatch, KernelParts, is_batch_norm, kernel_of
from convsv_adapters.torch._forward import run_forward
from convsv_core import Conv
from convsv_core.conv import SPATIAL_LETTERS, transposed_conv
from convsv_core.layers import Extents

__all__ = [
    "COMPUTED_IN_FORWARD",
    "CONVOLUTIONS",
    "BatchNormMode",
    "conv_layers",
    "convolutions",
    "found_layers",
    "has_torch_forward",
    "kernel_parts",
    "listed_modules",
    "renewed_layers",
    "unwrapped",
    "without_autocast",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""The modules that are found, and their subclasses."""

BatchNormMode = Literal["fold"]
"""The ways in which `conv_layers` lists batch normalisations."""

COMPUTED_IN_FORWARD = "its weight is computed by a hook before each forward pass"
"""The words for `ConvLayer.computed_in_forward` in notes and errors."""


def conv_layers(
    model: nn.Module, example_input: object = None, *, linear: bool = False, batch_norm: BatchNormMode | None = None
) -> list[ConvLayer]:
    """Find every convolution of a model, with its geometry and the true extents of its inputs.

    Parameters
    ----------
    model : torch.nn.Module
        `Conv1d`, `Conv2d`, `Conv3d` and the transposed classes are found at any depth, with parametrised and lazy
        modules and subclasses. The model may be wrapped by `DistributedDataParallel`, `DataParallel` or
        `torch.compile`.
    example_input : tensor, tuple, list or mapping, optional
        The argument of the model, its positional arguments or its keyword arguments. The model is called once, in
        evaluation mode and without gradients. Training modes, buffers and PyTorch's random state are restored, and
        no hook is left behind. The call initialises lazy modules.
    linear : bool, default False
        List `Linear` modules too, as convolutions with one tap on an extent of one pixel.
    batch_norm : "fold", optional
        List batch normalisations too, as what they do in evaluation mode: they multiply each channel by its scale, from
        their weight and their running variance. A layer whose output a normalisation takes directly is listed with its
        `normalisation`, and its `kernel` is the one of both. It is listed without one too if anything else uses its
        output. A normalisation that takes anything else than a layer's output stands alone: its own kernel has one tap,
        and a group for each channel. Needs an `example_input`.

    Returns
    -------
    list of ConvLayer
        In the order of `named_modules`. A module that is used at several places is one layer; with several
        normalisations behind it, it is one for each of them.

    Raises
    ------
    TypeError
        `model` is not a module.
    ValueError
        A lazy module has no weight yet, and there is no `example_input` to give it one. Or `batch_norm` has another
        value, there is no `example_input`, the call does not reach a normalisation, a normalisation keeps no running
        statistics, or the model normalises by a function with tensors that are not those of one module.

    Notes
    -----
    Which layer a normalisation follows is found in the call, from the tensors that the functions of PyTorch take and
    return. So the call has to take the path that training takes.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> for layer in conv_layers(model, torch.zeros(1, 3, 32, 32)):
    ...     print(layer.name, tuple(layer.weight.shape), layer.conv.stride, layer.input_shape)
    0 (8, 3, 3, 3) (2, 2) (32, 32)
    2 (8, 8, 3, 3) (1, 1) (16, 16)

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> for layer in conv_layers(model, torch.zeros(1, 3, 3, 3), linear=True, batch_norm="fold"):
    ...     print(layer.name, layer.kernel_shape, layer.normalisation is model[1])
    0 (8, 3, 3, 3) True
    3 (2, 8, 1) False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted a torch.nn.Module")
    if batch_norm not in (None, "fold"):
        raise ValueError(f"batch_norm={batch_norm!r}: wanted 'fold' or None")
    found = listed_modules(model, linear=linear, batch_norm=batch_norm)
    watch = None if batch_norm is None else FollowingWatch([one for one in found.values() if is_batch_norm(one)])
    if watch is not None:
        _check_statistics(found, example_input)
    layers = found_layers(model, found, example_input, watch)
    if watch is None:
        return list(layers.values())
    return list(_with_normalisations(found, layers, watch.result()))


def found_layers(
    model: nn.Module, found: Mapping[str, nn.Module], example_input: object, watch: FollowingWatch | None
) -> dict[nn.Module, ConvLayer]:
    """Return the layers of a model by their modules, after a forward pass if there is an input for it.

    Parameters
    ----------
    model : torch.nn.Module
    found : mapping from str to torch.nn.Module
        The modules of the layers and of normalisations, from `listed_modules`.
    example_input : object
        As for `conv_layers`.
    watch : FollowingWatch or None
        It sees the forward pass.
    """
    seen: dict[nn.Module, dict[Extents, Extents]] = {}
    listed = {module: name for name, module in found.items() if not is_batch_norm(module)}
    if example_input is not None:
        run_forward(unwrapped(model), example_input, listed, seen, watch)
    return {
        module: _conv_layer(name, module, seen.get(module, {}), reached=example_input is None or module in seen)
        for module, name in listed.items()
    }


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that are convolutions, by name, inside of wrappers."""
    return listed_modules(model, linear=False, batch_norm=None)


def listed_modules(model: nn.Module, *, linear: bool, batch_norm: BatchNormMode | None) -> dict[str, nn.Module]:
    """Return the modules of a model that `conv_layers` lists, by name, inside of wrappers."""
    kinds = (*CONVOLUTIONS, nn.Linear) if linear else CONVOLUTIONS
    return {
        name: one
        for name, one in unwrapped(model).named_modules()
        if isinstance(one, kinds) or (batch_norm is not None and is_batch_norm(one))
    }


def renewed_layers(
    model: nn.Module,
    layers: list[ConvLayer],
    before: dict[str, nn.Module],
    *,
    every: bool,
    linear: bool,
    batch_norm: BatchNormMode | None,
) -> list[ConvLayer]:
    """Return the layers of a model some of whose modules have been replaced, with what was known of them by name.

    Parameters
    ----------
    model : torch.nn.Module
    layers : list of ConvLayer
        The layers that were known.
    before : dict of str to torch.nn.Module
        The modules of the model, by `listed_modules`, when the layers were found.
    every : bool
        Whether layers with new names are returned too.
    linear, batch_norm
        As for `conv_layers`.

    Raises
    ------
    ValueError
        `batch_norm` is "fold", and there are other names: it is not known which layers normalisations follow now.
    """
    plain = {layer.name: layer for layer in conv_layers(model, linear=linear)}
    if batch_norm is None:
        known = {layer.name: layer for layer in layers}
        return [
            dataclasses.replace(layer, input_shapes=known[name].input_shapes) if name in known else layer
            for name, layer in plain.items()
            if name in known or every
        ]
    modules = listed_modules(model, linear=linear, batch_norm=batch_norm)
    if other := sorted(modules.keys() ^ before.keys()):
        raise ValueError(
            f"the layer {other[0]!r} is new or missing, and batch_norm='fold' finds the layers that normalisations "
            f"follow from an example_input: wanted a new projection of the model"
        )
    names = {module: name for name, module in before.items()}
    found = []
    for layer in layers:
        if layer.normalisation is layer.module and layer.module is not None:
            found.append(_lone_normalisation(layer.name, modules[layer.name]))
            continue
        norm = None if layer.normalisation is None else modules[names[layer.normalisation]]
        found.append(dataclasses.replace(plain[layer.name], input_shapes=layer.input_shapes, normalisation=norm))
    return found


def without_autocast(weight: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context manager that switches `torch.autocast` off for the device of `weight`."""
    kind = weight.device.type
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()  # A backward pass asks for each layer, and `torch.autocast` takes longer.


# ---- the geometry ------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of wrappers that replicate it over devices or compile it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _conv_layer(name: str, module: nn.Module, seen: dict[Extents, Extents], *, reached: bool) -> ConvLayer:
    """Return the layer of a module, from the extents of its inputs and of the output for each of them."""
    if "weight" in module._parameters and is_lazy(module._parameters["weight"]):
        raise ValueError(
            f"the layer {name!r} is a {type(module).__name__} without a weight: wanted an example_input that "
            f"reaches it, or a forward pass before this call"
        )
    computed = _is_computed_in_forward(module)
    return make_layer(
        COMPUTED_IN_FORWARD if computed else "",
        name=name,
        kernel_shape=_kernel_shape(module),
        conv=_conv(module, seen),
        input_shapes=((1,),) if isinstance(module, nn.Linear) else tuple(seen),
        module=module,
        linear=isinstance(module, nn.Linear),
        reached=reached,
        computed_in_forward=computed,
        unknown_forward=not has_torch_forward(module),
        read=_weight,
    )


def _conv(module: nn.Module, seen: dict[Extents, Extents]) -> Conv:
    if isinstance(module, nn.Linear):
        return one_tap_conv("OIW")
    letters = SPATIAL_LETTERS[len(module.kernel_size)]
    options: dict[str, Any] = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    if not module.transposed:
        return Conv(f"OI{letters}", padding=module.padding, padding_mode=module.padding_mode, **options)
    pads = [(p, p - extra) for p, extra in zip(module.padding, _output_padding(module, seen), strict=True)]
    return transposed_conv(f"IO{letters}", module.kernel_size, pads, **options)


def kernel_parts(layer: ConvLayer) -> KernelParts:
    """Return the tensors from which the kernel of a layer is made; a parametrised weight is computed."""
    norm, weight = layer.normalisation, layer.module.weight
    if norm is None:
        return KernelParts(weight, linear=layer.linear)
    alone = layer.module is norm
    return KernelParts(None if alone else weight, norm.weight, norm.running_var, norm.eps, layer.linear)


def _weight(layer: ConvLayer) -> torch.Tensor:
    """Return the kernel of a layer, or of a layer and its normalisation."""
    return kernel_of(kernel_parts(layer), layer.conv)


def _with_normalisations(
    found: dict[str, nn.Module], layers: dict[nn.Module, ConvLayer], following: Following
) -> Iterator[ConvLayer]:
    """Yield the layers of a model and its normalisations, each layer once for each normalisation that follows it."""
    if following.strange:
        raise ValueError(
            "model calls batch_norm with tensors that are not those of one torch.nn.BatchNorm module: wanted such a "
            "module, or batch_norm=None"
        )
    for name, module in found.items():
        if is_batch_norm(module):
            if module not in following.reached:
                raise ValueError(
                    f"the normalisation {name!r} was not reached by the forward pass, so it is not known which layer "
                    f"it follows: wanted an example_input that reaches it, or batch_norm=None"
                )
            if module in following.alone:
                yield _lone_normalisation(name, module)
            continue
        if module in following.bare or not any(layer is module for layer, _ in following.pairs):
            yield layers[module]
        for norm in found.values():
            if (module, norm) in following.pairs:
                yield with_normalisation(layers[module], norm, unknown_forward=not has_torch_forward(norm))


def _lone_normalisation(name: str, module: nn.Module) -> ConvLayer:
    """Return a normalisation that follows no layer, as a convolution of each channel by itself."""
    return make_layer(
        name=name,
        kernel_shape=(module.num_features, 1, 1),
        conv=one_tap_conv("OIW", module.num_features),
        input_shapes=((1,),),
        module=module,
        normalisation=module,
        unknown_forward=not has_torch_forward(module),
        read=_weight,
    )


def _check_statistics(found: dict[str, nn.Module], example_input: object) -> None:
    """Raise ValueError unless every normalisation keeps running statistics, and there is an input to find its layer."""
    for name, module in found.items():
        if not is_batch_norm(module):
            continue
        if module.running_var is None:
            raise ValueError(
                f"the normalisation {name!r} keeps no running statistics, so its scale depends on the batch in "
                f"evaluation mode too: wanted track_running_stats=True, or batch_norm=None"
            )
        if example_input is None:
            raise ValueError(
                f"batch_norm='fold' needs an example_input, to find the layer that {name!r} and other normalisations "
                f"follow"
            )


def _kernel_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a module's weight, without computing a parametrised weight."""
    if (parameter := module._parameters.get("weight")) is not None:
        return (*parameter.shape, 1) if isinstance(module, nn.Linear) else tuple(parameter.shape)
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features, 1)
    whole, grouped = module.out_channels, module.in_channels
    if module.transposed:
        whole, grouped = grouped, whole
    return (whole, grouped // module.groups, *module.kernel_size)


def has_torch_forward(module: nn.Module) -> bool:
    """Return whether the module uses weight and padding as PyTorch's own class does."""
    if is_batch_norm(module):
        return type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    kind = next(kind for kind in (*CONVOLUTIONS, nn.Linear) if isinstance(module, kind))
    own = type(module)
    return own.forward is kind.forward and getattr(own, "_conv_forward", None) is getattr(kind, "_conv_forward", None)


def _is_computed_in_forward(module: nn.Module) -> bool:
    """Return whether a hook computes the weight, as the older `weight_norm` and `spectral_norm` do."""
    return "weight" not in module._parameters and not nn.utils.parametrize.is_parametrized(module, "weight")


def _output_padding(module: nn.Module, seen: dict[Extents, Extents]) -> tuple[int, ...]:
    """Return the output padding of the first call, which an `output_size` can change, or else the module's own."""
    for extents, outputs in seen.items():
        geometry = zip(
            extents, outputs, module.stride, module.padding, module.dilation, module.kernel_size, strict=True
        )
        return tuple(out - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for n, out, s, p, d, k in geometry)
    return tuple(module.output_padding)
