"""Weights, the operators whose norms are bounded for them, and their projection."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from convsv_adapters._layers import ConvLayer, operators_of
from convsv_adapters.torch._exchange import is_sharded, write_shard
from convsv_adapters.torch._layers import COMPUTED_IN_FORWARD
from convsv_adapters.torch._own_forward import uses_its_weight
from convsv_core import ProjectionState, project
from convsv_core.layers import Operator
from convsv_core.plugins import one_line
from convsv_core.training import CERTIFICATE_RTOL, frobenius_bound, rescale_together

__all__ = [
    "DRIFT_ROUNDING",
    "ProjectedWeight",
    "Target",
    "gathered",
    "is_simple",
    "make_targets",
    "projected",
    "refuse_layer",
    "rescaled",
    "still_certified",
    "together",
]

ROUNDINGS = 16
"""Largest number of attempts to round a kernel to 16 bits within the bound.

Each attempt makes the kernel smaller by twice as much as the one before, and the last attempts halve it. A guess: one
or two attempts are enough in the tests.
"""

STORED_EPS = 64
"""Largest relative change of a weight by its parametrization's rounding, in eps of its dtype.

Weight norm divides by a norm and multiplies by it again: a few eps. The rest is a guess.
"""

DRIFT_ROUNDING = 1e-6
"""Relative bound of the rounding error, in float64, of the norm of a kernel's change. A guess, far above the error."""

SMALL_WORK = 32**3
"""Cost of the calls for one layer, in the operations of a decomposition. A guess: that of a 32 x 32 matrix."""

POINTS = 16
"""Number of frequencies that a projection visits along an axis for each unit of the kernel's span. A guess."""


class NamedOperator(NamedTuple):
    """An operator, and the name of the layer whose norm it bounds."""

    name: str
    operator: Operator


class ProjectedWeight(NamedTuple):
    """A projected weight, and the certified upper bounds of its layers' norms, by the layers' names."""

    kernel: torch.Tensor
    norms: dict[str, float]


@dataclass(frozen=True, eq=False)
class Certified:
    """A kernel, and certified upper bounds of the norms of its target's operators."""

    kernel: torch.Tensor
    uppers: list[float]


@dataclass(eq=False)
class Target:
    """One kernel and its operators: several where modules share the weight, or where inputs differ in their extents.

    Attributes
    ----------
    layer : ConvLayer
        The first layer that has the kernel.
    bound : float
        Largest norm of each layer.
    operators : list of NamedOperator
    state : ProjectionState or None
        State of the last projection, from which the next one begins.
    reference : Certified or None
        The last certificate.
    """

    layer: ConvLayer
    bound: float
    operators: list[NamedOperator] = field(default_factory=list)
    state: ProjectionState | None = None
    reference: Certified | None = None

    @property
    def module(self) -> nn.Module:
        """The module of the layer."""
        return self.layer.module

    @property
    def names(self) -> list[str]:
        """Name of the layer of each operator."""
        return [name for name, _ in self.operators]

    @property
    def limit(self) -> float:
        """The norm up to which a kernel is left as it is, so that `norm_bounds` finds it within the bound too."""
        return self.bound / (1 + CERTIFICATE_RTOL)

    @property
    def weight(self) -> torch.Tensor:
        """The module's weight, with the axes of the kernel."""
        weight = self.module.weight
        return weight.unsqueeze(-1) if self.layer.linear else weight

    def gathered(self) -> torch.Tensor:
        """Return the kernel without its graph, with the parts of all ranks if it is sharded."""
        return gathered(self.module.weight).reshape(self.layer.kernel_shape)

    def store(self, kernel: torch.Tensor) -> None:
        """Give the module another kernel; raise ValueError if its parametrization stores a different one."""
        module, parameter = self.module, self.module._parameters.get("weight")
        weight = kernel.squeeze(-1) if self.layer.linear else kernel
        if parameter is None:
            try:
                module.weight = weight.clone()
            except (NotImplementedError, RuntimeError) as error:  # torch raises a RuntimeError without a right_inverse
                raise ValueError(
                    f"the layer {self.names[0]!r} cannot be projected: {one_line(error)}; wanted a parametrization "
                    f"with a right_inverse, or the plain layer"
                ) from error
            change, size = (float(torch.linalg.vector_norm(one)) for one in (module.weight - weight, weight))
            if not change <= STORED_EPS * torch.finfo(weight.dtype).eps * size:
                self.reference = None
                kinds = ", ".join(type(one).__qualname__ for one in module.parametrizations["weight"])
                raise ValueError(
                    f"the layer {self.names[0]!r} cannot be projected: its parametrization ({kinds}) gives another "
                    f"weight than the one that was assigned; wanted a right_inverse that gives it back, or the plain "
                    f"layer"
                )
        elif is_sharded(parameter):
            write_shard(parameter, weight)
        else:
            parameter.copy_(weight)

    def add(self, layer: ConvLayer, circular: bool) -> None:
        """Add the operators of a layer that has the kernel."""
        named = [NamedOperator(layer.name, operator) for operator in operators_of(layer, circular)]
        self.operators += [one for one in named if one not in self.operators]

    def cost(self) -> float:
        """Return a rough estimate of the operations of a projection, from decompositions at the visited frequencies."""
        operator, shape = self.operators[0].operator, self.layer.kernel_shape
        conv, taps = operator.conv, shape[2:]
        if operator.input_shape is None:
            grid = [max(1, POINTS * (-(-k // s) - 1)) for k, s in zip(taps, conv.strides, strict=True)]
        else:
            strides = (1,) * conv.ndim if conv.transposed else conv.strides
            grid = [n // s for n, s in zip(operator.input_shape, strides, strict=True)]
        rows = shape[0] // conv.groups
        columns = shape[1] * math.prod(min(k, s) for k, s in zip(taps, conv.strides, strict=True))
        return float(math.prod(grid) * (conv.groups * rows * columns * min(rows, columns) + SMALL_WORK))

    def layer_uppers(self, uppers: Sequence[float]) -> Iterator[tuple[str, float]]:
        """Yield a layer's name and an upper bound of its norm, for each upper bound of an operator's norm."""
        for (name, operator), upper in zip(self.operators, uppers, strict=True):
            yield name, operator.layer_upper(upper)

    def result(self, kernel: torch.Tensor, uppers: Sequence[float]) -> ProjectedWeight:
        """Return a kernel with the norms of its layers, from the upper bounds of the operators' norms."""
        norms: dict[str, float] = {}
        for name, upper in self.layer_uppers(uppers):
            norms[name] = max(norms.get(name, 0.0), upper)
        return ProjectedWeight(kernel, norms)

    def certify(self, kernel: torch.Tensor, uppers: list[float]) -> ProjectedWeight:
        """Keep a kernel and the upper bounds of its operators' norms as the last certificate, and return the result."""
        self.reference = Certified(kernel.clone(), uppers)
        return self.result(kernel, uppers)


def make_targets(bounded: Iterable[tuple[ConvLayer, float]], circular: bool) -> list[Target]:
    """Return the targets of layers without normalisations, each with its bound: one for each weight.

    Raises
    ------
    TypeError, ValueError
        A weight cannot be projected, or extents are needed that are not known.
    """
    found: dict[int, Target] = {}
    for layer, bound in bounded:
        refuse_layer(layer)
        parameter = layer.module._parameters.get("weight")
        if parameter is None and is_sharded(layer.weight):
            raise TypeError(f"the layer {layer.name!r} has a weight that is both parametrised and sharded: wanted one")
        target = found.setdefault(id(layer.module if parameter is None else parameter), Target(layer, bound))
        target.bound = min(target.bound, bound)
        target.add(layer, circular)
    return list(found.values())


def refuse_layer(layer: ConvLayer) -> None:
    """Raise ValueError for a layer whose weight cannot be stored, and warn of one whose forward pass is not known."""
    if layer.computed_in_forward:
        raise ValueError(
            f"the layer {layer.name!r} cannot be projected: {COMPUTED_IN_FORWARD}; wanted a weight that is a "
            f"parameter or parametrised, as by torch.nn.utils.parametrizations.weight_norm, or layers without it"
        )
    if not uses_its_weight(layer):
        text = f"the layer {layer.name!r} is {layer.note}. Its kernel is bounded, and `norms` leaves the layer out"
        warnings.warn(text, stacklevel=5)


def gathered(weight: torch.Tensor) -> torch.Tensor:
    """Return a tensor without its graph, with the parts of all ranks if it is sharded."""
    return weight.full_tensor() if is_sharded(weight) else weight.detach()


def still_certified(target: Target, weight: torch.Tensor) -> ProjectedWeight | None:
    """Return the weight itself, if its last certificate and its change since then prove it to be within the bound.

    No operator's norm changes by more than `frobenius_bound` of the kernel's change, for any stride, dilation, grouping
    or input size.
    """
    reference, bound = target.reference, target.limit
    if reference is None or reference.kernel.shape != weight.shape or reference.kernel.device != weight.device:
        return None
    least = float(torch.linalg.vector_norm(weight - reference.kernel))  # frobenius_bound of the change is no less
    if any(upper > bound for _, upper in target.layer_uppers([upper + least for upper in reference.uppers])):
        return None
    wide = torch.complex128 if weight.is_complex() else torch.float64
    change = weight.to(wide) - reference.kernel.to(wide)
    drift = frobenius_bound(change, target.operators[0].operator.conv) * (1 + DRIFT_ROUNDING)
    uppers = [upper + drift for upper in reference.uppers]
    within = all(upper <= bound for _, upper in target.layer_uppers(uppers))
    return target.result(weight, uppers) if within else None


def is_simple(target: Target, weight: torch.Tensor) -> bool:
    """Return whether a weight has one operator, and a dtype that needs no rounding."""
    return len(target.operators) == 1 and weight.dtype not in (torch.float16, torch.bfloat16)


def together(targets: Mapping[int, Target], weights: Mapping[int, torch.Tensor]) -> list[list[int]]:
    """Return the keys of targets in groups, each of which one call can rescale: the targets of one geometry."""
    found: dict[Any, list[int]] = {}
    for key, target in targets.items():
        weight = weights[key]
        alike: Any = key
        if is_simple(target, weight):
            alike = (tuple(weight.shape), weight.dtype, weight.device, target.operators[0].operator, target.bound)
        found.setdefault(alike, []).append(key)
    return list(found.values())


def rescaled(targets: Sequence[Target], weights: Sequence[torch.Tensor], headroom: float) -> list[ProjectedWeight]:
    """Return the weights of a group of `together`, each multiplied by a number that brings it within the bound."""
    operator = targets[0].operators[0].operator
    limit = operator.limit(targets[0].limit)
    results = rescale_together(weights, operator.input_shape, operator.conv, limit, headroom=headroom)
    return [target.certify(kernel, [upper]) for target, (kernel, upper) in zip(targets, results, strict=True)]


def projected(target: Target, weight: torch.Tensor, headroom: float, arguments: Mapping[str, Any]) -> ProjectedWeight:
    """Return the weight, in its own dtype, within the bound for each operator.

    Parameters
    ----------
    target : Target
        Its `state` and its `reference` are replaced.
    weight : tensor
    headroom : float
        Share of the bound that a weight above it is left below it.
    arguments : mapping
        Further arguments of `convsv_core.project`.
    """
    (_, first), *others = target.operators
    bound = target.limit
    found = project(weight, first.input_shape, first.conv, first.limit(bound), state=target.state, **arguments)
    target.state = found.state
    kernel, norm = found.kernel, found.norm
    if headroom > 0 and found.distance > 0:
        kernel = kernel * (1 - headroom)
        # Rounding adds to the norm at most eps times the sum of the taps' norms.
        taps = torch.linalg.vector_norm(kernel.flatten(2), dim=(0, 1)).sum()
        norm = norm * (1 - headroom) + torch.finfo(kernel.dtype).eps * taps
    if kernel.dtype != weight.dtype:
        kernel, norms = _rounded(kernel, weight.dtype, [operator for _, operator in target.operators], bound)
        return target.certify(kernel, norms)
    norms = [float(norm)]
    for _, operator in others:
        kernel, upper = _rescaled(kernel, operator, bound)
        norms.append(upper)
    return target.certify(kernel, norms)


def _rescaled(kernel: torch.Tensor, operator: Operator, bound: float) -> tuple[torch.Tensor, float]:
    """Return the kernel, multiplied by at most 1 to bring it within the bound, and the certified norm."""
    found = project(kernel, operator.input_shape, operator.conv, operator.limit(bound), method="rescale")
    return found.kernel, float(found.norm)


def _rounded(
    kernel: torch.Tensor, dtype: torch.dtype, operators: list[Operator], bound: float
) -> tuple[torch.Tensor, list[float]]:
    """Return a kernel of 16 bits near the given one that is within the bound, and the norm of each operator."""
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
