"""What of a convolution exceeds a bound of the norm, and which change of the taps comes nearest to it.

The excess of a matrix W over c is ``U max(S - c, 0) V*``, W less its nearest matrix of norm at most c. It is computed
frequency by frequency, for those matrices alone that are not shown to be within the bound by something cheaper
than a decomposition; the taps nearest to the operator that has these excesses are its part of an average over
the frequencies. One pass is a clip-and-cut step; repeated, passes make the projections.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from convsv_core.backend import Array, Backend
from convsv_core.decomposition import safe_sqrt, squared_norm
from convsv_core.evaluation import BLOCK_BYTES, symbol_polynomial
from convsv_core.gram import smaller_gram
from convsv_core.leading import LEADING_ENTRIES, LEADING_SIDE, WIDE_SIDE, expected_share, leading_pairs
from convsv_core.operand import Operand
from convsv_core.plan import HostArray
from convsv_core.threshold import Method, Threshold

FAST_STEPS, LAST_STEPS = 10, 4
"""Of the iteration for the polar factor: steps that raise small singular values, steps that end at 1."""

FAST, LAST = (3.4445, -4.775, 2.0315), (15 / 8, -10 / 8, 3 / 8)
"""Coefficients of odd polynomials of degree 5. The first, of slope 3.4, keeps [0, 1.2] within it and leaves what has
been raised in [0.68, 1.14]; the second is Newton and Schulz's of third order at 1."""


PROBED = 32
"""Of so many matrices, one tells whether the leading pairs will do; fewer are not worth the question."""

WORTHWHILE = 0.5
"""Share of the matrices for which these have to do: the others are decomposed after all."""


def excess_pass(
    operand: Operand,
    kernel: Array,
    limit: Array,
    frequencies: Array,
    weights: Array,
    dual: Array | None,
    method: Method,
    *,
    keep: bool = False,
    lower: Array | None = None,
    tested: Operand | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """One pass over some frequencies: the excess of ``symbol(kernel) + dual`` over `limit`.

    Parameters
    ----------
    operand : Operand
        Whose geometry holds; its own kernel does not enter.
    kernel : array
        Of the operand's kernel's shape and scale.
    limit : 0-d array
        At the same scale.
    frequencies, weights : arrays, shapes (count, ndim) and (count,)
        Indices of frequencies, and how many of the grid each stands for.
    dual : array, shape (count, groups, rows, columns), complex, optional
    method : "svd", "gram" or "products"
        How an excess is computed.
    keep : bool
        Whether to return the excesses.
    lower : 0-d array, optional
        With "svd": raise smaller singular values to it. The excess then holds what they lack, negative.

    tested : Operand, optional
        One that holds the same kernel, in another dtype, to look for the frequencies with an excess with.

    Returns
    -------
    change : array of the kernel's shape
        The taps nearest to the operator of these excesses.
    excess : array like `dual`, or None
    trace : array, shape (count,), or None
        Sum of the singular values of each frequency's excess.
    """
    xp, backend = operand.xp, operand.backend
    operand = dataclasses.replace(operand, kernel=kernel)
    symbol = symbol_polynomial(operand)
    count = frequencies.shape[0]
    above = None if lower is not None else Threshold(tested or operand, frequencies, dual, method).rows_above(limit)
    if above is not None and tested is not None and min(operand.plan.block) >= WIDE_SIDE:
        # The margin for rounding grows with the square of a matrix's side.
        above = Threshold(operand, frequencies, dual, method).rows_above(limit, above)
    rows = np.arange(count) if above is None else above
    if not len(rows):
        return xp.zeros_like(kernel), *(_no_excess(operand, symbol.coefficients, count) if keep else (None, None))

    def matrices_at(chosen: Array) -> tuple[Array, Array]:
        phases = symbol.phases(xp.take(frequencies, chosen, axis=0))
        matrices = symbol.matrices(phases)
        return phases, matrices if dual is None else matrices + xp.take(dual, chosen, axis=0)

    def of_block(chosen: Array) -> tuple[Array, ...]:
        phases, matrices = matrices_at(chosen)
        excess, trace = excess_of(backend, matrices, limit, lower)
        weighted = phases * xp.take(weights, chosen, axis=0)[:, None]
        flat = xp.reshape(excess, (excess.shape[0], -1))
        part = xp.reshape(xp.matmul(backend.adjoint(weighted), flat), (1, -1, *matrices.shape[1:]))
        return (part, excess, trace) if keep else (part,)

    few = method == "gram" and _few_exceed(operand, lambda places: matrices_at(places)[1], rows, limit)
    excess_of = _excess_leading if few else EXCESSES[method]
    row_bytes = (4 if keep else 3) * symbol.row_bytes
    with backend.multiplying(min(operand.plan.block)) if few else contextlib.nullcontext():
        found = backend.map_blocks(of_block, rows, kernel, row_bytes=row_bytes, budget=BLOCK_BYTES)
    change = to_kernel(operand, xp.sum(found[0], axis=0))
    if not keep:
        return change, None, None
    excess, trace = found[1:]
    if len(rows) < count:
        places = np.full(count, len(rows))
        places[rows] = np.arange(len(rows))
        excess, trace = operand.take_or_zero(excess, places, 0), operand.take_or_zero(trace, places, 0)
    return change, excess, trace


def _no_excess(operand: Operand, like: Array, count: int) -> tuple[Array, Array]:
    xp = operand.xp
    excess = xp.broadcast_to(xp.zeros_like(like[:1, ...]), (count, *like.shape[1:]))
    return xp.astype(excess, operand.complex_dtype, copy=False), xp.real(excess[:, 0, 0, 0])


def frequency_tables(operand: Operand, chosen: HostArray) -> tuple[Array, Array]:
    """The visited frequencies of the given places, and how many of the grid each stands for, beside the kernel."""
    backend, plan = operand.backend, operand.plan
    weights = backend.constant(plan.weights()[chosen], operand.kernel)
    frequencies = backend.constant(plan.frequencies[chosen], operand.kernel)
    return frequencies, operand.xp.astype(weights, operand.complex_dtype)


def to_kernel(operand: Operand, taps: Array) -> Array:
    """From sums over the frequencies of one period, one matrix an offset, to the nearest kernel's taps.

    Taps of a kernel larger than the input that wrap onto each other share what they have in common.
    """
    xp, plan = operand.xp, operand.plan
    kernel = operand.from_taps(xp.real(taps) if plan.real else taps) / math.prod(plan.periods)
    return kernel / sharing(operand) if np.any(plan.sharing > 1) else kernel


def sharing(operand: Operand) -> Array:
    """How many taps act where each does, 1 but for kernels larger than the input: broadcasts with the kernel."""
    xp, conv = operand.xp, operand.plan.conv
    order = [conv.spatial.index(letter) for letter in conv.layout if letter in conv.spatial]
    spatial = [n if letter in conv.spatial else 1 for letter, n in zip(conv.layout, operand.kernel.shape, strict=True)]
    counts = operand.plan.sharing.transpose(order).reshape(spatial).astype(float)
    return xp.astype(operand.backend.constant(counts, operand.kernel), operand.real_dtype, copy=False)


def taps_of(operand: Operand, frequencies: Array, weights: Array, matrices: Array) -> Array:
    """The kernel whose operator is nearest to one given by its matrices at some frequencies, zero at the others."""
    xp = operand.xp
    symbol = symbol_polynomial(operand)

    def of_block(chosen: Array) -> Array:
        phases = symbol.phases(xp.take(frequencies, chosen, axis=0)) * xp.take(weights, chosen, axis=0)[:, None]
        flat = xp.reshape(xp.take(matrices, chosen, axis=0), (chosen.shape[0], -1))
        return xp.reshape(xp.matmul(operand.backend.adjoint(phases), flat), (1, -1, *matrices.shape[1:]))

    count = matrices.shape[0]
    if not count:
        return xp.zeros_like(operand.kernel)
    parts = operand.backend.map_blocks(
        of_block, np.arange(count), operand.kernel, row_bytes=2 * symbol.row_bytes, budget=BLOCK_BYTES
    )
    return to_kernel(operand, xp.sum(parts, axis=0))


def _excess_svd(backend: Backend, matrices: Array, limit: Array, lower: Array | None) -> tuple[Array, Array]:
    xp = backend.namespace(matrices)
    u, s, vh = backend.svd(matrices)
    excess = xp.maximum(s - limit, xp.zeros_like(s))
    if lower is not None:
        excess = excess - xp.maximum(lower - s, xp.zeros_like(s))
    return xp.matmul(u * xp.astype(excess, matrices.dtype)[..., None, :], vh), xp.sum(excess, axis=(-2, -1))


def _excess_gram(backend: Backend, matrices: Array, limit: Array, _: Array | None) -> tuple[Array, Array]:
    """From the eigenvectors of the smaller side: ``(I - c (W W*)^(-1/2)) W`` on those above the bound.

    Its error is about ``eps * norm**2 / limit``.
    """
    if min(matrices.shape[-2:]) == 1:
        return _excess_of_vectors(backend, matrices, limit)
    return _excess_of_pairs(backend, matrices, limit, *backend.eigh(smaller_gram(backend, matrices)))


def _few_exceed(operand: Operand, matrices_at: Callable[[Array], Array], rows: HostArray, limit: Array) -> bool:
    """Whether to look for the leading vectors alone, in a pass whose answer is of 32 bits."""
    backend, side = operand.backend, min(operand.plan.block)
    if not operand.widened or side < LEADING_SIDE or len(rows) * side**2 < LEADING_ENTRIES:
        return False
    if not backend.truth(limit > 0):
        return False
    if len(rows) < PROBED:
        return True
    sample = backend.constant(rows[::PROBED], operand.kernel)
    return expected_share(backend, matrices_at(sample), limit) >= WORTHWHILE


def _excess_leading(backend: Backend, matrices: Array, limit: Array, _: Array | None) -> tuple[Array, Array]:
    """The same from the leading eigenvectors, and from all where these do not do."""
    squares, vectors, sure = leading_pairs(backend, matrices, limit)
    found, traces = _excess_of_pairs(backend, matrices, limit, squares, vectors)
    left = np.flatnonzero(~sure)
    if len(left):
        xp = backend.namespace(matrices)
        others = _excess_gram(backend, backend.take(matrices, left, 0), limit, None)
        places = np.arange(len(sure))
        places[left] = len(sure) + np.arange(len(left))
        found, traces = (
            backend.take(xp.concat(two, axis=0), places, 0) for two in zip((found, traces), others, strict=True)
        )
    return found, traces


def _excess_of_vectors(backend: Backend, matrices: Array, limit: Array) -> tuple[Array, Array]:
    """Of matrices with a single row or column."""
    xp = backend.namespace(matrices)
    norms = safe_sqrt(xp, squared_norm(xp, matrices, axis=(-2, -1)))
    excess = xp.maximum(norms - limit, xp.zeros_like(norms))
    share = excess / xp.where(norms > 0, norms, xp.ones_like(norms))
    return matrices * xp.astype(share, matrices.dtype)[..., None, None], xp.sum(excess, axis=-1)


def _excess_of_pairs(
    backend: Backend, matrices: Array, limit: Array, values: Array, vectors: Array
) -> tuple[Array, Array]:
    """From eigenvalues, ascending, and vectors of the smaller Gram matrices: of all that are above the bound."""
    xp = backend.namespace(matrices)
    norms = safe_sqrt(xp, values)
    excess = xp.maximum(norms - limit, xp.zeros_like(norms))
    leading = xp.max(xp.sum(xp.astype(excess > 0, xp.int32), axis=-1)) if excess.shape[0] else None
    if leading is not None and backend.truth(leading > 0) is not None:  # eager: the pairs that exceed are the last
        first = values.shape[-1] - int(leading)
        vectors, kept, norms = vectors[..., first:], excess[..., first:], norms[..., first:]
    else:
        kept = excess
    share = xp.astype(kept / xp.where(norms > 0, norms, xp.ones_like(norms)), matrices.dtype)[..., None, :]
    adjoint = backend.adjoint(vectors)
    if matrices.shape[-2] <= matrices.shape[-1]:
        found = xp.matmul(vectors * share, xp.matmul(adjoint, matrices))
    else:
        found = xp.matmul(xp.matmul(matrices, vectors * share), adjoint)
    return found, xp.sum(excess, axis=(-2, -1))


def _excess_products(backend: Backend, matrices: Array, limit: Array, _: Array | None) -> tuple[Array, Array]:
    """By matrix products alone: ``(W - c Q + Q |H - c I|) / 2`` with the polar decomposition ``W = Q H``.

    ``|H - c I|`` is ``H - c I`` times its matrix sign, its own polar factor. Where either iteration has not ended, the
    factor in front is as small: the error is at most about 1e-5 of the Frobenius norm.
    """
    xp = backend.namespace(matrices)
    wide = matrices.shape[-2] <= matrices.shape[-1]
    work = matrices if wide else backend.adjoint(matrices)
    polar = polar_products(backend, work)
    hermitian = xp.matmul(work, backend.adjoint(polar))
    identity = xp.astype(backend.constant(np.eye(work.shape[-2]), work), work.dtype, copy=False)
    shifted = (hermitian + backend.adjoint(hermitian)) / 2 - limit * identity
    absolute = xp.matmul(shifted, polar_products(backend, shifted))
    halves = (shifted + absolute) / 2
    found = xp.matmul(halves, polar)
    trace = xp.sum(xp.real(xp.linalg.trace(halves)), axis=-1)
    return (found if wide else backend.adjoint(found)), trace


def polar_products(backend: Backend, matrices: Array) -> Array:
    """The polar factor of wide matrices by Newton and Schulz's iteration, for matrix products alone."""
    xp = backend.namespace(matrices)
    norms = safe_sqrt(xp, squared_norm(xp, matrices, axis=(-2, -1)))[..., None, None]
    x = matrices / xp.astype(xp.where(norms > 0, norms, xp.ones_like(norms)), matrices.dtype)
    for a, b, c in FAST_STEPS * [FAST] + LAST_STEPS * [LAST]:
        gram = xp.matmul(x, backend.adjoint(x))
        x = a * x + xp.matmul(b * gram + c * xp.matmul(gram, gram), x)
    return x


EXCESSES: dict[Method, Callable[[Backend, Array, Array, Array | None], tuple[Array, Array]]] = {
    "svd": _excess_svd,
    "gram": _excess_gram,
    "products": _excess_products,
}
