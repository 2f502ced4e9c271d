"""Batch normalisations, alone or with the layer that they follow, and the bound of what both do in evaluation mode.

The weight of the normalisation is what is changed. In training a normalisation divides by the spread of the layer's
outputs, so a smaller kernel soon comes with a smaller running variance, and the composition stays as large as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from convsv_adapters._layers import ConvLayer, geometry_of
from convsv_adapters.torch._folding import scale_of, scaled_kernel
from convsv_adapters.torch._targets import DRIFT_ROUNDING, Target, gathered, refuse_layer
from convsv_core.training import Rescaling, frobenius_bound, rescaling_factors

__all__ = ["Measured", "Part", "PartFactor", "make_parts", "multiply", "part_factors"]


GAP = 0.02
"""Largest gap of an upper bound that is carried over from an earlier step, as a share of the bound of the norm.

A layer above the bound is multiplied by a number from such an upper bound, without a test of its kernel. A guess: it is
twice the default headroom.
"""


class PartFactor(NamedTuple):
    """The number by which a normalisation's weight is multiplied, and the certified norm of the part afterwards."""

    factor: float
    norm: float


class Measured(NamedTuple):
    """The numbers of a part at one time.

    Attributes
    ----------
    scale : tensor, float64
        The normalisation's scale of each channel.
    weight : tensor or None
        The kernel of the layer without the normalisation. None if the normalisation stands alone.
    kernel : tensor, at least float32
        The kernel of both.
    """

    scale: torch.Tensor
    weight: torch.Tensor | None
    kernel: torch.Tensor


@dataclass(frozen=True, eq=False)
class Tested:
    """The numbers of a part, and certified upper bounds of the norms of its operators after a product with `factor`."""

    measured: Measured
    factor: float
    uppers: list[float]


class Carried(NamedTuple):
    """Upper bounds of the norms of a part's operators that follow from an earlier certificate.

    Attributes
    ----------
    uppers : list of float
    gap : float
        Each norm is at most about so far below its upper bound, if the earlier bounds are the norms.
    """

    uppers: list[float]
    gap: float


@dataclass(eq=False)
class Part(Target):
    """A normalisation with the layer that it follows, or alone.

    Attributes
    ----------
    tested : Tested or None
        The last test, until it is known by which factor the normalisation's weight is multiplied.
    certified : Tested or None
        The last certificate. Its factor has been multiplied into the weight of the normalisation since.
    """

    tested: Tested | None = field(default=None, repr=False)
    certified: Tested | None = field(default=None, repr=False)

    @property
    def normalisation(self) -> nn.Module:
        """The normalisation."""
        return self.layer.normalisation

    @property
    def alone(self) -> bool:
        """Return whether the normalisation follows no layer."""
        return self.layer.module is self.layer.normalisation

    def measure(self, variance: torch.Tensor) -> Measured:
        """Return the numbers of the part for a running variance."""
        weight = gathered(self.normalisation.weight)
        scale = scale_of(self.normalisation, weight, variance)
        if self.alone:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            return Measured(scale, None, scale.to(dtype).reshape(self.layer.kernel_shape))
        weight = self.gathered()
        return Measured(scale, weight, scaled_kernel(weight, scale, geometry_of(self.layer)))

    def rounding(self, kernel: torch.Tensor) -> float:
        """Return an upper bound of the norm's change where each entry of a kernel has an error of at most two eps.

        The change is at most the errors' sizes, summed over the taps.
        """
        taps = torch.linalg.vector_norm(kernel.flatten(2), dim=(0, 1)).sum()
        return 2 * torch.finfo(kernel.dtype).eps * float(taps)

    def layer_norm(self, uppers: Sequence[float]) -> float:
        """Return the largest norm of the layer, from upper bounds of the norms of its operators."""
        return max(upper for _, upper in self.layer_uppers(uppers))

    def carried(self, measured: Measured) -> Carried | None:
        """Return what the last certificate, and the changes since then, prove of the part; None without a certificate.

        A change of the scale alone is the product with a diagonal map, whose norm is the largest quotient of new and
        old scale. The change of the layer's own kernel, at the new scale, adds at most its `frobenius_bound`.
        """
        last = self.certified
        if last is None or last.measured.kernel.shape != measured.kernel.shape:
            return None
        if last.measured.kernel.device != measured.kernel.device:
            return None
        old, new = last.measured.scale.abs() * last.factor, measured.scale.abs()
        quotients = torch.where(old > 0, new / old, torch.where(new > 0, torch.inf, 1.0))
        least, growth = float(quotients.min()), float(quotients.max()) * (1 + DRIFT_ROUNDING)
        drift = 0.0
        if measured.weight is not None and last.measured.weight is not None:
            conv = geometry_of(self.layer)
            wide = torch.promote_types(measured.weight.dtype, torch.float64)
            change = scaled_kernel(measured.weight.to(wide) - last.measured.weight.to(wide), measured.scale, conv)
            drift = float(torch.linalg.vector_norm(change))  # `frobenius_bound` of the change is no less
            if drift <= self.limit:
                drift = frobenius_bound(change, conv) * (1 + DRIFT_ROUNDING)
            else:
                return None
        uppers = [upper * growth + drift for upper in last.uppers]
        return Carried(uppers, (growth - least) * max(last.uppers) + 2 * drift)

    def keep(self, factor: float) -> None:
        """Keep the last test as a certificate, for a factor that is not larger than the tested one."""
        if self.tested is not None:
            smaller = _quotient(factor, self.tested.factor)
            error = self.rounding(self.tested.measured.kernel) * factor
            uppers = [upper * smaller + error for upper in self.tested.uppers]
            scale, weight, kernel = self.tested.measured
            kept = Measured(
                scale, None if weight is None else weight.clone(), kernel
            )  # the optimizer writes to weights
            self.certified = Tested(kept, factor, uppers)
        self.tested = None


def make_parts(bounded: Iterable[tuple[ConvLayer, float]], circular: bool) -> list[Part]:
    """Return the parts of layers with normalisations, each with its bound.

    Raises
    ------
    TypeError, ValueError
        A part cannot be bounded, or extents are needed that are not known.
    """
    parts = []
    for layer, bound in bounded:
        norm = layer.normalisation
        refuse_layer(layer)
        if norm._parameters.get("weight") is None:
            kind = "is parametrised" if nn.utils.parametrize.is_parametrized(norm, "weight") else "has no weight"
            raise ValueError(
                f"the normalisation behind the layer {layer.name!r} {kind}, so its scale cannot be made smaller, and a "
                f"smaller kernel would soon have a smaller running variance: wanted affine=True, or batch_norm=None"
            )
        part = Part(layer, bound)
        part.add(layer, circular)
        parts.append(part)
    return parts


def part_factors(
    parts: Mapping[int, Part], measured: Mapping[int, Measured], headroom: float
) -> Iterator[tuple[int, PartFactor]]:
    """Yield, for each key, the factor with which the part is within its bound, and the norm that it then has.

    Parameters
    ----------
    parts : mapping
        Parts of one of the groups that `together` makes.
    measured : mapping
        The numbers of each part.
    headroom : float
        As for `StepOptions`.
    """
    left = []
    for key, part in parts.items():
        carried = part.carried(measured[key])
        norm = math.inf if carried is None else part.layer_norm(carried.uppers)
        if norm <= part.limit:
            yield key, _with_rounding(part, measured[key], 1.0, norm)
        elif carried is not None and carried.gap <= GAP * part.limit:
            factor = (1 - headroom) * part.limit / norm
            yield key, _with_rounding(part, measured[key], factor, (1 - headroom) * part.limit)
        else:
            left.append(key)
    if not left:
        return
    first = parts[left[0]]
    tests: list[list[Rescaling]] = [[] for _ in left]
    for _, operator in first.operators:  # parts of several operators are groups of their own
        limit = operator.limit(first.limit)
        chosen = [measured[key].kernel for key in left]
        results = rescaling_factors(chosen, operator.input_shape, operator.conv, limit, headroom=headroom)
        for test, result in zip(tests, results, strict=True):
            test.append(result)
    for key, test in zip(left, tests, strict=True):
        factor = min(one.factor for one in test)
        uppers = [one.upper * _quotient(factor, one.factor) for one in test]
        parts[key].tested = Tested(measured[key], factor, uppers)
        yield key, _with_rounding(parts[key], measured[key], factor, parts[key].layer_norm(uppers))


def _with_rounding(part: Part, measured: Measured, factor: float, norm: float) -> PartFactor:
    """Return a factor and a norm that hold for the exact product of scale and layer too, which the kernel rounds.

    The rounding error is as a rule far less than the distance of `Target.limit` from the bound.
    """
    padding = max(operator.padding_norm for _, operator in part.operators)
    upper = norm + part.rounding(measured.kernel) * padding * factor
    if upper <= part.bound:
        return PartFactor(factor, upper)
    return PartFactor(factor * part.bound / upper * (1 - torch.finfo(torch.float64).eps), part.bound)


def _quotient(factor: float, own: float) -> float:
    """Return the share of a factor in another, which is not smaller; rounding included."""
    return 1.0 if factor == own else factor / own * (1 + 2 * torch.finfo(torch.float64).eps)


def multiply(parts: Sequence[Part], found: Sequence[PartFactor]) -> dict[str, float]:
    """Multiply the weights of normalisations by the smallest factor of their parts, and return the parts' norms.

    The stored weight is rounded so that no entry is larger than the exact product.
    """
    smallest: dict[int, float] = {}
    for part, one in zip(parts, found, strict=True):
        key = id(part.normalisation.weight)
        smallest[key] = min(smallest.get(key, 1.0), one.factor)
    norms: dict[str, float] = {}
    changed: set[int] = set()
    for part, one in zip(parts, found, strict=True):
        weight = part.normalisation.weight
        factor = smallest[id(weight)]
        if factor < 1 and id(weight) not in changed:
            weight.mul_(factor * (1 - torch.finfo(weight.dtype).eps))
            changed.add(id(weight))
        norm = one.norm * _quotient(factor, one.factor)
        part.keep(factor)
        norms[part.layer.name] = max(norms.get(part.layer.name, 0.0), norm)
    return norms
