"""One weight, the operators that it stands for, and its projection."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from convsv_adapters.torch._layers import Extents
from convsv_core import Conv, ProjectionState, project
from convsv_core.rescaling import rescale_together
from convsv_core.threshold import frobenius_bound

Projected: TypeAlias = "tuple[torch.Tensor, dict[str, float]]"
"""A weight, and the certified norms of its operators by name."""

ROUNDINGS = 16
"""Attempts to round a kernel to 16 bits within the bound; each gives up more, the last ones half of the norm."""

DRIFT_ROUNDING = 1e-6
"""Far above the rounding error, in float64, of the norm of a kernel's change; relative."""

SMALL_WORK = 32**3
"""What the calls for one layer cost, in the work of a decomposition."""

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
        """Of a projection, roughly: the work of a decomposition at each frequency, and of what any layer asks for."""
        operator, shape = self.operators[0], tuple(self.weight.shape)
        conv, taps = operator.conv, shape[2:]
        if operator.input_shape is None:
            grid = [max(1, POINTS * (-(-k // s) - 1)) for k, s in zip(taps, conv.strides, strict=True)]
        else:
            strides = (1,) * conv.ndim if conv.transposed else conv.strides
            grid = [n // s for n, s in zip(operator.input_shape, strides, strict=True)]
        rows = shape[0] // conv.groups
        columns = shape[1] * math.prod(min(k, s) for k, s in zip(taps, conv.strides, strict=True))
        return float(math.prod(grid) * (conv.groups * rows * columns * min(rows, columns) + SMALL_WORK))


def still_certified(target: Target, weight: torch.Tensor, bound: float) -> Projected | None:
    """The weight itself, if its last certificate and its change since show it to be within the bound.

    No norm changes by more than the norm of the change, for any stride, dilation, grouping or input size.
    """
    reference = target.reference
    if reference is None or reference.kernel.shape != weight.shape or reference.kernel.device != weight.device:
        return None
    least = float(torch.linalg.vector_norm(weight - reference.kernel))  # of what bounds the norm of the change
    if any((u + least) * o.padding_norm > bound for u, o in zip(reference.uppers, target.operators, strict=True)):
        return None
    wide = torch.complex128 if weight.is_complex() else torch.float64
    change = weight.to(wide) - reference.kernel.to(wide)
    drift = frobenius_bound(change, target.operators[0].conv) * (1 + DRIFT_ROUNDING)
    uppers = [upper + drift for upper in reference.uppers]
    within = all(u * o.padding_norm <= bound for u, o in zip(uppers, target.operators, strict=True))
    return _named(target, weight, uppers) if within else None


def is_simple(target: Target, weight: torch.Tensor) -> bool:
    """Whether a weight stands for one operator, in a dtype that needs no rounding."""
    return len(target.operators) == 1 and weight.dtype not in (torch.float16, torch.bfloat16)


def together(targets: Mapping[int, Target], weights: Mapping[int, torch.Tensor]) -> list[list[int]]:
    """Which targets can be rescaled in one call: those of one geometry, by their keys."""
    found: dict[Any, list[int]] = {}
    for key, target in targets.items():
        weight = weights[key]
        alike: Any = key
        if is_simple(target, weight):
            operator = dataclasses.replace(target.operators[0], name="")
            alike = (tuple(weight.shape), weight.dtype, weight.device, operator)
        found.setdefault(alike, []).append(key)
    return list(found.values())


def rescaled(
    targets: Sequence[Target], weights: Sequence[torch.Tensor], bound: float, headroom: float
) -> list[Projected]:
    """The weights of targets that are alike, multiplied by what brings them within the bound."""
    (operator,) = {dataclasses.replace(target.operators[0], name="") for target in targets}
    limit = bound / operator.padding_norm
    results = rescale_together(weights, operator.input_shape, operator.conv, limit, headroom=headroom)
    return [_certified(target, kernel, [upper]) for target, (kernel, upper) in zip(targets, results, strict=True)]


def projected(
    target: Target, weight: torch.Tensor, bound: float, headroom: float, options: Mapping[str, Any]
) -> Projected:
    """The weight, in its own dtype, within the bound for each operator; and the certified norms."""
    kernel, norms = _nearest(target, weight, bound, headroom, options)
    return _certified(target, kernel, [float(norm) for norm in norms])


def _certified(target: Target, kernel: torch.Tensor, uppers: list[float]) -> Projected:
    target.reference = Certified(kernel.clone(), uppers)
    return _named(target, kernel, uppers)


def _named(target: Target, kernel: torch.Tensor, uppers: list[float]) -> Projected:
    certified: dict[str, float] = {}
    for operator, upper in zip(target.operators, uppers, strict=True):
        certified[operator.name] = max(certified.get(operator.name, 0.0), upper * operator.padding_norm)
    return kernel, certified


def _nearest(
    target: Target, weight: torch.Tensor, bound: float, headroom: float, options: Mapping[str, Any]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The projected weight, in its own dtype, and the certified norm of each operator, its padding left out."""
    first, *others = target.operators
    found = project(weight, first.input_shape, first.conv, bound / first.padding_norm, state=target.state, **options)
    target.state = found.state
    kernel, norm = found.kernel, found.norm
    if headroom > 0 and found.distance > 0:
        kernel = kernel * (1 - headroom)
        # What rounding adds to the norm is at most eps times the sum of the taps' norms.
        taps = torch.linalg.vector_norm(kernel.flatten(2), dim=(0, 1)).sum()
        norm = norm * (1 - headroom) + torch.finfo(kernel.dtype).eps * taps
    if kernel.dtype != weight.dtype:
        return _rounded(kernel, weight.dtype, target.operators, bound)
    norms = [norm]
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
