"""Penalties that are a function of one norm of each layer, for norms that are computed together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from convsv_adapters._layers import ConvLayer, own_padding, squared_excess
from convsv_adapters.torch._norms import NormOf
from convsv_core.layers import circular_geometry, lattice

__all__ = ["NormTerm", "norm_term"]

RTOL = 0.1
"""The default tolerance of `convsv_core.norm_upper_bound`."""


class NormTerm(NamedTuple):
    """Hold a penalty of a layer that is a function of one norm.

    Attributes
    ----------
    kind : {"norm_hinge", "squared_norm", "log_lipschitz"}
    norm : NormOf
    number : float
        The bound of "norm_hinge", and the logarithm of the padding's norm for "log_lipschitz".
    """

    kind: str
    norm: NormOf
    number: float = 0.0

    def penalty(self, norms: torch.Tensor) -> torch.Tensor:
        """Return the penalties from the norms, as `convsv_adapters._layers.layer_penalty` defines them."""
        if self.kind == "squared_norm":
            return norms**2
        if self.kind == "norm_hinge":
            return squared_excess(norms, self.number)
        least = torch.full_like(norms, torch.finfo(norms.dtype).smallest_normal)
        return torch.log(torch.where(norms <= least, least, norms)) + self.number


def norm_term(layer: ConvLayer, kind: str, options: Mapping[str, Any]) -> NormTerm | None:
    """Return a penalty of a layer as a function of one norm, or None where `layer_penalty` has to compute it.

    It is None for options that are not plain numbers, or not those of the penalty: `layer_penalty` checks them.
    """
    if layer.conv is None or not all(_is_plain(value) for value in options.values()):
        return None
    if kind == "log_lipschitz" and set(options) <= {"rtol"}:
        own, padding = own_padding(layer)
        return NormTerm(kind, NormOf(own, None, options.get("rtol", RTOL)), padding)
    largest = layer.largest_input_shape
    if kind == "norm_hinge" and set(options) == {"bound"}:
        return NormTerm(kind, _norm(layer, largest, RTOL), options["bound"])
    if kind == "squared_norm" and set(options) <= ({"rtol"} if largest is None else set()):
        return NormTerm(kind, _norm(layer, largest, options.get("rtol", RTOL)))
    return None


def _norm(layer: ConvLayer, largest: tuple[int, ...] | None, rtol: float) -> NormOf:
    assert layer.conv is not None
    if largest is None:
        return NormOf(lattice(layer.conv), None, rtol)
    extents, circular = circular_geometry(layer.conv, largest)
    return NormOf(circular, extents, RTOL)


def _is_plain(value: object) -> bool:
    """Tell whether an option is a number that every penalty accepts."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
