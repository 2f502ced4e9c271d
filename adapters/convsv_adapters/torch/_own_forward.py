"""One call of a user's class of convolution, which tells whether it convolves with its weight as it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from convsv_adapters._layers import ConvLayer
from convsv_adapters.torch._forward import in_evaluation_mode
from convsv_core.conv import per_axis

__all__ = ["uses_its_weight"]

FORWARD = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
CONVOLVING = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), FORWARD),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), TRANSPOSED),
}
"""The functions of PyTorch that convolve, with the names of their arguments by position."""


class _Watch(TorchFunctionMode):  # type: ignore[misc]
    """Mode that keeps the arguments of the convolutions that a call computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch, and keep its arguments if it convolves."""
        if function in CONVOLVING:
            self.calls.append(dict(zip(CONVOLVING[function], args, strict=False)) | dict(kwargs or {}))
        return function(*args, **(kwargs or {}))


def uses_its_weight(layer: ConvLayer) -> bool:
    """Return whether a layer surely convolves with its weight as it is stored, which PyTorch's own classes do.

    False if it is not the layer's but its normalisation's forward pass that is not known: both count together.
    """
    if not layer.unknown_forward:
        return True
    return not layer.linear and layer.normalisation is None and _convolves_with_its_weight(layer.module)


def _convolves_with_its_weight(module: nn.Module) -> bool:
    """Return whether a convolution with a forward pass of its own convolves once, with its weight as it is stored.

    The module is called once on zeros, in evaluation mode and without its hooks. False if the call fails, if it changes
    the weight, or if it takes another stride, dilation or number of groups than the module states.
    """
    weight = module.weight
    ndim = len(module.kernel_size)
    geometry = zip(module.kernel_size, module.dilation, module.stride, strict=True)
    extents = [dilation * (taps - 1) + 1 + stride for taps, dilation, stride in geometry]
    before = weight.detach().clone()
    watch = _Watch()
    try:
        with in_evaluation_mode(module), torch.no_grad(), watch:
            module.forward(weight.new_zeros((1, module.in_channels, *extents)))
    except Exception:  # the forward pass is the user's, and may fail with anything on an input that is not its own
        return False
    finally:
        changed = not torch.equal(before, module.weight)
        if changed and "weight" in module._parameters:
            with torch.no_grad():
                module.weight.copy_(before)
    if changed or len(watch.calls) != 1:
        return False
    (given,) = watch.calls
    stated = {"stride": module.stride, "dilation": module.dilation}
    same = all(per_axis(name, given.get(name, 1), ndim, least=1) == tuple(value) for name, value in stated.items())
    return same and given.get("groups", 1) == module.groups and _is_weight(given.get("weight"), module)


def _is_weight(weight: object, module: nn.Module) -> bool:
    """Return whether a tensor is the weight of a module: itself, or for a parametrised module by its numbers."""
    if "weight" in module._parameters:
        return weight is module._parameters["weight"]
    return isinstance(weight, torch.Tensor) and torch.equal(weight, module.weight)
