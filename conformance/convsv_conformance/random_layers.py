"""Draw random layers of every kind and geometry, and search for the norms of their symbols.

The layers are tiny. The search shares no code with the library under test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import convsv_core as convsv

__all__ = ["random_layer", "refined_supremum", "symbol_norm"]

Array: TypeAlias = NDArray[Any]


def symbol_norm(kernel: Array, conv: convsv.Conv, angles: Array) -> Array:
    """Return the norm of the symbol at each row of `angles`, by its definition and without the core."""
    order = [conv.layout.index(letter) for letter in (*conv.spatial, *("IO" if conv.transposed else "OI"))]
    taps = kernel.astype(complex if np.iscomplexobj(kernel) else float).transpose(order)
    taps = taps.conj() if conv.transposed else taps  # a transpose is the adjoint of the conjugate
    *extents, rows, columns = taps.shape
    size = math.prod(conv.strides)
    each = rows // conv.groups
    found = np.zeros((len(angles), conv.groups, each, size, columns), complex)
    for place in itertools.product(*map(range, extents)):
        offset, residue = zip(
            *(divmod(p * d, s) for p, d, s in zip(place, conv.dilations, conv.strides, strict=True)), strict=True
        )
        phase = np.exp(1j * angles @ offset)
        column = np.ravel_multi_index(residue, conv.strides)
        found[:, :, :, column, :] += phase[:, None, None, None] * taps[place].reshape(conv.groups, each, columns)
    blocks = found.reshape(len(angles), conv.groups, each, size * columns)
    return np.linalg.svd(blocks, compute_uv=False)[..., 0].max(axis=1)


def refined_supremum(norm: Callable[[Array], Array], ndim: int, start: Array) -> float:
    """Return the largest norm that a fine grid finds, refined by a pattern search from the grid's best points."""
    points = {1: 400, 2: 40, 3: 12}[ndim]
    grid = np.stack(np.meshgrid(*[np.arange(points) * 2 * np.pi / points] * ndim), axis=-1).reshape(-1, ndim)
    values = norm(grid)
    candidates = np.concatenate([grid[np.argsort(values)[-4:]], start[None, :]])
    step = 2 * np.pi / points
    best = norm(candidates)
    moves = np.asarray(list(itertools.product((-1, 0, 1), repeat=ndim)), float)
    while step > 1e-9:
        tried = candidates[:, None, :] + step * moves
        found = norm(tried.reshape(-1, ndim)).reshape(tried.shape[:2])
        chosen = found.argmax(axis=1)
        improved = found.max(axis=1) > best
        candidates = np.where(improved[:, None], tried[np.arange(len(tried)), chosen], candidates)
        best = np.maximum(best, found.max(axis=1))
        step = step if improved.any() else step / 3
    return float(best.max())


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
