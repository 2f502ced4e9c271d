"""One weight, the operators that it stands for, and its projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convsv_adapters._torch_layers import Extents
from convsv_core import Conv, ProjectionState, project

ROUNDINGS = 16
"""Attempts to round a kernel to 16 bits within the bound; each gives up more, the last ones half of the norm."""

DRIFT_ROUNDING = 1e-6
"""Far above the rounding error, in float64, of the norm of a kernel's change; relative."""

POINTS = 16
"""Frequencies that a projection visits along an axis for each unit of the kernel's span, for an estimate of work."""


@dataclass(frozen=True)
class Operator:
    """One operator that a weight stands for.

    Attributes
    ----------
    name : str
        Of the layer.
    conv, input_shape
        As `convsv_core.project` takes them.
    padding_norm : float
        By how much the layer's own padding can raise the norm of that operator, as a factor.
    """

    name: str
    conv: Conv
    input_shape: Extents | None
    padding_norm: float


@dataclass(frozen=True, eq=False)
class Certified:
    """A kernel that the norms of a weight's operators are known for, and these upper bounds."""

    kernel: torch.Tensor
    uppers: list[float]


@dataclass(eq=False)
class Target:
    """One weight, and the operators that it stands for: several where modules share it, or inputs differ."""

    module: nn.Module
    operators: list[Operator]
    state: ProjectionState | None = None
    reference: Certified | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The module's weight."""
        return self.module.weight

    def cost(self) -> float:
        """Of a projection, roughly: the work of a decomposition at each frequency."""
        operator, shape = self.operators[0], tuple(self.weight.shape)
        conv, taps = operator.conv, shape[2:]
        if operator.input_shape is None:
            grid = [max(1, POINTS * (-(-k // s) - 1)) for k, s in zip(taps, conv.strides, strict=True)]
        else:
            strides = (1,) * conv.ndim if conv.transposed else conv.strides
            grid = [n // s for n, s in zip(operator.input_shape, strides, strict=True)]
        rows = shape[0] // conv.groups
        columns = shape[1] * math.prod(min(k, s) for k, s in zip(taps, conv.strides, strict=True))
        return float(math.prod(grid) * conv.groups * rows * columns * min(rows, columns))


def projected(
    target: Target, weight: torch.Tensor, bound: float, options: Mapping[str, Any]
) -> tuple[torch.Tensor, dict[str, float]]:
    """The weight, in its own dtype, within the bound for each operator; and the certified norms."""
    bounds = [bound / operator.padding_norm for operator in target.operators]
    uppers = _still_certified(target.reference, weight, bounds)
    kernel = weight
    if uppers is None:
        kernel, norms = _nearest(target, weight, bound, options)
        uppers = [float(norm) for norm in norms]
        target.reference = Certified(kernel.clone(), uppers)
    certified: dict[str, float] = {}
    for operator, upper in zip(target.operators, uppers, strict=True):
        certified[operator.name] = max(certified.get(operator.name, 0.0), upper * operator.padding_norm)
    return kernel, certified


def _still_certified(reference: Certified | None, weight: torch.Tensor, bounds: list[float]) -> list[float] | None:
    """Upper bounds that follow from those of an earlier kernel, if all of them are within the bounds.

    No norm changes by more than the sum over the taps of the norms of the changes' matrices, for any stride,
    dilation, grouping or input size; Frobenius norms stand for these.
    """
    if reference is None or reference.kernel.shape != weight.shape or reference.kernel.device != weight.device:
        return None
    wide = torch.complex128 if weight.is_complex() else torch.float64
    change = (weight.to(wide) - reference.kernel.to(wide)).flatten(2)
    drift = float(torch.linalg.vector_norm(change, dim=(0, 1)).sum()) * (1 + DRIFT_ROUNDING)
    uppers = [upper + drift for upper in reference.uppers]
    return uppers if all(upper <= limit for upper, limit in zip(uppers, bounds, strict=True)) else None


def _nearest(
    target: Target, weight: torch.Tensor, bound: float, options: Mapping[str, Any]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The projected weight, in its own dtype, and the certified norm of each operator, its padding left out."""
    first, *others = target.operators
    found = project(weight, first.input_shape, first.conv, bound / first.padding_norm, state=target.state, **options)
    target.state = found.state
    kernel, norms = found.kernel, [found.norm]
    if kernel.dtype != weight.dtype:
        return _rounded(kernel, weight.dtype, target.operators, bound)
    for operator in others:
        kernel, norm = _rescaled(kernel, operator, bound)
        norms.append(norm)
    return kernel, norms


def _rescaled(kernel: torch.Tensor, operator: Operator, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel, smaller if the operator's norm demands it, which leaves it within every other bound."""
    found = project(kernel, operator.input_shape, operator.conv, bound / operator.padding_norm, method="rescale")
    return found.kernel, found.norm


def _rounded(
    kernel: torch.Tensor, dtype: torch.dtype, operators: list[Operator], bound: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A kernel near the given one that is within the bound after rounding to 16 bits."""
    for attempt in range(ROUNDINGS):
        stored = kernel.to(dtype)
        norms = []
        within = True
        for operator in operators:
            smaller, norm = _rescaled(stored, operator, bound)
            norms.append(norm)
            within = within and torch.equal(smaller, stored.to(smaller.dtype))
            kernel = smaller if not within else kernel
        if within:
            return stored, norms
        kernel = kernel * (1 - min(0.5, 2**attempt * torch.finfo(dtype).eps / 8))
    raise ArithmeticError(f"no kernel of {dtype} was found within the bound {bound}")
