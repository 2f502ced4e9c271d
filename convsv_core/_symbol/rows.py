"""Gram matrices at rows of a host table: their largest eigenvalues, and tests against a level.

Every search for a largest norm asks these two questions. A test by Cholesky's factorisation costs a fifth of the
eigenvalues or less, so a search computes few eigenvalues and tests the other matrices against them. Each search decides
for itself which rows to ask about.

There are two kinds of rows. `PolynomialRows` makes a Gram matrix from its own coefficients, with one rounding error
bound for all frequencies. `ProductRows` makes it as a product of the symbol's matrix with its adjoint, with a rounding
error bound for each matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.gram import GramPolynomial, factor_rows, smaller_gram, useful_polynomial
from convsv_core._symbol.moments import frequency_factors
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import (
    Tabulated,
    TrigonometricPolynomial,
    fft_is_cheaper,
    symbol_evaluator,
    symbol_polynomial,
)
from convsv_core._symbol.small_matrices import largest_eigenvalues, remainders_of, squared_norm
from convsv_core._symbol.transform import is_long, symbol_error
from convsv_core.backend import Array, split_rows

__all__ = [
    "MARGIN_EPS",
    "TABLE_BYTES",
    "Eigenvalues",
    "GramRows",
    "PolynomialRows",
    "PowerRows",
    "ProductRows",
    "grid_rows",
    "map_rows",
    "product_rounding",
]

MARGIN_EPS = 4
"""Rounding error bound of a product of a matrix and its adjoint, and of the factorisation of the product.

The unit is eps times the side times the trace. The value is twice the bound of Higham, *Accuracy and Stability of
Numerical Algorithms*, 2002, theorem 10.3 and section 3.5.
"""

TABLE_BYTES = 1 << 32
"""Working memory, in bytes, of the rows whose host table is made at one time, which limits the size of the table.

A table takes at most a fiftieth of the working memory of its rows. A guess.
"""

TESTED_BYTES = 1 << 22
"""Budget, in bytes of working memory, for the matrices that are computed and tested at one time.

Found by measurement, one core with 1 MiB of L2 cache, complex64, 61 matrices: with 4 MiB they take 0.53 ms at side 64
and 6.7 ms at side 128, with 8 MiB 2.0 and 15 ms. The operating system takes freed large blocks back, and it is slow to
give them out again. Smaller budgets cost more calls: 0.74 ms with 0.5 MiB at side 64.
"""

SQUARINGS = 3
"""Number of times that `PowerRows` squares a Gram matrix. It was chosen by measurement among 2, 3 and 4.

The eighth power of an eigenvalue 6 % below the level is 0.6. So norms 3 % below the limit pass the test if a matrix
has few eigenvalues that large.
"""


class Eigenvalues(NamedTuple):
    """Hold the largest eigenvalue among the groups of each row.

    Attributes
    ----------
    values : float array, shape (rows,)
        The eigenvalues as computed.
    uppers : float array, shape (rows,)
        Upper bounds of the exact eigenvalues.
    """

    values: HostArray
    uppers: HostArray


class GramRows(ABC):
    """Compute the Gram matrices of an operand's symbol at many rows, in blocks of a memory budget.

    A row is named by its place in a table or by its angles, which depends on the subclass.
    """

    @property
    @abstractmethod
    def operand(self) -> Operand:
        """Return the operand whose symbol is used."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Return the bytes of working memory that one row needs."""

    @property
    def budget(self) -> int:
        """Return the bytes of working memory for the rows computed at one time."""
        return TESTED_BYTES

    def above(self, where: HostArray, level: float) -> HostArray:
        """Tell which rows have a group with an eigenvalue that is not shown to be at most a level.

        Parameters
        ----------
        where : array, shape (rows,) or (rows, ndim)
            The rows, by place or by angles.
        level : float
            The square of a norm.

        Returns
        -------
        bool array, shape (rows,)
        """
        if not len(where):
            return np.zeros(0, bool)
        backend, xp = self.operand.backend, self.operand.xp
        level = self.lowered(level)

        def are_below(block: Array) -> Array:
            return xp.all(self._are_below(block, level), axis=-1)

        def table_of(part: HostArray) -> HostArray:
            return self.table_at(part, level)

        with backend.products_context(min(self.operand.plan.block)):
            return ~self._map(are_below, table_of, where)

    def largest(self, where: HostArray) -> Eigenvalues:
        """Return the largest eigenvalue among the groups of each row, with upper bounds."""
        backend, xp = self.operand.backend, self.operand.xp

        def of_block(block: Array) -> Array:
            grams = self.matrices(block)
            values = largest_eigenvalues(backend, grams)
            return xp.stack([xp.max(values, axis=-1), xp.max(values + self.roundings(grams), axis=-1)], axis=-1)

        values, uppers = self._map(of_block, self.table, where).astype(float).T
        return Eigenvalues(values, uppers)

    def lowered(self, level: float) -> float:
        """Return a level that is no higher in the dtype of the computation than the given one."""
        return float(level) * (1 - 4 * self.operand.eps)

    @abstractmethod
    def matrices(self, block: Array) -> Array:
        """Return the Gram matrices at a block of the table: shape (rows, groups, side, side)."""

    @abstractmethod
    def remainders(self, block: Array, level: float) -> Array:
        """Return the level, less rounding errors, times the identity less each Gram matrix at a block of `table_at`.

        A positive definite one shows that the eigenvalues are below the level.
        """

    @abstractmethod
    def part(self, groups: slice) -> GramRows:
        """Return the rows of some of the groups."""

    @abstractmethod
    def table(self, where: HostArray) -> HostArray:
        """Return the host table that blocks are cut from."""

    def table_at(self, where: HostArray, level: float) -> HostArray:
        """Return the host table for a test against a level."""
        return self.table(where)

    @abstractmethod
    def roundings(self, grams: Array) -> Any:
        """Return bounds of the rounding errors of the matrices' eigenvalues: a number, or shape (rows, groups)."""

    def _are_below(self, block: Array, level: float) -> Array:
        """Tell for each row and group of a block whether its eigenvalues are shown to be below the level."""
        return self.operand.backend.is_positive_definite(self.remainders(block, level))

    def _map(
        self, function: Callable[[Array], Array], table_of: Callable[[HostArray], HostArray], where: HostArray
    ) -> HostArray:
        """Return on the host the results of a function of blocks at all rows, with host tables of limited size."""
        parts = split_rows(where, max(1, TABLE_BYTES // self.row_bytes))
        found = [
            map_rows(self.operand, function, table_of(part), row_bytes=self.row_bytes, budget=self.budget)
            for part in parts
        ]
        return np.concatenate(found) if len(found) > 1 else found[0]


@dataclass(frozen=True)
class PolynomialRows(GramRows):
    """Compute Gram matrices from their own coefficients.

    A row is a place on the grid or, with `by_angle`, a row of angles in radians: shape (rows, ndim). The angles
    belong to the reduced offsets: they are `Axis.step` times the angles of the grid.
    """

    gram: GramPolynomial
    by_angle: bool = False
    budget: int = TESTED_BYTES
    group_roundings: HostArray | None = None
    """The polynomial's rounding error bound for each group, where it is known."""

    @property
    def operand(self) -> Operand:
        """Return the operand whose symbol is used."""
        return self.gram.operand

    @property
    def row_bytes(self) -> int:
        """Return the bytes of working memory that one row needs."""
        return self.gram.row_bytes

    @functools.cached_property
    def rounding(self) -> float:
        """Return a rounding error bound of the eigenvalues, at all frequencies and for all groups."""
        known = self.group_roundings
        return float((self.gram.roundings() if known is None else known).max())

    def part(self, groups: slice) -> PolynomialRows:
        """Return the rows of some of the groups."""
        known = self.group_roundings
        return dataclasses.replace(
            self, gram=self.gram.part(groups), group_roundings=None if known is None else known[groups]
        )

    def with_roundings(self) -> PolynomialRows:
        """Return the same rows, whose parts need not compute their rounding error bounds."""
        return dataclasses.replace(self, group_roundings=self.gram.roundings())

    def matrices(self, block: Array) -> Array:
        """Return the Gram matrices for rows of factors whose level is 0."""
        return self.gram.matrices(-block)

    def remainders(self, block: Array, level: float) -> Array:
        """Return the level times the identity less each Gram matrix; the rows of factors hold the level."""
        return self.gram.matrices(block)

    def table(self, where: HostArray) -> HostArray:
        """Return rows of factors whose level is 0."""
        dtype = self.operand.computed_in
        if self.by_angle:
            return factor_rows(where @ self.gram.differences.T).astype(dtype)
        return frequency_factors(self.operand.plan, where, dtype)

    def table_at(self, where: HostArray, level: float) -> HostArray:
        """Return rows of factors with a level, less the rounding errors of the Gram matrices."""
        table = self.table(where)
        table[:, 0] = level - self.rounding
        return table

    def roundings(self, grams: Array) -> Any:
        """Return the rounding error bound of all eigenvalues."""
        return self.rounding


@dataclass(frozen=True)
class ProductRows(GramRows):
    """Compute the products of the symbol's matrices with their adjoints, at places in a table of frequencies.

    Attributes
    ----------
    symbol : TrigonometricPolynomial or Tabulated
        The symbol, without `dual`.
    frequencies : array, shape (count, ndim)
        Indices of the frequencies, on the device of the kernel.
    dual : array, shape (count, groups, rows, columns), complex, or None
        Matrices that are added to the symbol's matrices.
    budget : int
        Bytes of working memory for the rows computed at one time.
    error : float
        Bound of the symbol's own error, as a norm of matrices, where a transform made the symbol.
    """

    symbol: TrigonometricPolynomial | Tabulated
    frequencies: Array
    dual: Array | None = None
    budget: int = TESTED_BYTES
    error: float = 0.0

    @property
    def operand(self) -> Operand:
        """Return the operand whose symbol is used."""
        return self.symbol.operand

    @property
    def row_bytes(self) -> int:
        """Return the bytes of working memory that one row needs."""
        return 2 * self.symbol.row_bytes

    def matrices(self, block: Array) -> Array:
        """Return the Gram matrices at a block of places."""
        xp = self.operand.xp
        symbols = self.symbol(xp.take(self.frequencies, block, axis=0))
        if self.dual is not None:
            symbols = symbols + xp.take(self.dual, block, axis=0)
        return smaller_gram(self.operand.backend, symbols)

    def remainders(self, block: Array, level: float) -> Array:
        """Return the level, less rounding errors, times the identity less each Gram matrix."""
        grams = self.matrices(block)
        return remainders_of(self.operand.backend, grams, level - self.roundings(grams))

    def part(self, groups: slice) -> ProductRows:
        """Return the rows of some of the groups."""
        dual = None if self.dual is None else self.dual[:, groups, ...]
        return dataclasses.replace(self, symbol=self.symbol.part(groups), dual=dual)

    def table(self, where: HostArray) -> HostArray:
        """Return the places."""
        return where

    def roundings(self, grams: Array) -> Any:
        """Return a bound of the rounding errors for each matrix."""
        trace = self.operand.xp.real(self.operand.xp.linalg.trace(grams))
        return product_rounding(self.operand, trace, self.error or None)


class PowerRows(ProductRows):
    """Test product rows by matrix products alone, which suits accelerators.

    For a power p of a Gram matrix, the squared Frobenius norm is the sum of the eigenvalues to the power 2 p. This
    sum is at least the largest eigenvalue to the power 2 p.
    """

    def _are_below(self, block: Array, level: float) -> Array:
        xp, grams = self.operand.xp, self.matrices(block)
        if level <= 0:
            return xp.zeros_like(xp.real(grams[:, :, 0, 0]), dtype=xp.bool)
        powers = grams / level
        for _ in range(SQUARINGS if grams.shape[-1] > 1 else 0):
            powers = xp.matmul(powers, powers)
        margin = 2 ** (SQUARINGS + 1) * product_rounding(self.operand, 1.0)
        return squared_norm(xp, powers, axis=(-2, -1)) <= 1 - margin


def grid_rows(operand: Operand, *, budget: int = TESTED_BYTES) -> PolynomialRows | ProductRows:
    """Return the cheapest rows for the visited frequencies of the operand's own plan; a row is named by its place."""
    frequencies = operand.backend.asarray_like(operand.plan.frequencies, operand.kernel)
    if is_long(operand) and min(operand.plan.block) == 1 and fft_is_cheaper(operand):
        error = operand.backend.to_numpy(symbol_error(operand, math.prod(operand.plan.periods)))
        return ProductRows(symbol_evaluator(operand), frequencies, budget=budget, error=float(error.max()))
    gram = useful_polynomial(operand)
    if gram is not None:
        return PolynomialRows(gram, budget=budget)
    return ProductRows(symbol_polynomial(operand), frequencies, budget=budget)


def map_rows(
    operand: Operand, function: Callable[[Array], Array], table: HostArray, *, row_bytes: int, budget: int
) -> HostArray:
    """Return on the host the results of a function for the rows of a host table.

    A library that compiles gets batches of few different sizes: the last row is repeated to fill a batch.
    """
    backend = operand.backend
    filled = table[np.minimum(np.arange(backend.batch_size(len(table))), len(table) - 1)]
    found = backend.map_blocks(function, filled, operand.kernel, row_bytes=row_bytes, budget=budget)
    return backend.to_numpy(found)[: len(table)]


def product_rounding(operand: Operand, trace: Any, error: Any = None) -> Any:
    """Return a bound of the rounding errors of the eigenvalues of a matrix times its adjoint.

    `trace` is the trace of the product. `error` bounds the error of the matrix itself, where a transform made it; its
    norm is at most the root of the trace.
    """
    rounding = MARGIN_EPS * min(operand.plan.block) * operand.eps * trace
    return rounding if error is None else rounding + error * (2 * trace**0.5 + error)
