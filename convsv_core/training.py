"""The pieces of the core that adapters call in a training step."""

from __future__ import annotations

from convsv_core.certificate import CERTIFICATE_RTOL
from convsv_core.projection import METHODS, ProjectionMethod
from convsv_core.rescaling import rescale_together
from convsv_core.threshold import frobenius_bound

__all__ = ["CERTIFICATE_RTOL", "METHODS", "ProjectionMethod", "frobenius_bound", "rescale_together"]
