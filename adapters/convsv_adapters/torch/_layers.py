"""The convolutions of a PyTorch module: their geometry, and the extents that one forward pass shows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from convsv_core import Conv
from convsv_core.layers import Layer

Extents: TypeAlias = tuple[int, ...]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYOUTS = {1: "OIW", 2: "OIHW", 3: "OIDHW"}
TRANSPOSED_LAYOUTS = {1: "IOW", 2: "IOHW", 3: "IODHW"}
COMPUTED_IN_FORWARD = "its weight is computed by a hook before each forward pass"


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """One convolution of a PyTorch module.

    Attributes
    ----------
    name : str
        As `torch.nn.Module.named_modules` has it; the first one, where a module is reached by several.
    module : torch.nn.Module
    conv : Conv
        The module's geometry, its own padding included. Of a transposed convolution, padding that the output padding
        makes uneven.
    input_shapes : tuple of tuple of int
        Each spatial extents of its input that the forward pass showed, in order of appearance; empty where there
        was no pass, or none that reached the module.
    note : str
        What a reader must know, or "".
    """

    name: str
    module: nn.Module
    conv: Conv
    input_shapes: tuple[Extents, ...] = ()
    note: str = ""

    @property
    def input_shape(self) -> Extents | None:
        """The first of `input_shapes`, or None."""
        return self.input_shapes[0] if self.input_shapes else None

    @property
    def weight(self) -> torch.Tensor:
        """The module's weight; that of a parametrised module is computed when it is asked for."""
        return self.module.weight


def conv_layers(model: nn.Module, example_input: object = None) -> list[ConvLayer]:
    """Find every convolution of a model, with its geometry and the true extents of its inputs.

    Parameters
    ----------
    model : torch.nn.Module
        Its `Conv1d`, `Conv2d`, `Conv3d` and transposed ones are found at any depth, parametrised and lazy ones and
        subclasses among them. `DistributedDataParallel`, `DataParallel` and compiled modules are looked into.
    example_input : tensor, tuple, list or mapping, optional
        What the model is called with: an argument, positional arguments or keyword arguments. The model is
        called once, in evaluation mode and without gradients; training modes, buffers and PyTorch's random state are
        as before afterwards, and no hook is left behind. Lazy modules are initialised by it.

    Returns
    -------
    list of ConvLayer
        In the order of `named_modules`; a module that is used at several places is one layer.

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
    model = unwrap(model)
    seen: dict[nn.Module, dict[Extents, Extents]] = {}
    if example_input is not None:
        _run(model, example_input, seen)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS):
            note = "" if example_input is None or module in seen else "not reached by the forward pass"
            found.append(_conv_layer(name, module, seen.get(module, {}), note))
    return found


def model_layer(layer: ConvLayer) -> Layer:
    """The layer as a report of the core takes it: at the largest of its extents, where there are several."""
    note, extents = layer.note, layer.input_shape
    if len(layer.input_shapes) > 1:
        extents = largest_extents(layer)
        used = f"takes {len(layer.input_shapes)} different extents, of which the largest is used"
        note = "; ".join(filter(None, [note, used]))
    if extents is None and not note:
        note = "extents unknown: wanted an example_input"
    return Layer(layer.name, layer.weight.detach(), layer.conv, extents, note)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside of those that replicate it over devices, or compile it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def largest_extents(layer: ConvLayer) -> Extents:
    """Those of the most pixels that the layer has been seen with."""
    return max(layer.input_shapes, key=math.prod)


def without_autocast(weight: torch.Tensor) -> AbstractContextManager[object]:
    """Keep the digits of a computation beside `weight` where it is done under `torch.autocast`."""
    return torch.autocast(weight.device.type, enabled=False)


# ---- the geometry ------------------------------------------------------------------------------------------


def _conv_layer(name: str, module: nn.Module, seen: dict[Extents, Extents], note: str) -> ConvLayer:
    if "weight" in module._parameters and is_lazy(module._parameters["weight"]):
        raise ValueError(
            f"the layer {name!r} is a {type(module).__name__} without a weight: wanted an example_input that "
            f"reaches it, or a forward pass before this call"
        )
    notes = [note]
    if not _is_plain(module):
        notes.append("a subclass with a forward pass of its own: what it does to weight and padding is not known")
    if _is_computed_in_forward(module):
        notes.append(COMPUTED_IN_FORWARD)
    ndim = len(module.kernel_size)
    padding: Any = module.padding
    if module.transposed:
        pairs = [(p, p - extra) for p, extra in zip(padding, _output_padding(module, seen), strict=True)]
        if min(after for _, after in pairs) < 0:
            notes.append("its output padding goes beyond the reach of the kernel")
        padding = tuple((before, max(after, 0)) for before, after in pairs)
    conv = Conv(
        (TRANSPOSED_LAYOUTS if module.transposed else LAYOUTS)[ndim],
        stride=module.stride,
        dilation=module.dilation,
        groups=module.groups,
        padding=padding,
        padding_mode=module.padding_mode,
        transposed=module.transposed,
    )
    return ConvLayer(name, module, conv, tuple(seen), "; ".join(filter(None, notes)))


def _is_plain(module: nn.Module) -> bool:
    """Whether the module does with weight and padding what PyTorch's own class does."""
    kind = next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
    own = type(module)
    return own.forward is kind.forward and getattr(own, "_conv_forward", None) is getattr(kind, "_conv_forward", None)


def _is_computed_in_forward(module: nn.Module) -> bool:
    """Whether `weight` is neither a parameter nor parametrised, as with the older `weight_norm` and `spectral_norm`."""
    return "weight" not in module._parameters and not nn.utils.parametrize.is_parametrized(module, "weight")


def _output_padding(module: nn.Module, seen: dict[Extents, Extents]) -> tuple[int, ...]:
    """The module's own, or what the first call's `output_size` made of it."""
    for extents, outputs in seen.items():
        geometry = zip(
            extents, outputs, module.stride, module.padding, module.dilation, module.kernel_size, strict=True
        )
        return tuple(out - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for n, out, s, p, d, k in geometry)
    return tuple(module.output_padding)


# ---- the forward pass --------------------------------------------------------------------------------------


def _run(model: nn.Module, example_input: object, seen: dict[nn.Module, dict[Extents, Extents]]) -> None:
    """Call the model, and note for each convolution its input's extents and those of the output."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        ndim = len(module.kernel_size)
        image = args[0] if args else kwargs["input"]
        seen.setdefault(module, {}).setdefault(tuple(image.shape[-ndim:]), tuple(output.shape[-ndim:]))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_restored(model))
        for module in model.modules():
            if isinstance(module, CONVOLUTIONS):
                stack.enter_context(_removed(module.register_forward_hook(note, with_kwargs=True)))
        stack.enter_context(torch.no_grad())
        model.eval()
        if isinstance(example_input, Mapping):
            model(**example_input)
        elif isinstance(example_input, tuple | list):
            model(*example_input)
        else:
            model(example_input)


@contextlib.contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back training modes, buffers and random states."""
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
