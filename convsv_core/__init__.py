"""Compute exact singular values of convolutional layers, on the arrays of any library.

A `Conv` describes the layer. The weights are an array. Every function takes the spatial extents of the layer's input.
Results are arrays of the caller's library, on the caller's device.

>>> import numpy as np
>>> import convsv_core as convsv
>>> kernel = np.random.default_rng(0).normal(size=(8, 4, 3, 3))
>>> convsv.singular_values(kernel, (16, 16), convsv.Conv("OIHW")).shape
(1024,)
"""

from convsv_core import penalties
from convsv_core._norm.bounds import NormBounds, norm_bounds
from convsv_core._norm.fixed_grid import norm_upper_bound
from convsv_core._projection.clipping import clip
from convsv_core._projection.direction import DirectionState, SteepestDirection, steepest_direction
from convsv_core._projection.orthogonal import NearestOrthogonal, nearest_orthogonal, orthogonal_kernel
from convsv_core._projection.projection import Projection, ProjectionState, project
from convsv_core._spectrum.numbers import condition_number, frobenius_norm, log_abs_det, operator_norm, stable_rank
from convsv_core._spectrum.values import frequency_singular_values, singular_values
from convsv_core._spectrum.vectors import SVD, svd
from convsv_core._symbol.matrices import symbol
from convsv_core.backend import Backend
from convsv_core.conv import Conv
from convsv_core.plugins import BackendInfo, backends, hookimpl
from convsv_core.reports.analysis import analyze
from convsv_core.reports.comparison import Comparison, compare
from convsv_core.reports.constant import lipschitz
from convsv_core.reports.constant_report import Lipschitz
from convsv_core.reports.many import analyze_many
from convsv_core.reports.network_report import Report
from convsv_core.reports.report import ModelReport

__all__ = [
    "SVD",
    "Backend",
    "BackendInfo",
    "Comparison",
    "Conv",
    "DirectionState",
    "Lipschitz",
    "ModelReport",
    "NearestOrthogonal",
    "NormBounds",
    "Projection",
    "ProjectionState",
    "Report",
    "SteepestDirection",
    "analyze",
    "analyze_many",
    "backends",
    "clip",
    "compare",
    "condition_number",
    "frequency_singular_values",
    "frobenius_norm",
    "hookimpl",
    "lipschitz",
    "log_abs_det",
    "nearest_orthogonal",
    "norm_bounds",
    "norm_upper_bound",
    "operator_norm",
    "orthogonal_kernel",
    "penalties",
    "project",
    "singular_values",
    "stable_rank",
    "steepest_direction",
    "svd",
    "symbol",
]

__version__ = "0.1.0"
