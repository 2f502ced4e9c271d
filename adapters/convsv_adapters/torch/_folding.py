"""Batch normalisations of a PyTorch module: which layers they follow directly, and their scale in evaluation mode.

A layer and the normalisation behind it are found in one forward pass. A `TorchFunctionMode` sees every function of
PyTorch that the pass calls, with its arguments. A normalisation follows a layer where `torch.nn.functional.batch_norm`
takes the very tensor that the layer returned, before any other function has taken it. Another function may have
changed the tensor, or have used the layer's output alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from convsv_core import Conv
from convsv_core.reports.certified import scaled_outputs

__all__ = [
    "Following",
    "FollowingWatch",
    "KernelParts",
    "is_batch_norm",
    "kernel_of",
    "scale_of",
    "scaled_kernel",
]

NORMALISATIONS = (F.batch_norm, torch.batch_norm)
"""The functions of PyTorch that normalise by statistics of a batch or by running ones, and scale each channel."""

FACTS = (bool, int, str, torch.Size, torch.dtype, torch.device, torch.layout, type(None))
"""The types of results that tell of a tensor's shape and kind. A function with such a result uses no values of it."""


@dataclass(frozen=True, eq=False)
class Following:
    """The facts that a forward pass has shown about the layers and normalisations of a model.

    Attributes
    ----------
    pairs : set of pairs of modules
        A layer and a normalisation that took an output of the layer directly.
    bare : set of modules
        The layers of which an output was used by anything but a normalisation, or by nothing.
    alone : set of modules
        The normalisations that took something else than a layer's output, or whose channels are on another axis.
    reached : set of modules
        The normalisations that the pass has called.
    strange : bool
        Whether there was a call of `batch_norm` with tensors that do not all belong to one module of the model.
    """

    pairs: set[tuple[nn.Module, nn.Module]]
    bare: set[nn.Module]
    alone: set[nn.Module]
    reached: set[nn.Module]
    strange: bool


class FollowingWatch(TorchFunctionMode):  # type: ignore[misc]
    """Mode of a forward pass that notes which functions take the outputs of layers.

    Parameters
    ----------
    norms : sequence of torch.nn.Module
        The batch normalisations of the model.
    """

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self._norms = norms
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._calls: list[tuple[nn.Module, set[nn.Module | None]]] = []
        self._alone: set[nn.Module] = set()
        self._reached: set[nn.Module] = set()
        self._strange = False

    def made(self, layer: nn.Module, output: torch.Tensor) -> None:
        """Note an output of a layer."""
        self._calls.append((layer, set()))
        self._made[output] = len(self._calls) - 1

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch, and note what it takes."""
        given = dict(kwargs or {})
        if function in NORMALISATIONS:
            self._normalised(args[0] if args else given["input"], [*args[1:], *given.values()])
            return function(*args, **given)
        result = function(*args, **given)
        if not isinstance(result, FACTS):
            self.taken((*args, *given.values()))
        return result

    def _normalised(self, image: torch.Tensor, others: Sequence[Any]) -> None:
        """Note a call of a normalisation, whose module is known by its running statistics."""
        found = next((norm for norm in self._norms if any(norm.running_var is one for one in others)), None)
        if found is None or not _takes_its_own(found, others):
            self._strange = True
            self.taken((image,))
            return
        self._reached.add(found)
        call = self._made.get(image)
        if call is None or not _same_channels(self._calls[call][0], found, image):
            self._alone.add(found)
            self.taken((image,))
        else:
            self._calls[call][1].add(found)

    def taken(self, values: Iterable[Any]) -> None:
        """Note that something else than a normalisation takes these values, or that the model returns them."""
        for tensor in _tensors(values):
            call = self._made.pop(tensor, None)
            if call is not None:
                self._calls[call][1].add(None)

    def result(self) -> Following:
        """Return what the pass has shown."""
        pairs = {(layer, norm) for layer, norms in self._calls for norm in norms if norm is not None}
        bare = {layer for layer, norms in self._calls if None in norms or not norms}
        return Following(pairs, bare, self._alone, self._reached, self._strange)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers, and in the attributes of other objects that a model may return."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple | set):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif not isinstance(value, nn.Module | type) and isinstance(held := getattr(value, "__dict__", None), dict):
            yield from (one for one in held.values() if isinstance(one, torch.Tensor))


def _takes_its_own(norm: nn.Module, others: Sequence[Any]) -> bool:
    """Return whether the arguments of a normalisation, besides its input, are the tensors that its module holds."""
    own = [one for one in (norm.running_mean, norm.running_var, norm.weight, norm.bias) if one is not None]
    given = [one for one in others if isinstance(one, torch.Tensor)]
    return len(given) == len(own) and all(any(one is other for other in own) for one in given)


def _same_channels(layer: nn.Module, norm: nn.Module, output: torch.Tensor) -> bool:
    """Return whether axis 1 of a layer's output, which a normalisation scales, is the axis of the layer's channels."""
    if isinstance(layer, nn.Linear):
        return output.ndim == 2
    return output.ndim == len(layer.kernel_size) + 2


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module normalises batches and keeps running statistics for evaluation mode."""
    return isinstance(module, _BatchNorm)


def scale_of(norm: nn.Module, weight: torch.Tensor | None = None, variance: torch.Tensor | None = None) -> torch.Tensor:
    """Return the number by which a normalisation multiplies each channel in evaluation mode, in float64.

    Parameters
    ----------
    norm : torch.nn.Module
    weight, variance : tensor, optional
        They stand for the normalisation's own weight and running variance.
    """
    return _scale(
        norm.running_var if variance is None else variance, norm.eps, norm.weight if weight is None else weight
    )


def _scale(variance: torch.Tensor, epsilon: float, weight: torch.Tensor | None) -> torch.Tensor:
    scale = (variance.to(torch.float64) + epsilon).rsqrt()
    return scale if weight is None else weight.to(torch.float64) * scale


def scaled_kernel(kernel: torch.Tensor, scale: torch.Tensor, conv: Conv) -> torch.Tensor:
    """Return a kernel with each output channel multiplied by a number, in at least float32.

    The rounding error of an entry is at most one eps of the entry.
    """
    dtype = torch.promote_types(kernel.dtype, torch.float32)
    return scaled_outputs(kernel.to(torch.promote_types(dtype, torch.float64)), conv, scale).to(dtype)


class KernelParts(NamedTuple):
    """Hold the tensors from which the kernel of a layer and its normalisation is made.

    Attributes
    ----------
    weight : tensor or None
        The weight of the layer. None for a normalisation that stands alone.
    gamma : tensor or None
        The weight of the normalisation, if it has one.
    variance : tensor or None
        The running variance of the normalisation. None for a layer without one.
    epsilon : float
        The normalisation adds it to the variance.
    linear : bool
        True for the weight of a linear layer, which lacks the axis of the kernel's one tap.
    """

    weight: torch.Tensor | None
    gamma: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    epsilon: float = 0.0
    linear: bool = False


def kernel_of(parts: KernelParts, conv: Conv | None) -> torch.Tensor:
    """Return the kernel of a layer and its normalisation in evaluation mode. Differentiable."""
    weight = parts.weight
    if weight is not None and parts.linear:
        weight = weight.unsqueeze(-1)
    if parts.variance is None:
        assert weight is not None
        return weight
    scale = _scale(parts.variance, parts.epsilon, parts.gamma)
    if weight is None:
        gamma = parts.gamma
        dtype = torch.float32 if gamma is None else torch.promote_types(gamma.dtype, torch.float32)
        return scale.to(dtype)[:, None, None]
    assert conv is not None
    return scaled_kernel(weight, scale, conv)
