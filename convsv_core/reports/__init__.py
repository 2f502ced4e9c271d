"""Reports on networks: what `convsv_core.analyze` and the command line return, and what writes projected networks.

`analyze` and `analyze_many` themselves are in `convsv_core`.
"""

from convsv_core.reports import texts
from convsv_core.reports.analysis import bounds_reports, layer_reports, reshaped_norm
from convsv_core.reports.comparison import Comparison, difference_reports
from convsv_core.reports.extras import import_for
from convsv_core.reports.matching import Matching, Pair, Unmatched, match_layers
from convsv_core.reports.model_files import files_of_model, read_model, write_model
from convsv_core.reports.network_report import Report, figures_of
from convsv_core.reports.orders import SortKey, descending
from convsv_core.reports.plain_table import TextColumn, TextTable, lay_out
from convsv_core.reports.project_model import project_layers
from convsv_core.reports.report import (
    BOUNDS,
    QUANTILES,
    Bounds,
    BoundsReport,
    DifferenceReport,
    LayerReport,
    ModelReport,
    ProjectionReport,
    Row,
)
from convsv_core.reports.views import (
    ANY_SORT_KEYS,
    DIFFERENCE,
    GEOMETRY_FIELDS,
    NORM,
    SPECTRUM,
    Column,
    View,
    projection_view,
    spectrum_view,
)

__all__ = [
    "ANY_SORT_KEYS",
    "BOUNDS",
    "DIFFERENCE",
    "GEOMETRY_FIELDS",
    "NORM",
    "QUANTILES",
    "SPECTRUM",
    "Bounds",
    "BoundsReport",
    "Column",
    "Comparison",
    "DifferenceReport",
    "LayerReport",
    "Matching",
    "ModelReport",
    "Pair",
    "ProjectionReport",
    "Report",
    "Row",
    "SortKey",
    "TextColumn",
    "TextTable",
    "Unmatched",
    "View",
    "bounds_reports",
    "descending",
    "difference_reports",
    "figures_of",
    "files_of_model",
    "import_for",
    "lay_out",
    "layer_reports",
    "match_layers",
    "project_layers",
    "projection_view",
    "read_model",
    "reshaped_norm",
    "spectrum_view",
    "texts",
    "write_model",
]
