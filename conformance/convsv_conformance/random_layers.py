"""Draw random layers of every kind and geometry, and search for the norms of their symbols.

The layers are tiny. The search shares no code with the library under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

import convsv_core as convsv
from convsv_conformance.cases import Case
from convsv_conformance.dense import Array
from convsv_conformance.symbols import climb, frequency_grid, symbol_norms

__all__ = ["random_layer", "refined_supremum", "symbol_norm"]


def symbol_norm(kernel: Array, conv: convsv.Conv, angles: Array) -> Array:
    """Return the norm of the symbol at each row of `angles`, by its definition and without the core."""
    channels = [kernel.shape[conv.layout.index(letter)] for letter in ("IO" if conv.transposed else "OI")]
    case = Case(
        name="layer",
        channels=(channels[0], channels[1]),
        taps=tuple(kernel.shape[conv.layout.index(letter)] for letter in conv.spatial),
        input_shape=(1,) * conv.ndim,
        layout=conv.layout,
        stride=conv.strides,
        dilation=conv.dilations,
        groups=conv.groups,
        transposed=conv.transposed,
    )
    return symbol_norms(case, kernel, angles)


def refined_supremum(norm: Callable[[Array], Array], ndim: int, start: Array) -> float:
    """Return the largest norm that a fine grid finds, refined by a search from `start` and the grid's best points."""
    points = {1: 400, 2: 40, 3: 12}[ndim]
    grid = frequency_grid(points, ndim)
    candidates = np.concatenate([grid[np.argsort(norm(grid))[-4:]], start[None, :]])
    return climb(norm, candidates, step=2 * np.pi / points)


def random_layer(rng: np.random.Generator) -> tuple[Array, convsv.Conv]:
    """Return a kernel of one of many kinds, and a description with any geometry."""
    ndim = int(rng.choice([1, 2, 2, 2, 3]))
    taps = tuple(int(k) for k in rng.integers(1, {1: 8, 2: 5, 3: 4}[ndim], ndim))
    groups = int(rng.choice([1, 1, 1, 2]))
    transposed = bool(rng.random() < 0.2)
    wide, narrow = int(rng.integers(1, 5)) * groups, int(rng.integers(1, 5))
    shape = (wide, narrow, *taps)
    kernel = rng.normal(size=shape)
    kind = rng.choice(["gaussian", "low rank", "smooth", "decaying", "sparse", "one tap", "constant", "scaled"])
    spatial = tuple(range(2, 2 + ndim))
    if kind == "low rank":
        kernel = rng.normal(size=shape[:1]).reshape(-1, *[1] * (ndim + 1)) * rng.normal(size=(1, *shape[1:]))
    elif kind == "smooth":
        kernel = kernel.cumsum(axis=2)
    elif kind == "decaying":
        kernel = kernel * 0.3 ** np.indices(taps).sum(axis=0)
    elif kind == "sparse":
        kernel = kernel * (rng.random(shape) < 0.2)
    elif kind == "one tap":
        kernel = kernel * (np.arange(math.prod(taps)) == rng.integers(math.prod(taps))).reshape(taps)
    elif kind == "constant":
        kernel = np.broadcast_to(kernel.mean(axis=spatial, keepdims=True), shape).copy()
    elif kind == "scaled":
        kernel = kernel * 10.0 ** rng.uniform(-12, 12)
    if rng.random() < 0.1:
        kernel = kernel + 1j * rng.normal(size=shape)
    elif rng.random() < 0.5:
        kernel = kernel.astype("float32")
    conv = convsv.Conv(
        ("IO" if transposed else "OI") + {1: "W", 2: "HW", 3: "DHW"}[ndim],
        stride=tuple(int(s) for s in rng.choice([1, 1, 2, 3], ndim)),
        dilation=tuple(int(d) for d in rng.choice([1, 1, 2], ndim)),
        groups=groups,
        transposed=transposed,
    )
    return kernel, conv
