"""Batch normalisations, alone or with the layer that they follow, and the bound of what both do in evaluation mode.

The weight of the normalisation is what is changed. In training a normalisation divides by the spread of the layer's
outputs, so a smaller kernel soon comes with a smaller running variance, and the composition stays as large as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from convsv_adapters._layers import ConvLayer, geometry_of
from convsv_adapters.torch._folding import scale_of, scaled_kernel
from convsv_adapters.torch._targets import (
    Certified,
    Target,
    gathered,
    refuse_layer,
    still_certified,
)
from convsv_core.training import Rescaling, rescaling_factors

__all__ = ["Part", "PartFactor", "make_parts", "multiply", "part_factors"]


class PartFactor(NamedTuple):
    """The number by which a normalisation's weight is multiplied, and the certified norm of the part afterwards."""

    factor: float
    norm: float


@dataclass(frozen=True, eq=False)
class Tested:
    """A kernel, a factor, and certified upper bounds of the norms of a part's operators for their product."""

    kernel: torch.Tensor
    factor: float
    uppers: list[float]


@dataclass(eq=False)
class Part(Target):
    """A normalisation with the layer that it follows, or alone.

    Attributes
    ----------
    tested : Tested or None
        The last test, until it is known by which factor the normalisation's weight is multiplied.
    """

    tested: Tested | None = field(default=None, repr=False)

    @property
    def normalisation(self) -> nn.Module:
        """The normalisation."""
        return self.layer.normalisation

    @property
    def alone(self) -> bool:
        """Whether the normalisation follows no layer."""
        return self.layer.module is self.layer.normalisation

    def kernel(self, variance: torch.Tensor) -> torch.Tensor:
        """Return the kernel of layer and normalisation for a running variance, in at least float32."""
        scale = scale_of(self.normalisation, gathered(self.normalisation.weight), variance)
        if self.alone:
            dtype = torch.promote_types(self.normalisation.weight.dtype, torch.float32)
            return scale.to(dtype).reshape(self.layer.kernel_shape)
        return scaled_kernel(self.gathered(), scale, geometry_of(self.layer))

    def rounding(self, kernel: torch.Tensor) -> float:
        """Return an upper bound of the norm's change where each entry of a kernel has an error of at most two eps.

        The change is at most the errors' sizes, summed over the taps.
        """
        taps = torch.linalg.vector_norm(kernel.flatten(2), dim=(0, 1)).sum()
        return 2 * torch.finfo(kernel.dtype).eps * float(taps)

    def layer_norm(self, uppers: Sequence[float]) -> float:
        """Return the largest norm of the layer, from upper bounds of the norms of its operators."""
        return max(upper for _, upper in self.layer_uppers(uppers))

    def keep(self, factor: float) -> None:
        """Keep the last test as a certificate, for a factor that is not larger than the tested one."""
        if self.tested is None:
            return
        kernel = self.tested.kernel * factor
        smaller = _quotient(factor, self.tested.factor)
        error = self.rounding(kernel)
        self.reference = Certified(kernel, [upper * smaller + error for upper in self.tested.uppers])
        self.tested = None


def make_parts(layers: Sequence[ConvLayer], circular: bool, bounds: Sequence[float]) -> list[Part]:
    """Return the parts of layers with normalisations, each with its bound.

    Raises
    ------
    TypeError, ValueError
        A part cannot be bounded, or extents are needed that are not known.
    """
    parts = []
    for layer, bound in zip(layers, bounds, strict=True):
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
    parts: Mapping[int, Part], kernels: Mapping[int, torch.Tensor], headroom: float
) -> Iterator[tuple[int, PartFactor]]:
    """Yield, for each key, the factor with which the part is within its bound, and the norm that it then has.

    Parameters
    ----------
    parts : mapping
        Parts of one of the groups that `together` makes.
    kernels : mapping
        The kernel of each part.
    headroom : float
        As for `StepOptions`.
    """
    left = []
    for key, part in parts.items():
        found = still_certified(part, kernels[key])
        if found is None:
            left.append(key)
        else:
            yield key, _with_rounding(part, kernels[key], 1.0, max(found.norms.values()))
    if not left:
        return
    first = parts[left[0]]
    tests: list[list[Rescaling]] = [[] for _ in left]
    for _, operator in first.operators:  # parts of several operators are groups of their own
        limit = operator.limit(first.limit)
        chosen = [kernels[key] for key in left]
        results = rescaling_factors(chosen, operator.input_shape, operator.conv, limit, headroom=headroom)
        for test, result in zip(tests, results, strict=True):
            test.append(result)
    for key, test in zip(left, tests, strict=True):
        factor = min(one.factor for one in test)
        uppers = [one.upper * _quotient(factor, one.factor) for one in test]
        parts[key].tested = Tested(kernels[key], factor, uppers)
        yield key, _with_rounding(parts[key], kernels[key], factor, parts[key].layer_norm(uppers))


def _with_rounding(part: Part, kernel: torch.Tensor, factor: float, norm: float) -> PartFactor:
    """Return a factor and a norm that hold for the exact product of scale and layer too, which `kernel` rounds.

    The rounding error is as a rule far less than the distance of `Target.limit` from the bound.
    """
    upper = norm + part.rounding(kernel) * max(operator.padding_norm for _, operator in part.operators) * factor
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
