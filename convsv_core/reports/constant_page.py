"""Write a page for a browser about the Lipschitz constant of a network: its bound along the graph, and its blocks."""

from __future__ import annotations

import math

from convsv_core.reports import constant_charts, texts
from convsv_core.reports.constant_report import Lipschitz
from convsv_core.reports.constant_views import default_title, nodes_table, sentences_of, subtitle_of
from convsv_core.reports.page_parts import Content, figure_part, origins_part, plain_table, table_part, written

__all__ = ["constant_page"]

MEANINGS = (
    (
        "constant",
        "An upper bound of the factor by which the network stretches the difference of two inputs, in Euclidean norms "
        "of whole tensors. Maps in a row multiply their bounds, a sum of branches adds them, and linear maps in a row "
        "are put together before norms are taken.",
        "certified",
    ),
    (
        "factor",
        "An upper bound of the factor by which one node alone stretches the difference of two inputs.",
        "certified",
    ),
    ("log10 bound", "The decimal logarithm of the bound of the node's tensor, rounded up.", "certified"),
    (
        "plain product",
        "The bound from one factor for each node, where maps in a row multiply and branches add, and no maps are put "
        "together.",
        "certified",
    ),
)
"""The heading, the meaning and the origin of each figure of a network."""

ATTAINED = (
    "attained",
    "The norm of the network's Jacobian at an example or random input, by power iteration from below. The "
    "constant is at least that.",
    "attained",
)
"""The meaning of the lower bound."""

BLOCKS = (
    "blocks",
    "A residual block is S x + f(x) with a linear shortcut S, as a rule the identity. If the constant of f is at most "
    "c, then all singular values of the block's Jacobian lie between the smallest one of S less c and the norm of S "
    "plus c, at every input. Where the lower end is above 0, the Jacobian has full rank, and a block whose input and "
    "output have one size is invertible. A lower end that is not known is a dash in the table, and 0 in the chart.",
    "certified",
)
"""The meaning of the intervals of residual blocks."""


def constant_page(found: Lipschitz, title: str = "") -> str:
    """Return the figures of a network's Lipschitz constant as the content of an HTML file."""
    growth, blocks = constant_charts.growth_chart(found), constant_charts.blocks_chart(found)
    table = nodes_table(found)._replace(notes=[])
    origins = [*MEANINGS, *([ATTAINED] if found.lower else []), *([BLOCKS] if found.blocks else [])]
    return written(
        Content(
            title or default_title(found),
            subtitle_of(found),
            sentences_of(found),
            [
                figure_part(
                    "growth",
                    "The bound along the graph",
                    growth,
                    "Line: the bound up to each node. Bars: the factors of the nodes alone. One unit is a factor of "
                    "ten. Point at a node for its figures, and click to pick it out here and in the table.",
                ),
                figure_part(
                    "blocks",
                    "Residual blocks",
                    blocks,
                    "All singular values of a block lie in its interval, at every input. The dashed line is 1, where a "
                    "block changes no length.",
                ),
                _blocks(found),
                _missing(found),
                table_part(table, "Node"),
                origins_part(origins),
            ],
            {name: chart for name, chart in (("growth", growth), ("blocks", blocks)) if chart is not None},
        )
    )


def _blocks(found: Lipschitz) -> str:
    """Return the table of the residual blocks, if there are any."""
    if not found.blocks:
        return ""
    rows = [
        (
            block.name,
            block.start,
            texts.rounded_up(block.shortcut_upper),
            texts.rounded_up(block.branch_upper) if math.isfinite(block.branch_upper) else "none",
            texts.rounded_down(block.smallest_singular_value),
            texts.rounded_up(block.largest_singular_value) if math.isfinite(block.branch_upper) else "none",
            "yes" if block.smallest_singular_value else "not shown",
        )
        for block in found.blocks
    ]
    headings = (
        "block",
        "begins at",
        "shortcut, at most",
        "branch, at most",
        "singular values, at least",
        "at most",
        "full rank",
    )
    return f"<section><h2>The blocks in figures</h2>{plain_table(headings, rows)}</section>"


def _missing(found: Lipschitz) -> str:
    """Return the table of the nodes without a bound, if there are any."""
    if not found.missing:
        return ""
    rows = [
        (one.name, one.op, one.reason, texts.logarithm_up(one.log10_before) if one.log10_before < math.inf else "none")
        for one in found.missing
    ]
    headings = ("node", "op", "reason", "log10 of the bound up to it")
    return f"<section><h2>Nodes without a bound</h2>{plain_table(headings, rows)}</section>"
