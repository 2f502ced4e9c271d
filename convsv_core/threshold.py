"""Tests whether norms of the symbol are within a limit, by factorisations that cost less than the norms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np

from convsv_core.backend import Array, Backend
from convsv_core.conv import Conv
from convsv_core.decomposition import squared_norm
from convsv_core.evaluation import BLOCK_BYTES, Evaluator, symbol_polynomial
from convsv_core.gram import GramPolynomial, gram_evaluator, smaller_gram
from convsv_core.operand import Operand
from convsv_core.plan import HostArray
from convsv_core.plugins import backend_of

Method: TypeAlias = Literal["svd", "gram", "products"]

MARGIN_EPS = 4
"""Rounding error of a test, in units of eps times the side times the eigenvalues' sum: twice Higham's bound."""

SQUARINGS = 3
"""Of a Gram matrix: the test lets no norm pass that is above the bound, and few that are 3 % below it."""


class Threshold:
    """Tests whether the norms at some frequencies are within a limit, without computing them.

    By Cholesky's factorisation of ``limit**2 I - G``, less what rounding may have taken from it, unless the method is
    to do with products alone.

    Parameters
    ----------
    operand : Operand
    frequencies : array, shape (count, ndim)
        Indices.
    dual : array, shape (count, groups, rows, columns), complex, optional
        To be added to the symbol.
    method : "svd", "gram" or "products"
        How the excess over the limit will be computed.
    gram : GramPolynomial, optional
        The Gram matrices on this grid, if they are known.
    """

    def __init__(
        self,
        operand: Operand,
        frequencies: Array,
        dual: Array | None = None,
        method: Method = "gram",
        gram: GramPolynomial | None = None,
    ) -> None:
        self.operand, self.frequencies, self.dual = operand, frequencies, dual
        self._below = _below_by_powers if method == "products" else grams_below
        self._symbol = symbol_polynomial(operand)
        self._gram: Evaluator | None = gram
        if gram is None and dual is None:
            self._gram = gram_evaluator(operand, self._symbol)
        self._polynomial = self._gram if isinstance(self._gram, GramPolynomial) and method != "products" else None

    def rows_above(self, limit: float | Array, rows: HostArray | None = None) -> HostArray | None:
        """Those of the rows whose norms are not shown to be within the limit; None where tracing leaves them open."""
        rows = np.arange(self.frequencies.shape[0]) if rows is None else rows
        above = self.above(limit, rows)
        return None if above is None else rows[above.any(axis=1)]

    def above(self, limit: float | Array, rows: HostArray) -> HostArray | None:
        """Whether the norm of each group, at each of the rows, is not shown to be within the limit."""
        operand, xp = self.operand, self.operand.xp
        level = xp.astype(limit, operand.real_dtype) if hasattr(limit, "dtype") else xp.full_like(operand.scale, limit)
        if operand.backend.truth(xp.isfinite(xp.max(xp.abs(operand.kernel)) + level)) is None:
            return None
        if not len(rows):
            return np.zeros((0, operand.plan.groups), bool)
        with operand.backend.multiplying(min(operand.plan.block)):
            return ~self._map(lambda chosen: self._are_below(level, chosen), rows)

    def largest(self, rows: HostArray) -> tuple[float, float]:
        """An upper bound of the norms at some of the rows, and by how much its square counts rounding in."""
        xp, backend, direct = self.operand.xp, self.operand.backend, self._polynomial is None

        def of_block(chosen: Array) -> Array:
            grams = self._grams(chosen)
            alone = grams.shape[-1] == 1
            values = xp.real(grams[..., 0, 0]) if alone else backend.eigvalsh(grams)[..., -1]
            # That of matrices from coefficients of their own is one number, that of products goes with each.
            traces = xp.real(xp.linalg.trace(grams))
            rounding = product_rounding(self.operand, traces) if direct else 0 * traces + self.polynomial_rounding
            return xp.stack([xp.max(values + rounding, axis=-1), xp.max(values, axis=-1)], axis=-1)

        upper, value = np.maximum(self._map(of_block, rows).astype(float).max(axis=0), 0.0).tolist()
        return math.sqrt(upper), upper - value

    @property
    def polynomial_rounding(self) -> float:
        """Rounding error of Gram matrices that are made from coefficients of their own; 0 for products."""
        return 0.0 if self._polynomial is None else float(self._polynomial.rounding())

    def _map(self, function: Callable[[Array], Array], rows: HostArray) -> HostArray:
        backend = self.operand.backend
        row_bytes = 2 * self._symbol.row_bytes if self._gram is None else self._gram.row_bytes
        filled = rows[np.minimum(np.arange(backend.batch_size(len(rows))), len(rows) - 1)]
        found = backend.map_blocks(function, filled, self.operand.kernel, row_bytes=row_bytes, budget=BLOCK_BYTES)
        return backend.to_numpy(found)[: len(rows)]

    def _are_below(self, limit: Array, chosen: Array) -> Array:
        if self._polynomial is not None:
            where = self.operand.xp.take(self.frequencies, chosen, axis=0)
            level = limit**2 - self._polynomial.rounding()
            return self.operand.backend.is_positive_definite(self._polynomial.below(level, where))
        return self._below(self.operand, self._grams(chosen), limit)

    def _grams(self, chosen: Array) -> Array:
        xp = self.operand.xp
        where = xp.take(self.frequencies, chosen, axis=0)
        if self._gram is not None:
            return self._gram(where)
        return smaller_gram(self.operand.backend, self._symbol(where) + xp.take(self.dual, chosen, axis=0))


def product_rounding(operand: Operand, trace: Any) -> Any:
    """Rounding error of the eigenvalues of a matrix times its adjoint, of the given trace."""
    return MARGIN_EPS * min(operand.plan.block) * operand.eps * trace


def grams_below(operand: Operand, grams: Array, limit: float | Array) -> Array:
    """Whether the eigenvalues of products, of a matrix and its adjoint, are at most `limit` squared."""
    level = limit**2 - product_rounding(operand, operand.xp.real(operand.xp.linalg.trace(grams)))
    return are_below(operand.backend, grams, level)


def are_below(backend: Backend, matrices: Array, levels: Array) -> Array:
    """Whether the eigenvalues of Hermitian matrices are below a level each, but for rounding."""
    xp = backend.namespace(matrices)
    identity = xp.astype(backend.constant(np.eye(matrices.shape[-1]), matrices), matrices.dtype, copy=False)
    return backend.is_positive_definite(xp.astype(levels, matrices.dtype)[..., None, None] * identity - matrices)


def _below_by_powers(operand: Operand, grams: Array, limit: Array) -> Array:
    """The sum of a power of the eigenvalues is at least that power of the largest."""
    xp, side = operand.xp, grams.shape[-1]
    powers = grams / xp.where(limit > 0, limit, xp.ones_like(limit)) ** 2
    for _ in range(SQUARINGS if side > 1 else 0):
        powers = xp.matmul(powers, powers)
    margin = 2 ** (SQUARINGS + 1) * product_rounding(operand, 1.0)
    return (squared_norm(xp, powers, axis=(-2, -1)) <= 1 - margin) & (limit > 0)


def sum_of_norms(operand: Operand) -> float:
    """The largest sum, among the groups, of the taps' Frobenius norms: an upper bound of the operator norm."""
    xp = operand.xp
    return float(xp.max(xp.sum(xp.sqrt(squared_norm(xp, operand.taps(), axis=(-2, -1))), axis=0)))


def frobenius_bound(kernel: Array, conv: Conv) -> float:
    """An upper bound of the operator norm for every input size, from the products of the taps alone.

    The squared Frobenius norm of the symbol is a trigonometric polynomial, whose coefficient at an offset is the sum of
    the inner products of the taps that lie so far apart; it is at most the sum of these coefficients' moduli. With a
    stride the taps of different classes do not meet, which all pairs of one offset have in common.

    Parameters
    ----------
    kernel : array
        With the axes that ``conv.layout`` names.
    conv : Conv
        Of which the layout alone enters, and no padding but zero, "valid" and circular padding that repeats no pixel is
        meant.

    Returns
    -------
    float
        But for the rounding of the products.
    """
    backend = backend_of(kernel)
    xp = backend.namespace(kernel)
    order = [conv.layout.index(letter) for letter in ("O", "I", *conv.spatial)]
    taps = tuple(kernel.shape[axis] for axis in order[2:])
    flat = xp.reshape(xp.permute_dims(kernel, tuple(order)), (-1, math.prod(taps)))
    products = backend.to_numpy(xp.matmul(backend.adjoint(flat), flat)).reshape(-1)
    lags = _lags(taps)
    sums = np.bincount(lags, products.real) + 1j * np.bincount(lags, products.imag)
    return float(np.sqrt(np.abs(sums).sum()))


@functools.lru_cache(maxsize=64)
def _lags(taps: tuple[int, ...]) -> HostArray:
    """For each pair of taps, in row-major order, a number of the offset between them."""
    places = np.indices(taps).reshape(len(taps), -1)
    apart = places[:, :, None] - places[:, None, :] + np.asarray(taps)[:, None, None] - 1
    numbers = np.ravel_multi_index(tuple(apart), tuple(2 * k - 1 for k in taps))
    return np.asarray(numbers).reshape(-1)
