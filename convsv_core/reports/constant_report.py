"""The result of `lipschitz`: figures of a network, of its nodes and of its residual blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from convsv_core._network.blocks import ResidualBlock
from convsv_core._network.bounds import Missing
from convsv_core.reports.shown import Shown

__all__ = ["Lipschitz", "LipschitzNode", "finite"]


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
class Lipschitz(Shown):
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
        lines += [line for missing in self.missing for line in [self._missing_line(missing)]]
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

    def _lower_text(self, lower: float) -> str:
        where = "at one input" if self.lower_inputs == 1 else f"the largest at {self.lower_inputs} inputs"
        return f"{lower:.6g}, {where}"

    @staticmethod
    def _missing_line(missing: Missing) -> str:
        before = f"the bound up to it is 10^{missing.log10_before:.4f}" if missing.log10_before < math.inf else ""
        return f"no bound for {missing.name} ({missing.op}): {missing.reason}" + (f"; {before}" if before else "")

    @staticmethod
    def _number(log: float, value: float | None) -> str:
        if log == math.inf:
            return "none"
        shown = "" if value is None or not math.isfinite(value) else f" = {value:.6g}"
        return "0" if log == -math.inf else f"10^{log:.4f}{shown}"


def finite(value: float) -> float | None:
    """Return the number, or None if it is infinite."""
    return value if math.isfinite(value) else None
