"""Ways to write a tensor as a sum of linear maps of earlier tensors, from which bounds better than the product follow.

A candidate of a tensor t is a set of earlier tensors r, its roots, and a form for each, such that
``t = sum_r F_r r`` but for constants. Then ``L(t) <= sum_r |F_r| L(r)``. The product of the nodes' own factors is the
candidate whose roots are the inputs of t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from convsv_core._geometry.padding import layer_operators
from convsv_core._geometry.plan import is_circulant
from convsv_core._network import forms, kinds
from convsv_core._network.forms import Form
from convsv_core._network.graph import Graph, Node, Shape
from convsv_core._network.linear_maps import axis_sources, forward_kernel
from convsv_core._network.rule_types import Float64Array
from convsv_core._network.rules import GIVEN_ROUNDING

__all__ = ["Candidate", "candidates_of", "node_form"]

MOST_CANDIDATES = 3
"""Number of candidates that are kept for a tensor. A guess: the furthest roots, the last join, and one between."""

MOST_ROOTS = 8
"""Largest number of roots of a candidate. A guess: more than the residual blocks of one stage of a MobileNetV2."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to write a tensor.

    Attributes
    ----------
    forms : mapping from name of a root to Form or None
        None stands for the identity.
    through : frozenset of str
        The tensors between the roots and the tensor, which the candidate passes by.
    """

    forms: Mapping[str, Form | None]
    through: frozenset[str] = frozenset()


def candidates_of(graph: Graph, unbounded: Iterable[str]) -> dict[str, list[Candidate]]:
    """Return the candidates of each tensor; nodes in `unbounded` are roots, whatever their kind."""
    found: dict[str, list[Candidate]] = {}
    barred = set(unbounded)
    for node in graph:
        own = Candidate({node.name: None})
        options = [] if node.name in barred else _options(graph, node, found)
        is_join = any(len(option.forms) > 1 for option in options)
        if not options or is_join or len(graph.users[node.name]) > 1:
            options = [*options[: MOST_CANDIDATES - 1], own]
        found[node.name] = options[:MOST_CANDIDATES]
    return found


def _options(graph: Graph, node: Node, found: Mapping[str, list[Candidate]]) -> list[Candidate]:
    if isinstance(node.kind, kinds.Sum | kinds.Concatenate):
        return _joined(graph, node, found)
    if len(node.inputs) != 1:
        return []
    (name,) = node.inputs
    shape = graph[name].shape
    if isinstance(node.kind, kinds.Identity) or (isinstance(node.kind, kinds.Reshape) and node.shape == shape):
        return [replace(option, through=option.through | {name}) for option in found[name]]
    options = [option for one in found[name] if (option := _extended(node, name, shape, one)) is not None]
    restarted = [option for option in options if set(option.forms) == {name}]
    form = node_form(node, shape, None)
    if form is not None and not restarted and len(options) < len(found[name]):
        options.append(Candidate({name: form}))
    return options


def _extended(node: Node, name: str, shape: Shape, option: Candidate) -> Candidate | None:
    """Return a candidate of the node from one of its input; None where a composition is not sound."""
    result: dict[str, Form | None] = {}
    for root, form in option.forms.items():
        if isinstance(node.kind, kinds.Permute):
            following = None if form is None else _permuted(form, node.kind.permutation)
        else:
            second = node_form(node, shape, None if form is None else form.axes_out[0])
            following = second if form is None or second is None else forms.compose(second, form)
        if following is None:
            return None
        result[root] = following
    through = option.through if name in option.forms else option.through | {name}
    return Candidate(result, through)


def _permuted(form: Form, permutation: tuple[int, ...]) -> Form:
    return replace(form, axes_out=tuple(permutation.index(axis) for axis in form.axes_out))


# ---- joins -----------------------------------------------------------------------------------------------------------


def _joined(graph: Graph, node: Node, found: Mapping[str, list[Candidate]]) -> list[Candidate]:
    """Return the candidates of a sum or a concatenation: each choice of candidates of its inputs, put together."""
    kind = node.kind
    weights = [1.0] * len(node.inputs)
    if isinstance(kind, kinds.Sum):
        if any(graph[name].shape != node.shape for name in node.inputs):
            return []
        weights = list(kind.weights or weights)
    offset, joined = 0, [Candidate({})]
    for name, weight in zip(node.inputs, weights, strict=True):
        following = []
        for option in found[name]:
            placed = _placed(option, kind, weight, offset, node.shape)
            if placed is not None:
                passed = frozenset() if name in option.forms else frozenset({name})
                placed = replace(placed, through=placed.through | passed)
                following += [merged for one in joined if (merged := _merged(one, placed)) is not None]
        offset += graph[name].shape[kind.axis] if isinstance(kind, kinds.Concatenate) else 0
        # Candidates whose parts share a root come first: their forms are added before norms are taken.
        joined = sorted(following, key=lambda one: len(one.forms))[:MOST_CANDIDATES]
    return joined


def _placed(option: Candidate, kind: kinds.Kind, weight: float, offset: int, shape: Shape) -> Candidate | None:
    """Return a part of a sum with its weight, or a part of a concatenation in its place."""
    result: dict[str, Form | None] = {}
    for root, form in option.forms.items():
        if isinstance(kind, kinds.Concatenate):
            if form is None or form.axes_out[0] != kind.axis or form.adjoint:
                return None
            result[root] = _embedded(form, offset, shape[kind.axis])
        elif weight == 1:
            result[root] = form
        elif form is None:
            axes = _axes(min(1, len(shape) - 1), len(shape))
            factors = np.full((shape[axes[0]], 1, 1), weight)
            result[root] = forms.pointwise(factors, tuple(shape[axis] for axis in axes[1:]), axes)
        else:
            result[root] = replace(
                form, kernel=form.kernel * weight, error=(form.error + 1e-15 * form.moduli) * abs(weight)
            )
    return replace(option, forms=result)


def _embedded(form: Form, offset: int, channels: int) -> Form:
    """Return the form with its output channels among others, which are zeros."""
    kernel = forms.regrouped(form.kernel, 1)
    sides = [(0, 0)] * kernel.ndim
    sides[1] = (offset, channels - offset - kernel.shape[1])
    return replace(form, kernel=np.pad(kernel, sides))


def _merged(first: Candidate, second: Candidate) -> Candidate | None:
    """Return two candidates that are added; None where they share a root and their forms cannot be added."""
    result = dict(first.forms)
    for root, form in second.forms.items():
        if root not in result:
            result[root] = form
            continue
        total = _sum_of(result[root], form)
        if total is None:
            return None
        result[root] = total
    through = first.through | second.through
    if len(result) > MOST_ROOTS or through & set(result):
        return None
    return Candidate(result, through)


def _sum_of(first: Form | None, second: Form | None) -> Form | None:
    if first is None and second is None:
        return None
    if first is None or second is None:
        form = first if first is not None else second
        assert form is not None
        channels = form.kernel.shape[0] * form.kernel.shape[2]
        if form.extents != form.outputs or form.axes_in != form.axes_out or form.adjoint:
            return None
        identity = forms.pointwise(np.ones((channels, 1, 1)), form.extents, form.axes_in)
        return forms.add(form, identity)
    return forms.add(first, second)


# ---- the form of one node --------------------------------------------------------------------------------------------


def node_form(node: Node, shape: Shape, channel: int | None) -> Form | None:
    """Return the form of a linear node of one input; None for a map that is no convolution.

    Parameters
    ----------
    node : Node
    shape : tuple of int
        The shape of its input.
    channel : int or None
        Which axis is to count as the channels, where the map leaves a choice.
    """
    kind = node.kind
    if isinstance(kind, kinds.Convolution):
        return _convolution(kind, shape, node.shape)
    if isinstance(kind, kinds.Matmul):
        return _matmul(kind, shape)
    if isinstance(kind, kinds.Scale) and node.shape == shape:
        return _scale(kind, shape, channel)
    if isinstance(kind, kinds.AveragePool | kinds.Slice | kinds.Pad):
        if channel is None:
            trivial = [
                axis for axis in (1, len(shape) - 1) if 0 < axis < len(shape) and shape[axis] == node.shape[axis]
            ]
            channel = trivial[0] if trivial else None
        return None if channel is None else _windows(kind, shape, node.shape, channel)
    return None


def _axes(channel: int, rank: int) -> tuple[int, ...]:
    return (channel, *(axis for axis in range(rank) if axis != channel))


def _convolution(kind: kinds.Convolution, shape: Shape, out: Shape) -> Form | None:
    conv, kernel = kind.conv, forward_kernel(kind)
    taps = kernel.shape[3:]
    pads = conv.pads(taps)
    axes = _axes(kind.layout.index("C"), len(kind.layout))
    letters = [kind.layout[axis] for axis in axes[1:]]
    order = [conv.spatial.index(letter) for letter in letters if letter != "N"]
    batch = letters.index("N")
    extents = tuple(shape[kind.layout.index(letter)] for letter in conv.spatial)
    (operator,) = layer_operators(kind.kernel.shape, conv, [extents])
    mode = "zeros"
    if conv.padding_mode != "zeros" and any(map(any, pads)):
        mode = "part" if conv.padding_mode == "circular" else "cut"
        mode = "circular" if is_circulant(tuple(kind.kernel.shape), extents, conv) else mode

    def along(values: tuple[int, ...], own: int) -> tuple[int, ...]:
        found = [values[place] for place in order]
        found.insert(batch, own)
        return tuple(found)

    kernel = np.transpose(kernel, (0, 1, 2, *(place + 3 for place in order)))
    return Form(
        np.expand_dims(kernel, batch + 3),
        along(tuple(-before for before, _ in pads), 0),
        along(conv.strides, 1),
        along(conv.dilations, 1),
        tuple(shape[axis] for axis in axes[1:]),
        tuple(out[axis] for axis in axes[1:]),
        axes,
        axes,
        mode,
        conv.transposed,
        operator.padding_norm,
    )


def _matmul(kind: kinds.Matmul, shape: Shape) -> Form | None:
    if kind.matrix.ndim != 2 or len(shape) < 2:
        return None
    right = kind.side == "right"
    matrix = np.asarray(kind.matrix, np.float64)
    axes = _axes(len(shape) - (1 if right else 2), len(shape))
    return forms.pointwise((matrix.T if right else matrix)[None], tuple(shape[axis] for axis in axes[1:]), axes)


def _scale(kind: kinds.Scale, shape: Shape, channel: int | None) -> Form | None:
    scale: Float64Array = np.asarray(kind.scale, np.float64)
    scale = scale.reshape((1,) * (len(shape) - scale.ndim) + scale.shape)
    varying = [axis for axis, extent in enumerate(scale.shape) if extent > 1]
    if len(varying) > 1 or (varying and channel not in (None, varying[0])):
        return None
    channel = varying[0] if varying else channel
    if channel is None:
        channel = min(1, len(shape) - 1)
    axes = _axes(channel, len(shape))
    factors = np.broadcast_to(scale.reshape(-1), (shape[channel],)).reshape(-1, 1, 1)
    error = GIVEN_ROUNDING * float(np.max(np.abs(factors)))
    return forms.pointwise(np.array(factors), tuple(shape[axis] for axis in axes[1:]), axes, error)


def _windows(kind: kinds.AveragePool | kinds.Slice | kinds.Pad, shape: Shape, out: Shape, channel: int) -> Form | None:
    """Return the form of a map that acts on each channel alone: a mean over windows, a crop, zeros around."""
    axes = _axes(channel, len(shape))
    start: list[int] = []
    stride: list[int] = []
    dilation: list[int] = []
    taps: list[int] = []
    for axis in axes:
        if isinstance(kind, kinds.AveragePool):
            reach = (out[axis] - 1) * kind.strides[axis] + kind.dilations[axis] * (kind.window[axis] - 1) + 1
            before, after = kind.padding[axis][0], reach - kind.padding[axis][0] - shape[axis]
            # The divisor must be the same for all windows, so every element that they read must count.
            if before > kind.counted[axis][0] or after > kind.counted[axis][1]:
                return None
            steps = (-before, kind.strides[axis], kind.dilations[axis], kind.window[axis])
        else:
            sources = axis_sources(kind, shape).get(axis, np.arange(shape[axis]))
            found = _regular(sources, kind)
            if found is None:
                return None
            steps = (*found, 1, 1)
        for values, step in zip((start, stride, dilation, taps), steps, strict=True):
            values.append(step)
    if (start[0], stride[0], taps[0]) != (0, 1, 1) or shape[channel] != out[channel]:
        return None
    kernel = np.full((shape[channel], 1, 1, *taps[1:]), 1 / math.prod(taps))
    return Form(
        kernel,
        tuple(start[1:]),
        tuple(stride[1:]),
        tuple(dilation[1:]),
        tuple(shape[axis] for axis in axes[1:]),
        tuple(out[axis] for axis in axes[1:]),
        axes,
        axes,
        error=1e-15,
    )


def _regular(sources: np.ndarray, kind: kinds.Kind) -> tuple[int, int] | None:
    """Return start and step of places that go up evenly; None for others, and for padding that is not of zeros."""
    if isinstance(kind, kinds.Pad) and (kind.mode != "constant" or any(kind.interior or ())):
        return None
    inside = np.flatnonzero(sources >= 0)
    if not len(inside):
        return None
    steps = np.unique(np.diff(sources[inside]))
    if len(steps) > 1 or (len(steps) and steps[0] < 1):
        return None
    step = int(steps[0]) if len(steps) else 1
    return int(sources[inside[0]] - step * inside[0]), step
