"""One forward pass of a PyTorch module, which leaves the module as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from convsv_adapters._layers import call_arguments
from convsv_adapters.torch._folding import FollowingWatch
from convsv_core.layers import Extents

__all__ = ["in_evaluation_mode", "run_forward"]


def run_forward(
    model: nn.Module,
    example_input: object,
    layers: Container[nn.Module],
    seen: dict[nn.Module, dict[Extents, Extents]],
    watch: FollowingWatch | None = None,
) -> None:
    """Call a model in evaluation mode, and restore all that the call may change.

    Parameters
    ----------
    model : torch.nn.Module
    example_input : tensor, tuple, list or mapping
        As for `conv_layers`.
    layers : container of torch.nn.Module
        The layers of the model.
    seen : dict
        For each layer that the call reaches, the extents of its inputs and outputs are added.
    watch : FollowingWatch, optional
        It sees the outputs of layers, the functions that the call uses, and the result.
    """

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        extents = seen.setdefault(module, {})
        if not isinstance(module, nn.Linear):
            ndim = len(module.kernel_size)
            image = args[0] if args else kwargs["input"]
            extents.setdefault(tuple(image.shape[-ndim:]), tuple(output.shape[-ndim:]))
        if watch is not None:
            watch.made(module, output)

    with contextlib.ExitStack() as stack:
        stack.enter_context(in_evaluation_mode(model))
        stack.callback(_reshard, model)
        for module in model.modules():
            if module in layers:
                stack.enter_context(_removed(module.register_forward_hook(note, with_kwargs=True)))
        stack.enter_context(torch.no_grad())
        args, kwargs = call_arguments(example_input)
        if watch is None:
            model(*args, **kwargs)
            return
        # A compiled part would not call the functions of PyTorch one by one.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(watch)
        result = model(*args, **kwargs)
        watch.taken((result,))


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 take its parameters apart again, which it leaves whole after a forward pass of the root."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextlib.contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Return a context manager that removes a hook at its end."""
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Return a context manager that sets evaluation mode, and restores training modes, buffers and random states."""
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
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
