"""Reports on networks: what `convsv_core.analyze` and the command line return, and what writes projected networks.

`analyze` and `analyze_many` themselves are in `convsv_core`.
"""

from convsv_core.reports.analysis import bounds_reports, layer_reports, reshaped_norm
from convsv_core.reports.model_files import read_model, write_model
from convsv_core.reports.project_model import project_layers
from convsv_core.reports.report import (
    BOUNDS,
    QUANTILES,
    Bounds,
    BoundsReport,
    LayerReport,
    ModelReport,
    ProjectionReport,
    Row,
)

__all__ = [
    "BOUNDS",
    "QUANTILES",
    "Bounds",
    "BoundsReport",
    "LayerReport",
    "ModelReport",
    "ProjectionReport",
    "Row",
    "bounds_reports",
    "layer_reports",
    "project_layers",
    "read_model",
    "reshaped_norm",
    "write_model",
]
