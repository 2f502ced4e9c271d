"""Provide the functions of the core that adapters call in a training step."""

from __future__ import annotations

from convsv_core._norm.tap_bounds import frobenius_bound
from convsv_core._norm.together import NormGroup, Norms, norms_of_groups, norms_together
from convsv_core._projection.candidates import DIRECTION_METHODS, DirectionMethod, check_direction_method
from convsv_core._projection.certificate import CERTIFICATE_RTOL
from convsv_core._projection.directions_together import DirectionStep, direction_rise, steepest_together
from convsv_core._projection.projection import METHODS, ProjectionMethod
from convsv_core._projection.rescale import Rescaling, rescale_together, rescaling_factors

__all__ = [
    "CERTIFICATE_RTOL",
    "DIRECTION_METHODS",
    "METHODS",
    "DirectionMethod",
    "DirectionStep",
    "NormGroup",
    "Norms",
    "ProjectionMethod",
    "Rescaling",
    "check_direction_method",
    "direction_rise",
    "frobenius_bound",
    "norms_of_groups",
    "norms_together",
    "rescale_together",
    "rescaling_factors",
    "steepest_together",
]
