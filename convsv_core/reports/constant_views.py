"""Show a network's Lipschitz constant as a table of its nodes: in a notebook, in pandas, in a page and in a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from convsv_core.reports import texts
from convsv_core.reports.curves import Plot, empty_figure
from convsv_core.reports.extras import import_for
from convsv_core.reports.plain_table import TextColumn, TextTable

if TYPE_CHECKING:
    from convsv_core._network.blocks import ResidualBlock
    from convsv_core.reports.constant_report import Lipschitz, LipschitzNode

__all__ = ["default_title", "nodes_frame", "nodes_table", "plot_constant", "sentences_of", "subtitle_of"]

LEGEND = (
    "factor: a certified bound of the factor by which the node alone stretches the difference of two inputs; of "
    "several inputs, the largest one. log10 bound: the decimal logarithm of the bound of the node's tensor, as a "
    "function of the network's inputs. It may be less than the sum of the factors, because linear maps in a row are "
    "bounded together."
)
"""The text below the table of nodes."""

MOST_NODES = 3
"""The number of nodes that the summary names (a guess: what people read)."""

MOST_BLOCKS = 5
"""The largest number of blocks that the summary names (a guess)."""

FIGURE_SIZE = (9.0, 4.8)
"""The width and the height of the figure, in inches (a guess)."""


def subtitle_of(found: Lipschitz) -> str:
    """Return what the figures are, with the certified constant."""
    certified = "none" if found.missing else f"at most {texts.power_up(found.log10_upper)}"
    return f"certified Lipschitz constant at inference, in Euclidean norms of whole tensors: {certified}"


def default_title(found: Lipschitz) -> str:
    """Return the title of a network of which nobody knows the name."""
    return f"A network with the output {found.output}" if found.output else "A network"


def nodes_table(found: Lipschitz, title: str = "") -> TextTable:
    """Return the table of the nodes as texts, in the order of execution."""
    nodes = found.nodes
    columns = [
        TextColumn("node", [node.name for node in nodes]),
        TextColumn("op", [node.op for node in nodes]),
        TextColumn("factor", [texts.power_up(node.log10_factor) for node in nodes], True, _factors(nodes)),
        TextColumn("log10\nfactor", [texts.logarithm_up(node.log10_factor) for node in nodes], True, _factors(nodes)),
        TextColumn(
            "log10\nbound",
            [texts.logarithm_up(node.log10_upper) for node in nodes],
            True,
            [node.log10_upper for node in nodes],
        ),
    ]
    if any(node.note for node in nodes):
        columns.append(TextColumn("note", [node.note for node in nodes]))
    heading = f"{title or default_title(found)}\n{subtitle_of(found)}"
    return TextTable(heading, columns, (), [LEGEND], sentences_of(found))


def _factors(nodes: Sequence[LipschitzNode]) -> list[float | None]:
    return [node.log10_factor for node in nodes]


def nodes_frame(found: Lipschitz) -> Any:
    """Return a `pandas.DataFrame` with a row for each node.

    Raises
    ------
    ModuleNotFoundError
        pandas is not installed.
    """
    pandas = import_for("pandas", "to_pandas()", "pandas")
    fields = ["name", "op", "log10_factor", "log10_upper", "note"]
    return pandas.DataFrame([[getattr(node, field) for field in fields] for node in found.nodes], columns=fields)


def sentences_of(found: Lipschitz) -> list[str]:
    """Return what a person should know of a network's constant first."""
    return [*_on_bound(found), *_on_lower(found), *_on_nodes(found), *_on_blocks(found.blocks)]


def _on_bound(found: Lipschitz) -> list[str]:
    """Return the certified constant beside the plain product, or which nodes have no bound."""
    if found.missing:
        first = found.missing[0]
        count = "1 node has" if len(found.missing) == 1 else f"{len(found.missing)} nodes have"
        before = (
            f" The bound up to it is {texts.power_up(first.log10_before)}." if first.log10_before < math.inf else ""
        )
        return [
            f"The network has no certified constant: {count} no bound. The first is {first.name} ({first.op}): "
            f"{first.reason}.{before}"
        ]
    said = f"The Lipschitz constant of the network is certified to be at most {texts.power_up(found.log10_upper)}."
    gained = found.log10_product - found.log10_upper
    if not math.isfinite(gained):
        return [said]
    product = texts.power_up(found.log10_product)
    return [
        f"{said} The plain product of one factor for each node is {product}, which is 10^{gained:.2f} times as much."
        if gained > 2
        else f"{said} The plain product of one factor for each node is {product}, {10**gained:.2f} times as much."
    ]


def _on_lower(found: Lipschitz) -> list[str]:
    """Return what factor an input attains, and how far the bound is from it."""
    if not found.lower:
        return []
    said = f"At one input the network stretches a small change by {texts.rounded_down(found.lower)}"
    if not math.isfinite(found.log10_upper):
        return [f"{said}, so that every Lipschitz constant is at least that."]
    apart = texts.power_up(found.log10_upper - math.log10(found.lower))
    return [f"{said}, so that the constant is at least that; the two are a factor of {apart} apart."]


def _on_nodes(found: Lipschitz) -> list[str]:
    """Return the nodes with the largest factors."""
    known = sorted(
        (node for node in found.nodes if 0 < node.log10_factor < math.inf), key=lambda node: -node.log10_factor
    )
    if not known:
        return []
    shown = [f"{node.name} ({node.op}) with {texts.power_up(node.log10_factor)}" for node in known[:MOST_NODES]]
    return [
        f"The largest factors are those of {_listed(shown)}."
        if shown[1:]
        else f"The largest factor is that of {shown[0]}."
    ]


def _on_blocks(blocks: Sequence[ResidualBlock]) -> list[str]:
    """Return which residual blocks are shown to have full rank."""
    if not blocks:
        return []
    other = [block.name for block in blocks if not block.smallest_singular_value]
    noun = "residual block" if len(blocks) == 1 else "residual blocks"
    if not other:
        of_them = f"The {noun} is" if len(blocks) == 1 else f"All {len(blocks)} {noun} are"
        return [f"{of_them} proved to have full rank at every input: invertible, if input and output have one size."]
    named = other[:MOST_BLOCKS] + ([f"{len(other) - MOST_BLOCKS} more"] if len(other) > MOST_BLOCKS else [])
    verb = "is" if len(other) == 1 else "are"
    return [
        f"{len(other)} of {len(blocks)} {noun} {verb} not shown to be invertible, because no positive bound of the "
        f"singular values is known: {_listed(named)}."
    ]


def _listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plot_constant(found: Lipschitz, figure: Any = None, title: str = "") -> Plot:
    """Draw the decimal logarithm of the bound along the graph, and of each node's factor.

    Parameters
    ----------
    found : Lipschitz
    figure : matplotlib.figure.Figure, optional
        An empty figure, made with `pyplot` by default.
    title : str
    """
    figure = empty_figure(figure, FIGURE_SIZE)
    axes = figure.subplots()
    places = range(1, len(found.nodes) + 1)
    uppers = [node.log10_upper if math.isfinite(node.log10_upper) else math.nan for node in found.nodes]
    factors = [node.log10_factor if math.isfinite(node.log10_factor) else 0.0 for node in found.nodes]
    axes.bar(places, factors, color="C1", alpha=0.8, label="factor of the node")
    axes.step(places, uppers, where="mid", color="C0", label="bound up to the node")
    if found.lower:
        attained = f"attained at one input: {texts.rounded_down(found.lower)}"
        axes.axhline(math.log10(found.lower), color="C2", linestyle="--", label=attained)
    axes.set(
        xlabel="number of the node, in the order of execution",
        ylabel="decimal logarithm of the bound",
        title=f"{title or default_title(found)}\n{subtitle_of(found)}",
        xlim=(0.2, len(found.nodes) + 0.8),
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return Plot(figure, axes)
