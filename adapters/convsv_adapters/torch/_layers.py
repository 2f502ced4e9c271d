"""The convolutions of a PyTorch module: their geometry, and the extents of their inputs in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from convsv_adapters._layers import ConvLayer, call_arguments, make_layer, model_layer
from convsv_core import Conv
from convsv_core.conv import SPATIAL_LETTERS, transposed_conv
from convsv_core.layers import Extents, Layer

__all__ = [
    "COMPUTED_IN_FORWARD",
    "CONVOLUTIONS",
    "conv_layers",
    "convolutions",
    "model_layers",
    "restored",
    "without_autocast",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""The modules that are found, and their subclasses."""

COMPUTED_IN_FORWARD = "its weight is computed by a hook before each forward pass"
"""The words for `ConvLayer.computed_in_forward` in notes and errors."""


def conv_layers(model: nn.Module, example_input: object = None) -> list[ConvLayer]:
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

    Returns
    -------
    list of ConvLayer
        In the order of `named_modules`. A module that is used at several places is one layer.

    Raises
    ------
    TypeError
        `model` is not a module.
    ValueError
        A lazy module has no weight yet, and there is no `example_input` to give it one.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> for layer in conv_layers(model, torch.zeros(1, 3, 32, 32)):
    ...     print(layer.name, tuple(layer.weight.shape), layer.conv.stride, layer.input_shape)
    0 (8, 3, 3, 3) (2, 2) (32, 32)
    2 (8, 8, 3, 3) (1, 1) (16, 16)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted a torch.nn.Module")
    seen: dict[nn.Module, dict[Extents, Extents]] = {}
    if example_input is not None:
        _run(_unwrapped(model), example_input, seen)
    return [
        _conv_layer(name, module, seen.get(module, {}), reached=example_input is None or module in seen)
        for name, module in convolutions(model).items()
    ]


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that are convolutions, by name, inside of wrappers."""
    return {name: one for name, one in _unwrapped(model).named_modules() if isinstance(one, CONVOLUTIONS)}


def model_layers(model: nn.Module, example_input: object) -> list[Layer]:
    """Return the convolutions with their weights, as a report of the core takes them."""
    return [model_layer(layer, layer.kernel.detach()) for layer in conv_layers(model, example_input)]


def without_autocast(weight: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context manager that switches `torch.autocast` off for the device of `weight`."""
    return torch.autocast(weight.device.type, enabled=False)


# ---- the geometry ------------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> nn.Module:
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
        input_shapes=tuple(seen),
        module=module,
        reached=reached,
        computed_in_forward=computed,
        unknown_forward=not _has_torch_forward(module),
        read=_weight,
    )


def _conv(module: nn.Module, seen: dict[Extents, Extents]) -> Conv:
    letters = SPATIAL_LETTERS[len(module.kernel_size)]
    options: dict[str, Any] = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    if not module.transposed:
        return Conv(f"OI{letters}", padding=module.padding, padding_mode=module.padding_mode, **options)
    pads = [(p, p - extra) for p, extra in zip(module.padding, _output_padding(module, seen), strict=True)]
    return transposed_conv(f"IO{letters}", module.kernel_size, pads, **options)


def _weight(layer: ConvLayer) -> torch.Tensor:
    return layer.module.weight


def _kernel_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a module's weight, without computing a parametrised weight."""
    if (parameter := module._parameters.get("weight")) is not None:
        return tuple(parameter.shape)
    whole, grouped = module.out_channels, module.in_channels
    if module.transposed:
        whole, grouped = grouped, whole
    return (whole, grouped // module.groups, *module.kernel_size)


def _has_torch_forward(module: nn.Module) -> bool:
    """Return whether the module uses weight and padding as PyTorch's own class does."""
    kind = next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
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


# ---- the forward pass --------------------------------------------------------------------------------------


def _run(model: nn.Module, example_input: object, seen: dict[nn.Module, dict[Extents, Extents]]) -> None:
    """Call the model, and add for each convolution the extents of its inputs and outputs to `seen`."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        ndim = len(module.kernel_size)
        image = args[0] if args else kwargs["input"]
        seen.setdefault(module, {}).setdefault(tuple(image.shape[-ndim:]), tuple(output.shape[-ndim:]))

    with contextlib.ExitStack() as stack:
        stack.enter_context(restored(model))
        for module in model.modules():
            if isinstance(module, CONVOLUTIONS):
                stack.enter_context(_removed(module.register_forward_hook(note, with_kwargs=True)))
        stack.enter_context(torch.no_grad())
        model.eval()
        args, kwargs = call_arguments(example_input)
        model(*args, **kwargs)


@contextlib.contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Return a context manager that removes a hook at its end."""
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Return a context manager that restores training modes, buffers and random states."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng([device for device in devices if device.type == kind], device_type=kind):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
