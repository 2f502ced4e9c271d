"""The excess of a convolution over a bound of the norm, and the change of the taps nearest to the excess.

The excess of a matrix W = U S V* over c is ``U max(S - c, 0) V*``: W minus the nearest matrix of norm at most c. A
test shows for most frequencies that the matrix is within the bound. A test costs less than a decomposition, so only
the other matrices are decomposed. The taps nearest to the operator of these excesses are an average over the
frequencies. One such pass is a clip-and-cut step. The projections repeat passes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._projection.leading import LEADING_ENTRIES, LEADING_SIDE, WIDE_SIDE, expected_share, leading_pairs
from convsv_core._projection.polar import polar_by_products
from convsv_core._symbol.gram import smaller_gram
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, TrigonometricPolynomial, symbol_polynomial
from convsv_core._symbol.rows import GramRows, PowerRows, ProductRows, grid_rows
from convsv_core._symbol.small_matrices import divisors, safe_sqrt, squared_norm
from convsv_core.backend import Array, Backend

__all__ = [
    "BLOCK_COPIES",
    "Excess",
    "Method",
    "Samples",
    "clip_and_cut",
    "clip_between",
    "dual_excess",
    "excess_by_eigenvectors",
    "excess_by_products",
    "nearest_taps",
    "sharing",
]

Method: TypeAlias = Literal["svd", "gram", "products"]
"""How an excess is computed: by singular vectors, by eigenvectors of Gram matrices, or by matrix products alone."""

BLOCK_COPIES = 4
"""Working memory of a row of `nearest_taps`, with its vectors and results, in units of the symbol's own. A guess."""

PROBED = 32
"""Every `PROBED`-th matrix is decomposed, to tell whether leading pairs are enough. A guess.

With fewer matrices than this, leading pairs are tried at once.
"""

WORTHWHILE = 0.5
"""Leading pairs are tried if they are expected to be enough for this share of the matrices. A guess."""


class Samples(NamedTuple):
    """Hold some of the visited frequencies, on the device of the kernel.

    Attributes
    ----------
    frequencies : array, shape (count, ndim)
        Indices of the frequencies.
    weights : array, shape (count,), complex
        The number of frequencies of the grid that each one stands for.
    """

    frequencies: Array
    weights: Array

    @classmethod
    def at(cls, operand: Operand, places: HostArray | None = None) -> Samples:
        """Return the visited frequencies at the given places, or all visited frequencies."""
        backend, plan = operand.backend, operand.plan
        chosen = slice(None) if places is None else places
        weights = backend.asarray_like(plan.weights()[chosen], operand.kernel)
        frequencies = backend.asarray_like(plan.frequencies[chosen], operand.kernel)
        return cls(frequencies, operand.xp.astype(weights, operand.complex_dtype))


class Excess(NamedTuple):
    """Hold the excesses of matrices over a limit, and the change of the taps nearest to the excesses.

    Attributes
    ----------
    change : array of the kernel's shape
    matrices : array, shape (count, groups, rows, columns), complex
        One excess for each of the samples.
    trace : array, shape (count,)
        The sum of the singular values of each excess, over all groups.
    """

    change: Array
    matrices: Array
    trace: Array


MatrixExcess: TypeAlias = Callable[[Array], tuple[Array, Array]]
"""A function from matrices, shape (B, groups, rows, columns), to their excesses and traces, shape (B,)."""


def clip_and_cut(
    operand: Operand,
    kernel: Array,
    limit: Array,
    method: Method,
    *,
    places: HostArray | None = None,
    tested: Operand | None = None,
) -> Array:
    """Return the change of a kernel by a clip-and-cut step: the taps nearest to its excess over a limit.

    Parameters
    ----------
    operand : Operand
        Its geometry is used. Its own kernel is not.
    kernel : array
        A kernel of the shape and scale of the operand's kernel.
    limit : 0-d array
        The limit at the operand's scale.
    method : "svd", "gram" or "products"
    places : int array, optional
        Places of the frequencies whose excess is computed. All visited frequencies if not given.
    tested : Operand, optional
        An operand with this kernel in a cheaper dtype. It is used to test which frequencies have an excess.
    """
    operand = operand.of(kernel)
    places = np.arange(len(operand.plan.frequencies)) if places is None else places
    if operand.backend.has_values(kernel):
        level = float(limit) ** 2
        places = places[_tests(operand if tested is None else tested, method).above(places, level)]
        if tested is not None and min(operand.plan.block) >= WIDE_SIDE:
            # The test's margin for rounding grows with the square of the side. Test again in the wider dtype.
            places = places[_tests(operand, method).above(places, level)]
    if not len(places):
        return operand.xp.zeros_like(kernel)
    samples, symbol = Samples.at(operand, places), symbol_polynomial(operand)

    def matrices_at(chosen: Array) -> Array:
        return symbol(operand.xp.take(samples.frequencies, chosen, axis=0))

    excess = _excess_function(operand, matrices_at, np.arange(len(places)), limit, method)
    (change,) = nearest_taps(symbol, samples, lambda phases, _: excess.of(symbol.matrices(phases))[:1], excess.context)
    return change


def clip_between(operand: Operand, limit: Array, lower: Array, places: HostArray | None = None) -> Array:
    """Return the change of an operand's taps by clipping its singular values to ``[lower, limit]``."""
    symbol = symbol_polynomial(operand)

    def excess(phases: Array, _: Array) -> tuple[Array, ...]:
        return _excess_svd(operand.backend, symbol.matrices(phases), limit, lower)[:1]

    (change,) = nearest_taps(symbol, Samples.at(operand, places), excess)
    return change


def dual_excess(operand: Operand, kernel: Array, limit: Array, samples: Samples, dual: Array) -> Excess:
    """Return the excess over a limit of the symbol of a kernel plus the matrices of `dual`, one for each sample."""
    xp = operand.xp
    operand = operand.of(kernel)
    symbol = symbol_polynomial(operand)
    count = dual.shape[0]
    rows = np.arange(count)
    if operand.backend.has_values(kernel):
        # A matrix with a dual nearly always exceeds the limit: a test would cost more than it saves.
        active = operand.backend.to_numpy(xp.any(dual != 0, axis=(1, 2, 3)))
        others = rows[~active]
        exceeds = ProductRows(symbol, samples.frequencies, dual).above(others, float(limit) ** 2)
        rows = np.union1d(rows[active], others[exceeds])
    if not len(rows):
        return Excess(xp.zeros_like(kernel), xp.zeros_like(dual), xp.zeros_like(xp.real(dual[:, 0, 0, 0])))

    def matrices_at(chosen: Array) -> Array:
        return symbol(xp.take(samples.frequencies, chosen, axis=0)) + xp.take(dual, chosen, axis=0)

    excess = _excess_function(operand, matrices_at, rows, limit, "gram")

    def of_block(phases: Array, chosen: Array) -> tuple[Array, ...]:
        matrices, trace = excess.of(symbol.matrices(phases) + xp.take(dual, chosen, axis=0))
        return matrices, matrices, trace

    change, matrices, trace = nearest_taps(symbol, samples, of_block, excess.context, rows)
    if len(rows) < count:
        places = np.full(count, len(rows))
        places[rows] = np.arange(len(rows))
        matrices, trace = operand.take_or_zero(matrices, places, 0), operand.take_or_zero(trace, places, 0)
    return Excess(change, matrices, trace)


def nearest_taps(
    symbol: TrigonometricPolynomial,
    samples: Samples,
    function: Callable[[Array, Array], tuple[Array, ...]],
    context: AbstractContextManager[object] | None = None,
    rows: HostArray | None = None,
) -> tuple[Array, ...]:
    """Return the kernel whose operator is nearest to the operator of the matrices that a function returns.

    Parameters
    ----------
    symbol : TrigonometricPolynomial
        Its phases and its operand's geometry are used.
    samples : Samples
        The matrices are 0 at all frequencies that are not among the samples.
    function : callable
        From the phases of a block of samples, and the rows of that block, to a tuple of arrays whose first axis is
        the block's. The first array holds the matrices, shape (B, groups, rows, columns).
    context : context manager, optional
        It is entered while blocks are mapped.
    rows : int array, optional
        Rows of the samples. All rows if not given.

    Returns
    -------
    tuple of arrays
        The kernel, and the other arrays of `function`, joined.
    """
    operand = symbol.operand
    xp, backend = operand.xp, operand.backend

    def of_block(chosen: Array) -> tuple[Array, ...]:
        phases = symbol.phases(xp.take(samples.frequencies, chosen, axis=0))
        matrices, *others = function(phases, chosen)
        weighted = phases * xp.take(samples.weights, chosen, axis=0)[:, None]
        sums = xp.matmul(backend.adjoint(weighted), xp.reshape(matrices, (matrices.shape[0], -1)))
        return (xp.reshape(sums, (1, -1, *matrices.shape[1:])), *others)

    rows = np.arange(samples.frequencies.shape[0]) if rows is None else rows
    with context or contextlib.nullcontext():
        sums, *others = backend.map_blocks(
            of_block, rows, operand.kernel, row_bytes=BLOCK_COPIES * symbol.row_bytes, budget=BLOCK_BYTES
        )
    return to_kernel(operand, xp.sum(sums, axis=0)), *others


class _ExcessFunction(NamedTuple):
    """Hold a function that computes excesses, and the context in which blocks of excesses are mapped."""

    of: MatrixExcess
    context: AbstractContextManager[object]


def _excess_function(
    operand: Operand, matrices_at: Callable[[Array], Array], rows: HostArray, limit: Array, method: Method
) -> _ExcessFunction:
    """Return the function that computes excesses by `method`, or by leading pairs if few values exceed the limit."""
    backend, side = operand.backend, min(operand.plan.block)
    if method == "gram" and _few_exceed(operand, matrices_at, rows, limit):
        return _ExcessFunction(functools.partial(_excess_leading, backend, limit=limit), backend.products_context(side))
    functions = {"svd": _excess_svd, "gram": excess_by_eigenvectors, "products": excess_by_products}
    return _ExcessFunction(functools.partial(functions[method], backend, limit=limit), contextlib.nullcontext())


def _few_exceed(operand: Operand, matrices_at: Callable[[Array], Array], rows: HostArray, limit: Array) -> bool:
    """Tell whether to compute leading pairs alone. They have the precision of an answer of 32 bits."""
    backend, side = operand.backend, min(operand.plan.block)
    if not operand.widened or side < LEADING_SIDE or len(rows) * side**2 < LEADING_ENTRIES:
        return False
    if not backend.has_values(limit) or not backend.truth(limit > 0):
        return False
    if len(rows) < PROBED:
        return True
    sample = backend.asarray_like(rows[::PROBED], operand.kernel)
    return expected_share(backend, matrices_at(sample), limit) >= WORTHWHILE


def _tests(operand: Operand, method: Method) -> GramRows:
    """Return the test of the visited frequencies; for "products" a test by products alone."""
    if method != "products":
        return grid_rows(operand)
    frequencies = operand.backend.asarray_like(operand.plan.frequencies, operand.kernel)
    return PowerRows(symbol_polynomial(operand), frequencies)


def to_kernel(operand: Operand, taps: Array) -> Array:
    """Return the nearest kernel from sums over the frequencies of one period, one matrix for each offset.

    If taps of a kernel larger than the input wrap onto each other, they share the sum equally.
    """
    xp, plan = operand.xp, operand.plan
    kernel = operand.from_taps(xp.real(taps) if plan.real else taps) / math.prod(plan.periods)
    return kernel / sharing(operand) if np.any(plan.sharing > 1) else kernel


def sharing(operand: Operand) -> Array:
    """Return the number of taps that act where each tap acts, as an array that broadcasts with the kernel.

    All numbers are 1 unless the kernel is larger than the input.
    """
    xp, conv = operand.xp, operand.plan.conv
    order = [conv.spatial.index(letter) for letter in conv.layout if letter in conv.spatial]
    spatial = [n if letter in conv.spatial else 1 for letter, n in zip(conv.layout, operand.kernel.shape, strict=True)]
    counts = operand.plan.sharing.transpose(order).reshape(spatial).astype(float)
    return xp.astype(operand.backend.asarray_like(counts, operand.kernel), operand.real_dtype, copy=False)


def _excess_svd(backend: Backend, matrices: Array, limit: Array, lower: Array | None = None) -> tuple[Array, Array]:
    """Return the excesses and traces from all singular values.

    With `lower`, singular values below it have a negative excess, which raises them to `lower`.
    """
    xp = backend.namespace(matrices)
    u, s, vh = backend.svd(matrices)
    excess = xp.maximum(s - limit, xp.zeros_like(s))
    if lower is not None:
        excess = excess - xp.maximum(lower - s, xp.zeros_like(s))
    return xp.matmul(u * xp.astype(excess, matrices.dtype)[..., None, :], vh), xp.sum(excess, axis=(-2, -1))


def excess_by_eigenvectors(backend: Backend, matrices: Array, limit: Array) -> tuple[Array, Array]:
    """Return the excesses and traces from eigenvectors of the smaller Gram matrix W W* or W* W.

    The excess is ``(I - c (W W*)^(-1/2)) W`` on the eigenvectors above the limit c. The error is about ``eps *
    norm**2 / limit``.
    """
    if min(matrices.shape[-2:]) == 1:
        return _excess_of_vectors(backend, matrices, limit)
    return _excess_of_pairs(backend, matrices, limit, *backend.eigh(smaller_gram(backend, matrices)))


def _excess_leading(backend: Backend, matrices: Array, limit: Array) -> tuple[Array, Array]:
    """Return the excesses and traces from leading eigenvectors, and from all eigenvectors where `sure` is False."""
    squares, vectors, sure = leading_pairs(backend, matrices, limit)
    found, traces = _excess_of_pairs(backend, matrices, limit, squares, vectors)
    left = np.flatnonzero(~sure)
    if len(left):
        xp = backend.namespace(matrices)
        others = excess_by_eigenvectors(backend, backend.take(matrices, left, 0), limit)
        places = np.arange(len(sure))
        places[left] = len(sure) + np.arange(len(left))
        found, traces = (
            backend.take(xp.concat(two, axis=0), places, 0) for two in zip((found, traces), others, strict=True)
        )
    return found, traces


def _excess_of_vectors(backend: Backend, matrices: Array, limit: Array) -> tuple[Array, Array]:
    """Return the excesses and traces of matrices with a single row or column."""
    xp = backend.namespace(matrices)
    norms = safe_sqrt(xp, squared_norm(xp, matrices, axis=(-2, -1)))
    excess = xp.maximum(norms - limit, xp.zeros_like(norms))
    share = excess / divisors(xp, norms)
    return matrices * xp.astype(share, matrices.dtype)[..., None, None], xp.sum(excess, axis=-1)


def _excess_of_pairs(
    backend: Backend, matrices: Array, limit: Array, values: Array, vectors: Array
) -> tuple[Array, Array]:
    """Return the excesses and traces from eigenvalues, ascending, and eigenvectors of the smaller Gram matrices."""
    xp = backend.namespace(matrices)
    norms = safe_sqrt(xp, values)
    excess = xp.maximum(norms - limit, xp.zeros_like(norms))
    leading = xp.max(xp.sum(xp.astype(excess > 0, xp.int32), axis=-1)) if excess.shape[0] else None
    # In eager mode the pairs that exceed the limit can be selected. They are the last ones.
    if leading is not None and backend.truth(leading > 0) is not None:
        first = values.shape[-1] - int(leading)
        vectors, kept, norms = vectors[..., first:], excess[..., first:], norms[..., first:]
    else:
        kept = excess
    share = xp.astype(kept / divisors(xp, norms), matrices.dtype)[..., None, :]
    adjoint = backend.adjoint(vectors)
    if matrices.shape[-2] <= matrices.shape[-1]:
        found = xp.matmul(vectors * share, xp.matmul(adjoint, matrices))
    else:
        found = xp.matmul(xp.matmul(matrices, vectors * share), adjoint)
    return found, xp.sum(excess, axis=(-2, -1))


def excess_by_products(backend: Backend, matrices: Array, limit: Array) -> tuple[Array, Array]:
    """Return the excesses and traces by matrix products alone.

    With the polar decomposition ``W = Q H`` the excess is ``(W - c Q + Q |H - c I|) / 2``. The matrix ``|H - c I|``
    is ``H - c I`` times its matrix sign, which is its own polar factor. Where a polar iteration has not converged,
    the singular values that remain are small. So the error is at most about 1e-5 of the Frobenius norm.
    """
    xp = backend.namespace(matrices)
    wide = matrices.shape[-2] <= matrices.shape[-1]
    work = matrices if wide else backend.adjoint(matrices)
    polar = polar_by_products(backend, work)
    hermitian = xp.matmul(work, backend.adjoint(polar))
    identity = xp.astype(backend.asarray_like(np.eye(work.shape[-2]), work), work.dtype, copy=False)
    shifted = (hermitian + backend.adjoint(hermitian)) / 2 - limit * identity
    absolute = xp.matmul(shifted, polar_by_products(backend, shifted))
    halves = (shifted + absolute) / 2
    found = xp.matmul(halves, polar)
    trace = xp.sum(xp.real(xp.linalg.trace(halves)), axis=-1)
    return (found if wide else backend.adjoint(found)), trace
