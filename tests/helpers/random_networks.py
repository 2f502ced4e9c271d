"""Random small networks as graphs of maps, and points at which their Jacobian is large."""

from __future__ import annotations

import itertools
import math

import numpy as np

from convsv_core import Conv
from convsv_core._network.blocks import ResidualBlock
from convsv_core._network.jacobian import Linearized, linearize
from convsv_core.networks import (
    AveragePool,
    AxisMaps,
    Concatenate,
    Convolution,
    Elementwise,
    Expand,
    Extremum,
    Gather,
    Graph,
    Identity,
    Input,
    Kind,
    LocalResponse,
    LogSoftmax,
    Matmul,
    MaxPool,
    Node,
    Normalize,
    Pad,
    Permute,
    Product,
    Quotient,
    Reduce,
    Reshape,
    Scale,
    Slice,
    Softmax,
    Sum,
)

FUNCTIONS = [
    Elementwise("relu"),
    Elementwise("leaky_relu", {"alpha": -0.3}),
    Elementwise("leaky_relu", {"alpha": 1.7}),
    Elementwise("elu", {"alpha": 1.3}),
    Elementwise("selu"),
    Elementwise("celu", {"alpha": 0.7}),
    Elementwise("gelu"),
    Elementwise("gelu_tanh"),
    Elementwise("silu"),
    Elementwise("silu", {"beta": 1.702}),
    Elementwise("mish"),
    Elementwise("hard_sigmoid", {"alpha": 0.2, "beta": 0.5}),
    Elementwise("hard_swish"),
    Elementwise("clip", {"low": -0.5, "high": 0.7}),
    Elementwise("sigmoid"),
    Elementwise("log_sigmoid"),
    Elementwise("softplus", {"beta": 2.0}),
    Elementwise("softsign"),
    Elementwise("tanh"),
    Elementwise("abs"),
    Elementwise("soft_shrink", {"alpha": 0.2}),
    Elementwise("erf"),
    Elementwise("sin"),
    Elementwise("cos"),
    Elementwise("atan"),
    Elementwise("asinh"),
]
"""Every elementwise function that has a bound over all numbers."""


class RandomNetwork:
    """Build a random network node by node.

    Parameters
    ----------
    seed : int
    linear : bool
        Whether to use linear maps alone.
    ranged : bool
        Whether to use maps too that have a bound only over a range of the input.
    """

    def __init__(self, seed: int, *, linear: bool = False, ranged: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.linear, self.ranged = linear, ranged
        ndim = int(self.rng.choice([1, 2, 2, 2, 3]))
        largest = {1: 12, 2: 7, 3: 4}[ndim]
        extents = tuple(int(n) for n in self.rng.integers(3, largest + 1, ndim))
        shape = (1, int(self.rng.choice([1, 2, 3, 4])), *extents)
        self.nodes = [Node("x", Input(), (), shape)]
        name = "x"
        for _ in range(int(self.rng.integers(2, 8))):
            name = self.step(name)
        if self.rng.random() < 0.3:
            name = self.head(name)
        self.graph = Graph(tuple(self.nodes), (name,))

    def shape(self, name: str) -> tuple[int, ...]:
        return next(node.shape for node in self.nodes if node.name == name)

    def add(self, kind: Kind, inputs: tuple[str, ...], shape: tuple[int, ...]) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(Node(name, kind, inputs, shape))
        return name

    def one_of(self, *choices):
        return choices[int(self.rng.integers(len(choices)))]

    # ---- steps -------------------------------------------------------------------------------------------------------

    def step(self, name: str) -> str:
        maps = [self.conv, self.conv, self.conv, self.transposed, self.normalization, self.pool, self.rearrange]
        maps += [self.residual, self.projected, self.dense_branch, self.concatenation, self.resize, self.enlarged]
        if not self.linear:
            maps += [self.function, self.function, self.max_pool, self.spread, self.extremum]
        if self.ranged:
            maps += [self.gate, self.quotient, self.unbounded]
        return self.one_of(*maps)(name)

    def conv(self, name: str, *, keep: bool = False) -> str:
        rng, shape = self.rng, self.shape(name)
        channels, extents = shape[1], shape[2:]
        groups = self.one_of(*[g for g in range(1, channels + 1) if channels % g == 0])
        outputs = channels if keep else groups * int(rng.integers(1, 4))
        taps, pads, strides, dilations, out = [], [], [], [], []
        mode = self.one_of("zeros", "zeros", "circular", "reflect", "replicate")
        for n in extents:
            k = 1 if rng.random() < 0.25 else int(rng.integers(1, min(n, 4) + 1))
            d = 1 if k == 1 or keep else int(rng.integers(1, max(1, (n - 1) // (k - 1)) + 1))
            reach = d * (k - 1) + 1
            if keep:
                before = int(rng.integers(0, reach))
                pair, s = (before, reach - 1 - before), 1
            else:
                pair = tuple(int(p) for p in rng.integers(0, min(n - 1, 3) + 1, 2)) if rng.random() < 0.7 else (0, 0)
                s = int(rng.integers(1, 3))
            if mode == "reflect" and max(pair) >= n:
                return name
            taps.append(k), pads.append(pair), strides.append(s), dilations.append(d)
            out.append((n + sum(pair) - reach) // s + 1)
        kernel = rng.normal(size=(outputs, channels // groups, *taps)) / math.sqrt(channels // groups * math.prod(taps))
        if rng.random() < 0.3:
            kernel = np.abs(kernel)
        letters = {1: "W", 2: "HW", 3: "DHW"}[len(extents)]
        conv = Conv("OI" + letters, tuple(strides), tuple(dilations), groups, tuple(pads), mode)
        bias = rng.normal(size=outputs) if rng.random() < 0.5 else None
        return self.add(Convolution(kernel, conv, bias), (name,), (1, outputs, *out))

    def transposed(self, name: str) -> str:
        rng, shape = self.rng, self.shape(name)
        channels, extents = shape[1], shape[2:]
        if max(extents) > 6:
            return name
        outputs = int(rng.integers(1, 4))
        taps = tuple(int(k) for k in rng.integers(1, 4, len(extents)))
        strides = tuple(int(s) for s in rng.integers(1, 3, len(extents)))
        pads = tuple((int(rng.integers(0, k)), 0) for k in taps)
        letters = {1: "W", 2: "HW", 3: "DHW"}[len(extents)]
        conv = Conv("IO" + letters, strides, 1, 1, pads, "zeros", True, tuple(int(rng.integers(0, s)) for s in strides))
        sizes = zip(extents, strides, taps, pads, conv.output_padding, strict=True)
        out = tuple((n - 1) * s + k - sum(pair) + extra for n, s, k, pair, extra in sizes)
        if min(out) < 1:
            return name
        kernel = rng.normal(size=(channels, outputs, *taps)) / math.sqrt(channels * math.prod(taps))
        return self.add(Convolution(kernel, conv), (name,), (1, outputs, *out))

    def normalization(self, name: str) -> str:
        shape = self.shape(name)
        per_channel = (shape[1], *(1,) * (len(shape) - 2))
        scale = self.rng.normal(size=self.one_of(per_channel, (), shape[1:]))
        return self.add(Scale(scale, self.rng.normal(size=per_channel)), (name,), shape)

    def windows(self, name: str):
        rng, shape = self.rng, self.shape(name)
        window = [1, 1, *(int(rng.integers(1, min(n, 3) + 1)) for n in shape[2:])]
        strides = [1, 1, *(int(rng.integers(1, 3)) for _ in shape[2:])]
        padding = [(0, 0), (0, 0), *((int(rng.integers(0, w)), int(rng.integers(0, w))) for w in window[2:])]
        out = [(n + sum(p) - w) // s + 1 for n, p, w, s in zip(shape, padding, window, strides, strict=True)]
        return tuple(window), tuple(strides), (1,) * len(shape), tuple(padding), tuple(out)

    def pool(self, name: str) -> str:
        *geometry, padding, out = self.windows(name)
        counted = self.one_of(padding, tuple((0, 0) for _ in padding))
        return self.add(AveragePool(*geometry, padding, counted), (name,), out)

    def max_pool(self, name: str) -> str:
        *geometry, out = self.windows(name)
        return self.add(MaxPool(*geometry), (name,), out)

    def rearrange(self, name: str) -> str:
        rng, shape = self.rng, self.shape(name)
        axis = int(rng.integers(1, len(shape)))
        choice = rng.integers(6)
        if choice == 0 and shape[axis] > 1:
            part = slice(int(rng.integers(0, shape[axis] - 1)), None, int(rng.integers(1, 3)))
            slices = tuple(part if place == axis else slice(None) for place in range(len(shape)))
            return self.add(Slice(slices), (name,), np.empty(shape)[slices].shape)
        if choice == 1:
            pads = ((0, 0), (0, 0), *(tuple(int(p) for p in rng.integers(-1, 3, 2)) for _ in shape[2:]))
            out = tuple(n + sum(p) for n, p in zip(shape, pads, strict=True))
            if min(out) >= 1 and max(out) <= 10 and min(shape[2:]) > 2:
                return self.add(Pad(pads, self.one_of("constant", "replicate"), 0.3), (name,), out)
        if choice == 2 and shape[axis] <= 6:
            indices = rng.integers(0, shape[axis], int(rng.integers(1, 5)))
            out = tuple(len(indices) if place == axis else n for place, n in enumerate(shape))
            return self.add(Gather(indices, axis), (name,), out)
        if choice == 3 and len(shape) == 4:
            swapped = self.add(Permute((0, 2, 3, 1)), (name,), tuple(shape[i] for i in (0, 2, 3, 1)))
            scaled = self.add(Scale(rng.normal(size=shape[1])), (swapped,), self.shape(swapped))
            return self.add(Permute((0, 3, 1, 2)), (scaled,), shape)
        if choice == 4:
            kept = tuple(1 if place == axis else n for place, n in enumerate(shape))
            total = self.add(Reduce(self.one_of("sum", "mean"), (axis,)), (name,), kept)
            return self.add(Expand(), (total,), shape)
        return self.add(Identity(), (name,), shape)

    def resize(self, name: str) -> str:
        shape = self.shape(name)
        axis = int(self.rng.integers(2, len(shape)))
        rows = int(self.rng.integers(1, 7))
        out = tuple(rows if place == axis else n for place, n in enumerate(shape))
        return self.add(AxisMaps({axis: self.rng.normal(size=(rows, shape[axis])) / 2}), (name,), out)

    def enlarged(self, name: str) -> str:
        """Repeat each element along some axes, as nearest upsampling does, and convolve."""
        shape = self.shape(name)
        if max(shape[2:]) > 5:
            return name
        factors = {axis: int(self.rng.integers(1, 4)) for axis in range(2, len(shape))}
        out = tuple(n * factors.get(axis, 1) for axis, n in enumerate(shape))
        matrices = {axis: np.repeat(np.eye(shape[axis]), factor, axis=0) for axis, factor in factors.items()}
        return self.conv(self.add(AxisMaps(matrices), (name,), out))

    def function(self, name: str) -> str:
        return self.add(self.one_of(*FUNCTIONS), (name,), self.shape(name))

    def spread(self, name: str) -> str:
        axes = self.one_of((1,), tuple(range(2, len(self.shape(name)))))
        epsilon = float(self.one_of(1e-5, 0.1, 1.0))
        kind = self.one_of(
            Normalize(axes, epsilon, bool(self.rng.integers(2))),
            LocalResponse(1, int(self.rng.integers(1, 5)), float(self.rng.uniform(0, 3)), 0.75, 1.0),
            Softmax(axes),
            LogSoftmax(axes),
        )
        return self.add(kind, (name,), self.shape(name))

    # ---- branches ----------------------------------------------------------------------------------------------------

    def branch(self, name: str) -> str:
        """Return a function of a tensor that has its shape."""
        for _ in range(int(self.rng.integers(1, 3))):
            name = self.one_of(self.same_conv, self.normalization, *([] if self.linear else [self.function]))(name)
        return name

    def same_conv(self, name: str) -> str:
        return self.conv(name, keep=True)

    def residual(self, name: str) -> str:
        first = self.branch(name) if self.rng.random() < 0.3 else name
        weights = self.one_of((), (1.0, -1.0), (0.5, 2.0))
        return self.add(Sum(weights), (first, self.branch(name)), self.shape(name))

    def projected(self, name: str) -> str:
        """Add a block whose shortcut is a 1 x 1 convolution, as a rule with a stride and a normalisation."""
        rng, shape = self.rng, self.shape(name)
        strides = tuple(int(s) for s in rng.integers(1, 3, len(shape) - 2))
        outputs = int(rng.integers(1, 5))
        out = (1, outputs, *((n - 1) // s + 1 for n, s in zip(shape[2:], strides, strict=True)))
        letters = {1: "W", 2: "HW", 3: "DHW"}[len(strides)]

        def convolved(taps: int) -> str:
            kernel = rng.normal(size=(outputs, shape[1], *(taps for _ in strides))) / math.sqrt(shape[1] * taps)
            conv = Conv("OI" + letters, strides, 1, 1, (taps - 1) // 2, "zeros")
            return self.add(Convolution(kernel, conv), (name,), out)

        shortcut = convolved(1)
        shortcut = self.normalization(shortcut) if rng.random() < 0.5 else shortcut
        branch = self.add(Scale(np.asarray(float(rng.choice([0.05, 0.5])))), (convolved(3),), out)
        branch = self.branch(branch) if rng.random() < 0.5 else branch
        return self.add(Sum(), (branch, shortcut)[:: int(rng.choice([-1, 1]))], out)

    def extremum(self, name: str) -> str:
        return self.add(Extremum(self.one_of("max", "min")), (name, self.branch(name)), self.shape(name))

    def dense_branch(self, name: str) -> str:
        shape = self.shape(name)
        grown = (shape[0], 2 * shape[1], *shape[2:])
        return name if shape[1] > 4 else self.add(Concatenate(1), (name, self.branch(name)), grown)

    def concatenation(self, name: str) -> str:
        parts = tuple(self.branch(name) for _ in range(2))
        shape = self.shape(name)
        return name if shape[1] > 4 else self.add(Concatenate(1), parts, (shape[0], 2 * shape[1], *shape[2:]))

    def gate(self, name: str) -> str:
        shape = self.shape(name)
        pooled = self.add(Reduce("mean", tuple(range(2, len(shape)))), (name,), (*shape[:2], *(1,) * (len(shape) - 2)))
        gate = self.add(Elementwise("sigmoid"), (self.one_of(pooled, name),), self.shape(self.one_of(pooled, name)))
        self.nodes[-1] = Node(gate, Elementwise("sigmoid"), (pooled,), self.shape(pooled))
        return self.add(Product(), (name, gate), shape)

    def quotient(self, name: str) -> str:
        positive = self.add(Elementwise("softplus"), (self.branch(name),), self.shape(name))
        above = self.add(Scale(np.ones(()), np.asarray(0.3)), (positive,), self.shape(name))
        return self.add(Quotient(), (name, above), self.shape(name))

    def unbounded(self, name: str) -> str:
        bounded = self.add(Elementwise("tanh"), (name,), self.shape(name))
        kind = self.one_of(Elementwise("exp"), Elementwise("square"), Elementwise("power", {"exponent": 3.0}))
        return self.add(kind, (bounded,), self.shape(name))

    def head(self, name: str) -> str:
        size = math.prod(self.shape(name))
        flat = self.add(Reshape(), (name,), (1, size))
        return self.add(Matmul(self.rng.normal(size=(size, 3)) / math.sqrt(size)), (flat,), (1, 3))


def largest_jacobian(graph: Graph, seed: int, box: tuple[float, float] | None = None, steps: int = 3) -> float:
    """Return the largest norm of a Jacobian that a search over inputs of several sizes finds, from below."""
    rng = np.random.default_rng(seed)
    shape = graph.inputs[0].shape
    best = 0.0
    for size in (0.1, 1.0, 5.0):
        x = rng.normal(size=shape) * size if box is None else rng.uniform(*box, size=shape)
        reached = -1.0
        for step in range(steps):
            tried = x if step == 0 else x + rng.normal(size=shape) * size / 2
            tried = tried if box is None else np.clip(tried, *box)
            with np.errstate(all="ignore"):
                found = _norm_from_below(linearize(graph, {"x": tried}))
            if found > reached:
                x, reached = tried, found
        best = max(best, reached)
    return best


def _norm_from_below(network: Linearized, steps: int = 15) -> float:
    """Return the largest factor by which power iteration with a Jacobian stretches a vector; 0 if it is infinite."""
    vector, largest = np.random.default_rng(0).standard_normal(network.input_size), 0.0
    for _ in range(steps):
        length = float(np.linalg.norm(vector))
        if not 0 < length < np.inf:
            break
        image = network.apply(vector / length)
        largest, vector = max(largest, float(np.linalg.norm(image))), network.adjoint(image)
    return largest * (1 - 1e-9) if np.isfinite(largest) else 0.0


def block_values(graph: Graph, block: ResidualBlock, seed: int) -> np.ndarray:
    """Return the singular values of a residual block's Jacobian at a random input of the block."""
    start = Node(block.start, Input(), (), graph[block.start].shape)
    later = itertools.dropwhile(lambda node: node.name != block.start, graph)
    needed = {block.name}
    for node in reversed(graph.nodes):
        if node.name in needed and node.name != block.start:
            needed.update(node.inputs)
    nodes = [node for node in later if node.name in needed - {block.start}]
    part = Graph((start, *nodes), (block.name,))
    x = np.random.default_rng(seed).normal(size=start.shape)
    at = linearize(part, {block.start: x})
    return np.linalg.svd(np.stack([at.apply(row) for row in np.eye(at.input_size)]), compute_uv=False)


def dense_norm(graph: Graph) -> float:
    """Return the norm of the matrix of a linear network, whose columns are the network's values."""
    node = graph.inputs[0]
    at_zero = linearize(graph, {"x": np.zeros(node.shape)}).values[graph.outputs[0]]
    columns = []
    for place in itertools.product(*map(range, node.shape)):
        x = np.zeros(node.shape)
        x[place] = 1.0
        columns.append((linearize(graph, {"x": x}).values[graph.outputs[0]] - at_zero).reshape(-1))
    return float(np.linalg.norm(np.stack(columns), 2))
