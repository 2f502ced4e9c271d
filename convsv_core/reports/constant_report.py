"""The result of `lipschitz`: figures of a network, of its nodes and of its residual blocks."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convsv_core._network.blocks import ResidualBlock
from convsv_core._network.bounds import Missing
from convsv_core.reports.constant_views import nodes_frame, nodes_table, plot_constant
from convsv_core.reports.curves import Plot
from convsv_core.reports.extras import import_for
from convsv_core.reports.network_report import finite
from convsv_core.reports.notebook import table_html

__all__ = ["Lipschitz", "LipschitzNode"]


@dataclass(frozen=True)
class LipschitzNode:
    """The share of one node in the bound.

    Attributes
    ----------
    name, op : str
        The node's name, and the source's own name of its operator.
    log10_factor : float
        Decimal logarithm of the factor of the node alone: the largest one where it has several inputs. Infinite for a
        node without a rule.
    log10_upper : float
        Decimal logarithm of the bound of the node's tensor, as a function of the network's inputs.
    note : str
        For people.
    """

    name: str
    op: str
    log10_factor: float
    log10_upper: float
    note: str = ""


@dataclass(frozen=True)
class Lipschitz:
    """The certified Lipschitz constant of a network, in Euclidean norms of whole tensors; `str` gives a table.

    Like a `Report`, it displays itself in a notebook, and has `plot`, `to_html`, `to_json` and `to_pandas`.

    Attributes
    ----------
    upper : float
        Upper bound of the Lipschitz constant; infinite where a node has no bound, or the number overflows.
    log10_upper : float
        Its decimal logarithm; infinite where a node has no bound.
    log10_product : float
        The logarithm of the plain product: one factor a node, nothing folded.
    lower : float or None
        The largest norm of the Jacobian at some inputs: the Lipschitz constant is at least that. None where it was not
        asked for, or a node's value is not known.
    nodes : tuple of LipschitzNode
        In the order of execution.
    blocks : tuple of ResidualBlock
    missing : tuple of Missing
        The nodes without a bound, with the reason and the bound up to them.
    output : str
        The name of the output; of several, all names.
    lower_inputs : int
        The number of inputs at which the Jacobian was measured.
    """

    upper: float
    log10_upper: float
    log10_product: float
    lower: float | None
    nodes: tuple[LipschitzNode, ...] = field(repr=False)
    blocks: tuple[ResidualBlock, ...] = field(repr=False)
    missing: tuple[Missing, ...] = ()
    output: str = ""
    lower_inputs: int = 0

    @property
    def upper_text(self) -> str:
        """The upper bound in words for people: its decimal logarithm, and the number itself where that is finite."""
        return self._number(self.log10_upper, self.upper)

    def __str__(self) -> str:
        width = max([4, *(len(node.name) for node in self.nodes)])
        ops = max([2, *(len(node.op) for node in self.nodes)])
        lines = [f"{'node':{width}}  {'op':{ops}}  log10 factor  log10 upper  note"]
        lines += [
            f"{node.name:{width}}  {node.op:{ops}}  {node.log10_factor:12.4f}  {node.log10_upper:11.4f}  {node.note}"
            for node in self.nodes
        ]
        lines += map(str, self.blocks)
        lines += map(self._missing_line, self.missing)
        lines.append(f"upper: {self.upper_text}")
        lines.append(f"product of all factors: {self._number(self.log10_product, None)}")
        lines.append(f"lower: {'unknown' if self.lower is None else self._lower_text(self.lower)}")
        return "\n".join(line.rstrip() for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON has them: a number that is not finite is None."""
        return {
            "output": self.output,
            "log10_upper": finite(self.log10_upper),
            "upper": finite(self.upper),
            "log10_product": finite(self.log10_product),
            "lower": self.lower,
            "nodes": [
                {
                    "name": node.name,
                    "op": node.op,
                    "log10_factor": finite(node.log10_factor),
                    "log10_upper": finite(node.log10_upper),
                    "note": node.note,
                }
                for node in self.nodes
            ],
            "blocks": [
                {
                    "name": block.name,
                    "branch_upper": finite(block.branch_upper),
                    "smallest_singular_value": block.smallest_singular_value,
                    "largest_singular_value": finite(block.largest_singular_value),
                }
                for block in self.blocks
            ],
        }

    def _repr_html_(self) -> str:
        """Return the table of the nodes as a notebook shows it."""
        return table_html(nodes_table(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the table where IPython has no HTML."""
        printer.text(repr(self) if cycle else str(self))

    def to_json(self) -> str:
        """Return the figures as JSON, as ``convsv lipschitz --json`` writes them, without the name of the model.

        JSON has no infinity: a figure is null where a node has no bound and where it is infinite.
        """
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for each node: name, op, log10_factor, log10_upper and note.

        Raises
        ------
        ModuleNotFoundError
            pandas is not installed.
        """
        return nodes_frame(self)

    def plot(self, figure: Any = None, *, title: str = "") -> Plot:
        """Draw the decimal logarithm of the bound along the graph, and of each node's factor.

        Parameters
        ----------
        figure : matplotlib.figure.Figure, optional
            An empty figure to draw in. By default `pyplot` makes one, which a notebook displays.
        title : str, default ""
            The name of the network. By default the name of its output.

        Returns
        -------
        figure : matplotlib.figure.Figure
        axes : matplotlib.axes.Axes

        Raises
        ------
        ModuleNotFoundError
            matplotlib is not installed.
        """
        return plot_constant(self, figure, title)

    def to_html(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Write a page to read in a browser, offline: the bound along the graph, residual blocks and a table of nodes.

        Parameters
        ----------
        path : path
            The file to write. It needs no other file and no network.
        title : str, default ""
            The name of the network. By default the name of its output.

        Raises
        ------
        ModuleNotFoundError
            The libraries of the extra ``html``, whose scripts the page contains, are not installed.
        OSError
            The file cannot be written.
        """
        Path(path).write_text(self.page(title), encoding="utf-8")

    def page(self, title: str = "") -> str:
        """Return the content of the file that `to_html` writes."""
        return import_for("convsv_core.reports.constant_page", "to_html()", "html").constant_page(self, title)

    def _lower_text(self, lower: float) -> str:
        where = "at one input" if self.lower_inputs == 1 else f"the largest at {self.lower_inputs} inputs"
        return f"{lower:.6g}, {where}"

    @staticmethod
    def _missing_line(missing: Missing) -> str:
        before = f"; the bound up to it is 10^{missing.log10_before:.4f}" if missing.log10_before < math.inf else ""
        return f"no bound for {missing.name} ({missing.op}): {missing.reason}{before}"

    @staticmethod
    def _number(log: float, value: float | None) -> str:
        if log == math.inf:
            return "none"
        shown = "" if value is None or not math.isfinite(value) else f" = {value:.6g}"
        return "0" if log == -math.inf else f"10^{log:.4f}{shown}"
