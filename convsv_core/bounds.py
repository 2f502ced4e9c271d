"""Certified bounds of the operator norm, for every input size at once or for one circular grid.

The norm of the symbol cannot change quickly with the frequency. With the taps centred, ``Re(u* A(theta) v)`` is, for
unit u and v, of exponential type ``d_i`` along axis i, half the span of the axis's offsets. Let M be the supremum of
``|A|``. The Bernstein-Szego inequality makes ``arccos(Re(u* A v) / M)`` change no faster than ``sum_i d_i |delta_i|``,
so with ``D = max(sum_i d_i |delta_i|) < pi / 2`` over a cell around c:

- the cell that holds the maximiser of ``|A|`` over the torus has ``|A(c)| >= M cos(D)``;
- everywhere in any cell ``|A| <= M cos(max(0, arccos(|A(c)| / M) - D))``, also with a bound from above for M.

Cells that cannot matter are dropped, the others are split. A flat symbol never drops a cell that way, so a second
bound stands beside: the Gram matrix ``A A* = sum_s G_s exp(i s theta)`` changes by no more than
``sum_s |G_s| |exp(i s delta) - 1|``, which is 0 where A A* is constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.padding import check_repeats_no_pixel, padding_norm
from convsv_core._norm.padded import padded_operator_norm
from convsv_core.ascent import ascend
from convsv_core.backend import Array
from convsv_core.conv import Conv, as_int
from convsv_core.covering import Cells, cover, distinct
from convsv_core.evaluation import BLOCK_BYTES, symbol_polynomial
from convsv_core.gram import gram_polynomial, sum_rounding
from convsv_core.operand import Operand, make_operand
from convsv_core.plan import HostArray, check_input_shape, is_circulant
from convsv_core.plugins import on_values

COARSEST = 1.3
"""Largest D of the first cells; the Bernstein-Szego bound needs less than pi / 2."""

BATCH = 256
"""Norms computed between two looks at which cells they decide."""

TESTED_SIDE = 64
"""Side from which a matrix is tested against limits by Cholesky's factorisation, and its norm computed if need be."""

STARTS = 8
"""Frequencies from which a local maximum is looked for."""

ENUMERATED = 512
"""Frequencies of a grid that are visited one by one; larger grids are searched."""


class NormBounds(NamedTuple):
    """Certified bounds of an operator norm.

    Attributes
    ----------
    lower, upper : 0-d arrays
        ``lower <= norm <= upper``, rounding included.
    frequency : tuple of float
        Angles, in radians, one an axis, at which `lower` is attained.
    evaluations : int
        Matrices of the symbol whose norm was computed.
    converged : bool
        Whether ``upper <= (1 + rtol) * lower``.
    left, right : arrays, shapes (groups, rows) and (groups, columns), complex
        Singular vector pair of the `symbol` at that frequency, 0 outside the group that attains it.
    """

    lower: Array
    upper: Array
    frequency: tuple[float, ...]
    evaluations: int
    converged: bool
    left: Array
    right: Array


@on_values
def norm_bounds(
    kernel: Array,
    conv: Conv,
    *,
    input_shape: tuple[int, ...] | None = None,
    rtol: float = 1e-3,
    max_evaluations: int = 20_000,
) -> NormBounds:
    """Bound the operator norm of a convolution from both sides, with a proof.

    Without an `input_shape` the norm is the supremum of the symbol's over all frequencies: the norm on the
    infinite lattice. It bounds the layer's norm from above for every input size, and for circular, zero and
    'valid' padding alike, and is the limit of the norms as the input grows. The cost does not
    depend on any input size. With an `input_shape` it is the norm on input of those extents, with the padding that
    `conv` declares.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or
        complex128.
    conv : Conv
        The geometry. Without an `input_shape` its padding does not matter where it repeats no pixel: reflect,
        replicate and more circular padding than "same" has are refused, and for circular padding the bound
        is that of the extents which the stride divides.
    input_shape : tuple of int, optional
        Spatial extents of the layer's input, in the order of ``conv.spatial``.
    rtol : float, default 1e-3
        Relative gap to reach.
    max_evaluations : int, default 20000
        Matrices of the symbol to visit at most, beyond those of the first, coarse cover. When they are spent,
        the certificate reached so far is returned.

    Returns
    -------
    NormBounds
        With ``upper <= (1 + rtol) * lower`` where `converged`; true in any case.

    Raises
    ------
    TypeError, ValueError
        As for `singular_values`; also for an `rtol` that is not positive.
    NotImplementedError
        Padding that repeats pixels, without an `input_shape`.

    Notes
    -----
    On a circular grid both bounds close in on the largest of the grid's norms. With another padding, `lower` is the
    norm that `operator_norm` finds, less the tolerance of its rounding, and `upper` is the supremum over all
    frequencies times the norm of the padding as a map of images. The gap between the two is real, and as a rule larger
    than `rtol`; it closes as the input grows.

    Neither traceable nor differentiable: the search reads norms on the host to decide where to look next. A lazy
    kernel (Dask) is computed now, and bounded as one task in the library of its chunks. (The
    gradient of the norm by the kernel is the real part of ``left_a exp(i q theta) conj(right_b)``, conjugated.)
    Computed in float64 where the library has it at hand. Both bounds are widened by the rounding error of the
    norms that they rest on, which is taken as ``min(n, 8 sqrt(n))`` unit roundoffs of the sum of the moduli for
    sums of n terms (Higham and Mary, SIAM Journal on Scientific Computing, 2019), and by that of the answer.

    Examples
    --------
    >>> import numpy as np
    >>> bounds = norm_bounds(np.ones((1, 1, 3, 3)), Conv("OIHW"))
    >>> bool(bounds.lower <= 9.0 <= bounds.upper), bounds.converged, bounds.frequency
    (True, True, (0.0, 0.0))
    """
    if not isinstance(rtol, int | float) or isinstance(rtol, bool) or not rtol > 0:
        raise ValueError(f"rtol={rtol!r}: wanted a positive number")
    budget = as_int("max_evaluations", max_evaluations, least=1)
    operand = make_operand(kernel, None, conv).widen()
    if input_shape is None:
        check_repeats_no_pixel(tuple(int(n) for n in kernel.shape), conv)
    extents = None if input_shape is None else check_input_shape(input_shape, conv)
    with operand.backend.computing(operand.kernel):
        return _norm_bounds(operand, kernel, extents, rtol, budget)


def _norm_bounds(
    operand: Operand, kernel: Array, input_shape: tuple[int, ...] | None, rtol: float, budget: int
) -> NormBounds:
    conv = operand.plan.conv
    # The answer's own rounding, once up and once down, is part of the gap.
    margin = 2 * operand.answer_eps
    gap = max(rtol - 3 * margin, rtol / 2)
    norms = SymbolNorms(operand, budget)
    upper = search_torus(norms, gap)
    axes = operand.plan.axes
    frequency = tuple(float(angle) / axis.step for angle, axis in zip(norms.best_angles, axes, strict=True))
    lower = norms.best
    if input_shape is not None:
        shape = tuple(int(n) for n in kernel.shape)
        if is_circulant(shape, input_shape, conv):
            grid = make_operand(kernel, input_shape, conv).widen()
            norms = SymbolNorms(grid, budget, spent=norms.evaluations)
            upper, place = search_grid(norms, gap, upper, frequency)
            frequency = tuple(2 * math.pi * j / axis.grid for j, axis in zip(place, grid.plan.axes, strict=True))
            lower = norms.best
        else:
            attained = float(padded_operator_norm(kernel, input_shape, conv)) / float(operand.scale)
            lower = attained * (1 - norms.relative_rounding)
            upper *= padding_norm(shape, input_shape, conv)  # `margin` below covers the rounding of the product
    lower, upper = lower * (1 - margin), max(upper, lower) * (1 + margin)
    left, right = singular_pair(make_operand(kernel, None, conv, all_residues=True), frequency)
    return NormBounds(
        operand.answer(operand.xp.full_like(operand.scale, lower)),
        operand.answer(operand.xp.full_like(operand.scale, upper)),
        frequency,
        norms.evaluations,
        bool(upper <= (1 + rtol) * lower),
        left,
        right,
    )


class SymbolNorms:
    """Norms of the symbol at any angles, with the rounding error of each and the best one so far.

    Angles here are those of the reduced offsets: `Axis.step` times the angles of the grid.

    Attributes
    ----------
    types : float array, shape (ndim,)
        Exponential type along each axis.
    best : float
        A lower bound: the largest norm so far less its rounding error.
    best_angles : float array, shape (ndim,)
    tests : bool
        Whether matrices are tested against limits before their norm is computed: where their side is at least
        `tested_side`.
    relative_rounding : float
        Rounding error of a sum over the taps and channels, relative to the sum of moduli.
    ceiling : float
        A crude upper bound of the norm at all angles, from the sum of moduli.
    """

    def __init__(self, operand: Operand, budget: int, spent: int = 0, tested_side: int = TESTED_SIDE) -> None:
        backend = operand.backend
        self.operand = operand
        self.budget = budget
        self.evaluations = spent
        self.best = 0.0
        self._gram = gram_polynomial(operand)
        self._differences = self._gram.differences.astype(float)
        self.types = operand.plan.exponential_types
        self.best_angles = np.zeros(len(self.types))
        self._attained = False
        self.tests = min(operand.plan.block) >= tested_side
        self._moduli = backend.to_numpy(self._gram.moduli()).astype(float)
        self.relative_rounding = sum_rounding(operand.plan) * operand.eps
        self.rounding = self.relative_rounding * float(self._moduli.sum())
        self.ceiling = math.sqrt(float(self._moduli.sum()) + self.rounding)

    def affords(self, count: int) -> bool:
        """Whether `count` more evaluations are within the budget."""
        return self.evaluations + count <= self.budget

    def upper(self, angles: HostArray, limits: HostArray | None = None) -> HostArray:
        """An upper bound of the norm at each row of `angles`: the norm and its rounding error.

        Where the norm is not above one of its `limits`, shape (..., len(angles)), the first such limit may be
        returned instead. A matrix whose norm is below is told by a Cholesky factorisation, at a fraction of
        the work of its eigenvalues.
        """
        self.evaluations += len(angles)
        if limits is None or not self.tests:
            return self._computed(angles)
        found = np.zeros(len(angles))
        left = np.arange(len(angles))
        for limit in np.atleast_2d(limits):
            if len(left):
                levels = np.maximum(limit[left] ** 2 - self.rounding, 0.0)
                below = self._map(self._is_below, angles[left], levels)
                found[left[below]] = limit[left[below]]
                left = left[~below]
        if len(left):
            found[left] = self._computed(angles[left])
        return found

    def _computed(self, angles: HostArray) -> HostArray:
        found = self._map(self._largest, angles, np.zeros(len(angles))).astype(float)
        first = int(np.argmax(found))
        attained = math.sqrt(max(0.0, float(found[first]) - self.rounding))
        if attained > self.best or not self._attained:
            self.best, self.best_angles, self._attained = attained, angles[first], True
        return np.asarray(np.sqrt(np.maximum(found, 0) + self.rounding))

    def _map(self, function: Callable[[Array], Array], angles: HostArray, levels: HostArray) -> HostArray:
        """`function` of ``level I - G`` at `angles`, one number or flag a row, on the host."""
        xp, backend, gram = self.operand.xp, self.operand.backend, self._gram

        def of_block(rows: Array) -> Array:
            return function(gram.matrices(xp.astype(rows, self.operand.real_dtype, copy=False)))

        rows = gram.factors_below(angles, levels)
        filled = np.minimum(np.arange(backend.batch_size(len(rows))), len(rows) - 1)
        found = backend.map_blocks(
            of_block, rows[filled], self.operand.kernel, row_bytes=gram.row_bytes, budget=BLOCK_BYTES
        )
        return backend.to_numpy(found)[: len(rows)]

    def _largest(self, matrices: Array) -> Array:
        """The largest eigenvalue of G among the groups, where the level is 0."""
        xp = self.operand.xp
        if matrices.shape[-1] == 1:
            return -xp.min(xp.real(matrices[..., 0, 0]), axis=-1)
        return -xp.min(self.operand.backend.eigvalsh(matrices)[..., 0], axis=-1)

    def _is_below(self, matrices: Array) -> Array:
        """Whether the eigenvalues of G of all groups are below the level."""
        return self.operand.xp.all(self.operand.backend.is_positive_definite(matrices), axis=-1)

    def variation(self, reach: HostArray) -> HostArray:
        """Bound of the change of the squared norm where ``|s . delta| <= reach`` for each difference s."""
        return np.asarray(np.sum(self._moduli * 2 * np.sin(np.minimum(reach, np.pi) / 2), axis=-1))

    def reach(self, corners: HostArray) -> HostArray:
        """The largest ``|s . delta|`` among `corners`, shape (..., corners, ndim), for each difference s."""
        return np.asarray(np.max(np.abs(corners @ self._differences.T), axis=-2))


# ---- the torus: all frequencies -------------------------------------------------------------------


@dataclass(frozen=True)
class Open:
    """Cells: one row, or entry, each.

    Attributes
    ----------
    centres : float array, shape (cells, ndim)
    values : float array
        Upper bound of the norm at the centre.
    divisors : int array
        How many of a cell's edges make one of the first cells'.
    parts : int array
        Into how many, along each axis, a cell is to be split if it is not decided.
    bounds : float array
        Upper bound of the supremum, for the cell that holds its maximiser.
    """

    centres: HostArray
    values: HostArray
    divisors: HostArray
    parts: HostArray
    bounds: HostArray

    def take(self, chosen: HostArray) -> Open:
        """Those of the given indices, or flagged."""
        return Open(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def join(cells: list[Open]) -> Open:
        """All of them."""
        return Open(*(np.concatenate([getattr(one, field.name) for one in cells]) for field in fields(Open)))


class Levels:
    """What follows for cells of one size from the norm at their centres.

    Parameters
    ----------
    norms : SymbolNorms
    cells : Cells
        The first ones.
    rtol, sufficient : float
        Cells are decided where they show the supremum to be at most ``(1 + rtol) * norms.best``, or `sufficient`.
    """

    def __init__(self, norms: SymbolNorms, cells: Cells, rtol: float, sufficient: float) -> None:
        self.norms, self.cells, self.rtol, self.sufficient = norms, cells, rtol, sufficient
        self._known: dict[int, tuple[float, float]] = {}

    @property
    def enough(self) -> float:
        """What a cell's bound must not exceed for the cell to be decided."""
        return max((1 + self.rtol) * self.norms.best, self.sufficient)

    def limit(self, divisor: int) -> float:
        """The norm at the centre up to which a cell is decided."""
        cosine, change = self._growth(divisor)
        by_change = math.sqrt(max(self.enough**2 - change, 0.0))
        # A unit in the last place less, so that the bound that follows from the limit decides.
        return max(self.enough * cosine, by_change) * (1 - 1e-15)

    def visit(self, centres: HostArray, divisor: int) -> Open:
        """Cells around new centres: visited no more closely than it takes to tell how to go on."""
        best = self.norms.best
        if self.norms.tests:
            ladder = np.asarray([*(self.limit(parts * divisor) for parts in (1, 2, 3)), self.enough])
            values = self.norms.upper(centres, np.broadcast_to(ladder[:, None], (len(ladder), len(centres))))
        else:
            values = self.norms.upper(centres)
        if self.norms.best > best:
            self.climb(self.norms.best_angles[None, :])
        return self.bounded(centres, values, divisor)

    def climb(self, starts: HostArray) -> None:
        """Raise `norms.best` to a local maximum, where that saves much."""
        if self.norms.tests:
            self.norms.upper(ascend(self.norms.operand, starts, self.norms.types)[None, :])

    def bounded(self, centres: HostArray, values: HostArray, divisor: int) -> Open:
        """Cells whose values are known."""
        cosine, change = self._growth(divisor)
        # Halves, where they will do if the norm there is no larger than at this centre.
        parts = np.where(values <= self.limit(2 * divisor), 2, 3)
        bounds = np.minimum(values / cosine, np.sqrt(values**2 + change))
        return Open(centres, values, np.full(len(centres), divisor), parts, bounds)

    def split(self, cells: Open, real: bool) -> list[Open]:
        """The cells that these split into, visited."""
        found = []
        for divisor, parts in np.unique(np.stack([cells.divisors, cells.parts], axis=1), axis=0).tolist():
            chosen = cells.take((cells.divisors == divisor) & (cells.parts == parts))
            fresh = self.cells.part(divisor).split(chosen.centres, parts)
            if parts % 2:  # the middle cells keep the centres of those that they are parts of
                known = (
                    chosen.values <= self.limit(divisor * parts)
                    if self.norms.tests
                    else np.ones(len(chosen.values), bool)
                )
                found.append(self.bounded(chosen.centres[known], chosen.values[known], divisor * parts))
                fresh = np.concatenate([fresh, chosen.centres[~known]])
            found.append(self.visit(distinct(fresh, real), divisor * parts))
        return found

    def _growth(self, divisor: int) -> tuple[float, float]:
        """The cosine of D, and the most that the squared norm changes within a cell."""
        if divisor not in self._known:
            cells = self.cells.part(divisor)
            change = float(self.norms.variation(self.norms.reach(cells.corners)))
            self._known[divisor] = math.cos(cells.reach), change
        return self._known[divisor]


def search_torus(norms: SymbolNorms, rtol: float, sufficient: float = 0.0) -> float:
    """Raise `norms.best` towards the supremum over all frequencies; returns an upper bound of it.

    An upper bound of `sufficient` is not improved.
    """
    real = norms.operand.plan.real
    # Begin so that cells of the last size are just fine enough.
    finest = math.acos(1 / (1 + rtol))
    centres, cells = cover(norms.types, finest * 3 ** max(0, math.floor(math.log(COARSEST / finest, 3))))
    levels = Levels(norms, cells, rtol, sufficient)
    centres = distinct(centres, real)
    levels.climb(centres[:: -(-len(centres) // STARTS)])
    left = levels.visit(centres, 1)
    most = 3 ** len(cells.edges) if len(cells.edges) else 0
    settled = 0.0
    while True:
        undecided = left.bounds > levels.enough
        settled = max(settled, float(np.max(left.bounds, where=~undecided, initial=0.0)))
        left = left.take(undecided)
        count = len(left.bounds)
        # A constant symbol has one cell, which nothing can split.
        batch = min(max(BATCH // most, count // 2), (norms.budget - norms.evaluations) // most) if most else 0
        if not count or batch < 1:
            return max(settled, float(np.max(left.bounds, initial=0.0)))
        # Those with the highest bounds are split first: what they raise `best` to may decide the others.
        order = np.argsort(-left.bounds)
        first, rest = left.take(order[:batch]), left.take(order[batch:])
        left = Open.join([rest, *levels.split(first, real)])


# ---- one circular grid -----------------------------------------------------------------------------


def search_grid(
    norms: SymbolNorms, rtol: float, supremum: float, near: tuple[float, ...]
) -> tuple[float, tuple[int, ...]]:
    """Raise `norms.best` towards the largest norm on the grid; returns an upper bound, and where the best is.

    `supremum` is an upper bound over all frequencies, and `near` the angles of a large norm, whose
    neighbours on the grid are tried first.
    """
    axes = norms.operand.plan.axes
    periods = np.asarray([axis.period for axis in axes])

    def angles(places: HostArray) -> HostArray:
        return np.asarray(2 * np.pi * (places % periods) / periods)

    def answer(upper: float) -> tuple[float, tuple[int, ...]]:
        found = np.rint(norms.best_angles / (2 * np.pi) * periods).astype(int) % periods
        return min(upper, supremum), tuple(int(j) for j in found)

    exact = np.asarray([angle * axis.grid / (2 * np.pi) for angle, axis in zip(near, axes, strict=True)])
    around = np.asarray(list(itertools.product(*zip(np.floor(exact), np.ceil(exact), strict=True)))).astype(int)
    norms.upper(angles(np.unique(around % periods, axis=0)))
    # Boxes of frequencies, first and last of each axis included, which are split until one is left.
    if len(norms.operand.plan.frequencies) <= ENUMERATED:
        first = last = norms.operand.plan.frequencies
    else:
        first, last = np.zeros((1, len(axes)), int), (periods - 1)[None, :]
        if norms.operand.plan.real:  # half of the grid, by one axis
            last[:, -1] = periods[-1] // 2
    settled = 0.0
    while len(first):
        middle = (first + last) // 2
        values = norms.upper(angles(middle))
        delta = np.maximum(middle - first, last - middle) * 2 * np.pi / periods
        distance = np.maximum(
            np.arccos(np.minimum(values / max(supremum, np.finfo(float).tiny), 1)) - delta @ norms.types, 0.0
        )
        corners = np.stack([np.asarray(s) * delta for s in itertools.product((-1, 1), repeat=len(axes))], axis=1)
        change = norms.variation(norms.reach(corners))
        bounds = np.minimum(supremum * np.cos(distance), np.sqrt(values**2 + change))
        undecided = (bounds > (1 + rtol) * norms.best) & np.any(last > first, axis=1)
        settled = max(settled, float(np.max(bounds, where=~undecided, initial=0.0)))
        first, last, delta = first[undecided], last[undecided], delta[undecided]
        if not norms.affords(2 * len(first)):
            return answer(max(settled, float(np.max(bounds[undecided], initial=0.0))))
        # Halve the axis along which the symbol can change most.
        axis = np.argmax(np.where(last > first, (delta + 1e-9) * (norms.types + 1e-9), 0.0), axis=1)
        chosen = np.arange(len(axes)) == axis[:, None]
        middle = (first + last) // 2
        first, last = (
            np.concatenate([first, np.where(chosen, middle + 1, first)]),
            np.concatenate([np.where(chosen, middle, last), last]),
        )
    return answer(max(settled, norms.best))


def singular_pair(operand: Operand, frequency: tuple[float, ...]) -> tuple[Array, Array]:
    """Left and right singular vectors of the symbol at the given angles, 0 outside the best group."""
    xp, backend, plan = operand.xp, operand.backend, operand.plan
    coefficients = symbol_polynomial(operand).coefficients
    offsets = np.asarray(list(itertools.product(*(axis.offsets for axis in plan.axes))), float)
    steps = np.asarray([axis.step for axis in plan.axes])
    phases = np.exp(1j * (offsets * steps) @ np.asarray(frequency))
    phases = xp.astype(backend.constant(phases, coefficients), operand.complex_dtype, copy=False)
    matrices = xp.sum(xp.reshape(phases, (-1, 1, 1, 1)) * coefficients, axis=0)
    bases = np.asarray(list(itertools.product(*(axis.bases for axis in plan.axes))), float)
    shifts = np.repeat(np.exp(1j * bases @ np.asarray(frequency)), plan.columns)
    matrices = matrices * xp.astype(backend.constant(shifts, matrices), operand.complex_dtype, copy=False)
    if plan.conv.transposed:
        matrices = backend.adjoint(matrices)
    u, s, vh = backend.svd(matrices)
    groups = backend.constant(np.arange(plan.groups), s)
    best = xp.astype(groups == xp.argmax(s[:, 0]), operand.complex_dtype)[:, None]
    right = backend.conj(vh[:, 0, :]) * best
    return operand.answer(u[..., 0] * best, scaled=False), operand.answer(right, scaled=False)
