"""Say what a page on two networks shows: the largest changes, the networks' constants, and what was not compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

from convsv_core.reports import difference_charts, sentences, texts
from convsv_core.reports.comparison import Comparison
from convsv_core.reports.constant_report import Lipschitz
from convsv_core.reports.page_parts import Content, figure_part, origins_part, plain_table, table_part
from convsv_core.reports.plain_table import lay_out

__all__ = ["content_of"]

MODELS = {"a": "the first", "b": "the second", "both": "both"}
"""How a page calls the models that `Unmatched.model` names."""

CONSTANT_MEANING = (
    "An upper bound of the factor by which the whole network stretches the difference of two inputs, in Euclidean "
    "norms. The difference of two constants is not a bound of how far the outputs of the networks are apart."
)
"""The page says with this what the constant of a network is."""


def content_of(report: Comparison) -> Content:
    """Return the page on the differences of two networks."""
    view = report.view
    shares, differences = difference_charts.shares_chart(report), difference_charts.differences_chart(report)
    names = [str(report.about.get(key, number)) for key, number in (("model", "first"), ("other", "second"))]
    origins = [(column.heading, column.meaning, column.origin) for column in view.columns]
    if report.lipschitz:
        origins.append(("Lipschitz constant", CONSTANT_MEANING, "certified"))
    left_out = sum(bool(row.share) for row in report) - difference_charts.MOST_BARS
    more = f"{left_out} layers with smaller shares are in the table. " if left_out > 0 else ""
    drawn = {"shares": shares, "differences": differences}
    return Content(
        report.title or "A comparison of two networks",
        view.subtitle,
        [*sentences.of_differences(report), *_on_constants(report.lipschitz), *_on_unmatched(report)],
        [
            figure_part(
                "shares",
                "The largest relative differences",
                shares,
                f"{more}Point at a layer for its figures, and click to pick it out here and in the table.",
            ),
            figure_part(
                "differences",
                "Differences and norms along the network",
                differences,
                "Upper bounds. Layers with equal weights have no point of the difference on a logarithmic axis.",
            ),
            _constants(names, report.lipschitz),
            table_part(lay_out(report, "", view)),
            _unmatched(report),
            origins_part(origins),
        ],
        {name: chart for name, chart in drawn.items() if chart is not None},
    )


def _on_constants(constants: Sequence[Lipschitz]) -> list[str]:
    """Return a sentence on the constants of the two networks, if they were asked for."""
    if not constants:
        return []
    first, second = (one.log10_upper for one in constants)
    if not all(map(math.isfinite, (first, second))):
        return ["Not both networks have a certified Lipschitz constant; see the table of the networks."]
    shown = " and ".join(texts.power_up(one) for one in (first, second))
    return [f"The Lipschitz constants of the networks are at most {shown}."]


def _on_unmatched(report: Comparison) -> list[str]:
    count = len(report.unmatched)
    if not count:
        return []
    return [f"{'1 layer was' if count == 1 else f'{count} layers were'} not compared, for the reasons below the table."]


def _constants(names: Sequence[str], constants: Sequence[Lipschitz]) -> str:
    """Return the section with the constants of the two networks, if they were asked for."""
    if not constants:
        return ""
    rows = [(name, *_constant_cells(one)) for name, one in zip(names, constants, strict=True)]
    headings = ("network", "Lipschitz constant, at most", "log10", "product of all factors", "nodes without a bound")
    return f"<section><h2>The two networks</h2>{plain_table(headings, rows)}</section>"


def _constant_cells(constant: Lipschitz) -> tuple[str, ...]:
    missing = ", ".join(one.name for one in constant.missing) or "none"
    return (
        texts.power_up(constant.log10_upper),
        texts.logarithm_up(constant.log10_upper),
        texts.power_up(constant.log10_product),
        missing,
    )


def _unmatched(report: Comparison) -> str:
    """Return the section with the layers that were not compared, if there are any."""
    if not report.unmatched:
        return ""
    rows = [(one.name, MODELS.get(one.model, one.model), one.reason) for one in report.unmatched]
    return f"<section><h2>Not compared</h2>{plain_table(('layer', 'model', 'reason'), rows)}</section>"
