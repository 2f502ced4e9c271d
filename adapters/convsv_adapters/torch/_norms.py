"""Operator norms of weights, computed with NumPy by one call for each shape and geometry, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import convsv_core
from convsv_core import Conv, norm_upper_bound
from convsv_core.layers import Extents
from convsv_core.training import NormGroup, Norms, norms_of_groups

__all__ = ["NormOf", "WeightGroup", "as_numpy", "can_share", "norm_of", "norms_of"]


class NormOf(NamedTuple):
    """Say which norm of a weight is wanted.

    Attributes
    ----------
    conv : Conv
    input_shape : tuple of int or None
        The extents of the layer's input. None: the upper bound for every input size.
    rtol : float
        Without an `input_shape`, as for `convsv_core.norm_upper_bound`.
    """

    conv: Conv
    input_shape: Extents | None
    rtol: float

    @property
    def shareable(self) -> bool:
        """Whether the norm is that of a grid of frequencies, so that weights of one shape can share the work."""
        return self.input_shape is None or (self.conv.padding_mode == "circular" and self.conv.padding == "same")

    def group(self, arrays: Sequence[Any]) -> NormGroup:
        """Return NumPy arrays of one shape and dtype, whose norms are wanted, as a group of kernels."""
        return NormGroup(arrays, self.input_shape, self.conv, self.rtol)


class WeightGroup(NamedTuple):
    """Hold weights of one shape and dtype, which pass `can_share`, and whose norms are wanted."""

    weights: Sequence[torch.Tensor]
    which: NormOf


def norm_of(weight: torch.Tensor, which: NormOf) -> torch.Tensor:
    """Return the norm of one weight: a 0-d tensor, differentiable."""
    if which.input_shape is None:
        return norm_upper_bound(weight, which.conv, rtol=which.rtol)
    return convsv_core.operator_norm(weight, which.input_shape, which.conv)


def can_share(weight: torch.Tensor) -> bool:
    """Tell whether NumPy can read a tensor in place, and no transformation or compiler records what happens to it.

    Every layer asks this in every forward pass. The backend, which takes trees of arguments, would take longer.
    """
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or weight.layout != torch.strided:
        return False
    try:
        weight.data_ptr()
    except RuntimeError:  # The tensors that `torch.func` transforms have no memory of their own.
        return False
    return True


def norms_of(groups: Sequence[WeightGroup]) -> list[torch.Tensor]:
    """Return the norms of each group of weights: tensors of shape (weights,), differentiable."""
    weights = [weight for group in groups for weight in group.weights]
    derivatives = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    arrays = [group.which.group([as_numpy(weight) for weight in group.weights]) for group in groups]
    found = norms_of_groups(arrays, derivatives=derivatives)
    return [_differentiable(group, norms) for group, norms in zip(groups, found, strict=True)]


def _differentiable(group: WeightGroup, found: Norms) -> torch.Tensor:
    """Return the norms of weights as a tensor, with their derivatives if these are known."""
    values = torch.from_numpy(found.values)
    if found.slopes is None:
        return values
    slopes = [torch.from_numpy(slope) for slope in found.slopes]
    norms: torch.Tensor = _KnownNorms.apply(values, slopes, lambda weight: norm_of(weight, group.which), *group.weights)
    return norms


def as_numpy(weight: torch.Tensor) -> Any:
    """Return a tensor as a NumPy array in the same memory; bfloat16, which NumPy has not, as a copy in float32."""
    detached = weight.detach().resolve_conj()
    return (detached.float() if detached.dtype == torch.bfloat16 else detached).numpy()


class _KnownNorms(torch.autograd.Function):  # type: ignore[misc]
    """Return norms whose derivatives are known. A second derivative comes from the norms of single weights."""

    @staticmethod
    def forward(
        context: Any,
        values: torch.Tensor,
        slopes: list[torch.Tensor],
        again: Callable[[torch.Tensor], torch.Tensor],
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the norms."""
        context.save_for_backward(*weights)
        context.slopes, context.again = slopes, again
        return values

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the slopes times the gradients of the norms."""
        weights, wanted = context.saved_tensors, context.needs_input_grad[3:]
        if not torch.is_grad_enabled():
            parts = zip(gradient, context.slopes, wanted, strict=True)
            return None, None, None, *(one * slope.conj() if need else None for one, slope, need in parts)
        found: list[torch.Tensor | None] = []
        for one, weight, need in zip(gradient, weights, wanted, strict=True):  # A second derivative is wanted.
            if need:
                (slope,) = torch.autograd.grad(context.again(weight), weight, create_graph=True)
                found.append(one * slope)
            else:
                found.append(None)
        return None, None, None, *found
