"""Bounds of the Lipschitz constant of every tensor of a network, by one pass in topological order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from convsv_core._network import kinds
from convsv_core._network.candidates import Candidate, candidates_of
from convsv_core._network.dense import linear_part
from convsv_core._network.forms import Form
from convsv_core._network.graph import Graph, Node
from convsv_core._network.linear_maps import is_linear
from convsv_core._network.logarithms import log_of, log_product, log_root, log_sum
from convsv_core._network.rule_types import Factors, NoRule, Range, Tensor
from convsv_core._network.rules import CONV_RTOL, node_factors, node_range

__all__ = ["Bounds", "Missing"]


@dataclass(frozen=True)
class Missing:
    """A node that has no bound.

    Attributes
    ----------
    name, op : str
    reason : str
    log10_before : float
        The decimal logarithm of the bound of the node's inputs together; infinite where another node has none before.
    """

    name: str
    op: str
    reason: str
    log10_before: float = math.inf


class Bounds:
    """The factors of a network's nodes, and bounds that follow from them. Norms are computed once.

    Parameters
    ----------
    graph : Graph
    box : Range, optional
        Bounds of the elements of every input, which give bounds of all activations.

    Attributes
    ----------
    factors : dict from name to Factors
        The factors of each node that has a rule.
    missing : dict from name to str
        The reason, for each node that has no bound.
    """

    def __init__(self, graph: Graph, box: tuple[float, float] | None = None) -> None:
        self.graph = graph
        self.factors: dict[str, Factors] = {}
        self.missing: dict[str, str] = {}
        self._apply_rules(box)
        self._candidates = candidates_of(graph, self.missing)
        self._norms: dict[int, float] = {}
        self._dense: dict[tuple[str, str], float] = {}
        self._needed = self._worth_folding()

    def _apply_rules(self, box: tuple[float, float] | None) -> None:
        ranges: dict[str, Range] = {}
        left = {name: len(users) for name, users in self.graph.users.items()}
        for node in self.graph:
            inputs = [Tensor(self.graph[name].shape, ranges.get(name)) for name in node.inputs]
            if isinstance(node.kind, kinds.Input):
                if box is not None:
                    ranges[node.name] = Range(np.full(node.shape, box[0]), np.full(node.shape, box[1]))
                continue
            try:
                self.factors[node.name] = node_factors(node, inputs)
            except NoRule as error:
                self.missing[node.name] = str(error)
            if box is not None or isinstance(node.kind, kinds.Constant):
                ranges[node.name] = node_range(node, [tensor.range for tensor in inputs])
            for name in set(node.inputs):
                left[name] -= 1
                if not left[name]:
                    ranges.pop(name, None)

    def _worth_folding(self) -> set[str]:
        """Return the tensors whose bound others use as it is: folding there can lower the bound of the network."""
        roots = {
            root
            for name, options in self._candidates.items()
            for option in options
            for root in option.forms
            if root != name
        }
        needed = roots | set(self.graph.outputs)
        for node in self.graph:
            if all(set(option.forms) == {node.name} for option in self._candidates[node.name]):
                needed.update(node.inputs)
        return needed

    # ---- bounds ------------------------------------------------------------------------------------------------------

    def plain(self) -> dict[str, float]:
        """Return the logarithm of the bound of each tensor with one factor a node, nothing folded."""
        logs: dict[str, float] = {}
        for node in self.graph:
            logs[node.name] = 0.0 if isinstance(node.kind, kinds.Input) else self._joined(node, logs)
        return logs

    def from_inputs(self) -> dict[str, float]:
        """Return the logarithm of the bound of each tensor, as a function of all inputs together."""
        return self._folded({node.name for node in self.graph.inputs}, self.graph.nodes, self._needed)

    def from_tensor(self, source: str, target: str) -> float:
        """Return the logarithm of the bound of a tensor as a function of an earlier one, which is its only source."""
        needed = {target}
        for node in reversed(self.graph.nodes):
            if node.name in needed and node.name != source:
                needed.update(node.inputs)
        nodes = tuple(node for node in self.graph if node.name in needed)
        return self._folded({source}, nodes, self._needed | {target})[target]

    def missing_before(self, logs: Mapping[str, float]) -> list[Missing]:
        """Return the nodes without a bound, each with the bound of its inputs together."""
        return [
            Missing(
                node.name,
                node.op,
                self.missing[node.name],
                log_root([logs[name] for name in dict.fromkeys(node.inputs)]),
            )
            for node in self.graph
            if node.name in self.missing
        ]

    def _joined(self, node: Node, logs: Mapping[str, float]) -> float:
        """Return the logarithm of a node's bound by its rule."""
        inputs = [logs[name] for name in node.inputs]
        if node.name in self.missing:
            return -math.inf if inputs and all(log == -math.inf for log in inputs) else math.inf
        factors = self.factors[node.name]
        parts = [log_product(log_of(value), log) for value, log in zip(factors.values, inputs, strict=True)]
        return log_sum(parts) if factors.join == "sum" else log_root(parts)

    def _folded(self, sources: set[str], nodes: tuple[Node, ...], needed: set[str]) -> dict[str, float]:
        """Return the bounds of tensors as functions of `sources`; those of `needed` ones from all candidates."""
        logs: dict[str, float] = {}
        for node in nodes:
            if node.name in sources:
                logs[node.name] = 0.0
                continue
            if isinstance(node.kind, kinds.Input):
                logs[node.name] = -math.inf
                continue
            best = self._joined(node, logs)
            if node.name in needed and best != -math.inf and node.name not in self.missing:
                options = (self._by_candidate(node, option, logs, sources) for option in self._candidates[node.name])
                best = min([best, *options, self._by_matrix(node, logs, sources)])
            logs[node.name] = best
        return logs

    def _by_candidate(self, node: Node, option: Candidate, logs: Mapping[str, float], sources: set[str]) -> float:
        if node.name in option.forms or option.through & sources or any(root not in logs for root in option.forms):
            return math.inf
        parts = []
        for root, form in option.forms.items():
            if logs[root] == -math.inf:
                continue
            norm = 1.0 if form is None else self._norm(form)
            parts.append(log_product(log_of(norm), logs[root]))
        return log_sum(parts)

    def _norm(self, form: Form) -> float:
        if id(form) not in self._norms:  # The candidates keep their forms, so no identity is used again.
            self._norms[id(form)] = form.norm(CONV_RTOL)
        return self._norms[id(form)]

    def _by_matrix(self, node: Node, logs: Mapping[str, float], sources: set[str]) -> float:
        if not is_linear(node.kind):
            return math.inf
        part = linear_part(self.graph, node.name, sources | set(self.missing))
        if part is None:
            return math.inf
        root = part.graph.inputs[0].name
        key = (root, node.name)
        if key not in self._dense:
            self._dense[key] = part.norm()
        return log_product(log_of(self._dense[key]), logs[root])
