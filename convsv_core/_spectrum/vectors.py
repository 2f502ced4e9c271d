"""Singular vectors of a circular convolution, at each frequency and as images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convsv_core._geometry.phases import unit_phases
from convsv_core._geometry.plan import Plan
from convsv_core._symbol.matrices import expand, with_column_phases
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, symbol_evaluator, symbol_polynomial
from convsv_core.backend import Array, Backend, BlockWork
from convsv_core.conv import Conv, as_int
from convsv_core.plugins import backend_of

__all__ = ["SVD", "svd"]


@dataclass(frozen=True, eq=False)
class SVD:
    r"""Hold the singular value decomposition of a circular convolution; it unpacks as ``U, S, Vh``.

    Attributes
    ----------
    U : array, shape (\*grid, groups, rows, values), complex
        Left singular vectors of the symbol at each frequency, as columns.
    S : array, shape (\*grid, groups, values), real
        Singular values, descending along the last axis.
    Vh : array, shape (\*grid, groups, values, columns), complex
        Conjugated right singular vectors, as rows: ``symbol = U @ diag(S) @ Vh``.
    plan : Plan
        The geometry, resolved to integers.
    """

    U: Array
    S: Array
    Vh: Array
    plan: Plan

    def __iter__(self) -> Iterator[Array]:
        return iter((self.U, self.S, self.Vh))

    def singular_vectors(self, index: int = 0) -> tuple[Array, Array, Array]:
        r"""Return one pair of singular vectors of the operator, as images.

        Parameters
        ----------
        index : int, default 0
            Place in the descending order of all singular values. A negative index counts from the end.

        Returns
        -------
        u : array, shape (output channels, \*output extents)
        s : 0-d array
        v : array, shape (input channels, \*input extents)
            The layer, without bias, maps v to s times u; its adjoint maps u to s times v. Both have norm 1, and
            are real for a real kernel. Pairs of different indices are orthogonal, even if their values repeat.

        Raises
        ------
        IndexError
            `index` is outside the number of singular values.

        Notes
        -----
        Not traceable, because an index is read on the host.
        """
        backend = backend_of(self.S)
        xp = backend.namespace(self.S)
        values = xp.reshape(self.S, (-1,))
        count = values.shape[0]
        index = as_int("index", index, least=None)
        if not -count <= index < count:
            raise IndexError(f"index={index}: there are {count} singular values, wanted {-count} to {count - 1}")
        order = xp.argsort(values, descending=True, stable=False)
        place = int(order[index % count])
        *where, group, value = np.unravel_index(place, self.S.shape)
        at = (*(int(i) for i in where), int(group))
        u = self.U[(*at, slice(None), int(value))]
        v = backend.conj(self.Vh[(*at, int(value), slice(None))])
        if self.plan.conv.transposed:
            images = (self._spread(backend, u, at, classes=True), self._spread(backend, v, at, classes=False))
        else:
            images = (self._spread(backend, u, at, classes=False), self._spread(backend, v, at, classes=True))
        return images[0], values[place], images[1]

    def _spread(self, backend: Backend, vector: Array, at: tuple[int, ...], *, classes: bool) -> Array:
        """Return `vector` times the plane wave of a frequency, as an image that is 0 in the other groups.

        `at` holds the index of the frequency and then the group. `classes` says whether the vector's entries are
        (class, channel), as on the input side of a stride.
        """
        xp, plan = backend.namespace(vector), self.plan
        *frequency, group = at
        grid, ndim = plan.grid, len(plan.grid)
        strides = plan.conv.strides if classes else (1,) * ndim
        channels = vector.shape[0] // math.prod(strides)
        wave = np.ones(())
        for j, n in zip(frequency, grid, strict=True):
            wave = np.multiply.outer(wave, unit_phases(j * np.arange(n), n))
        wave = wave / math.sqrt(math.prod(grid))
        image = xp.reshape(vector, (*strides, channels, *(1,) * ndim)) * xp.astype(
            backend.asarray_like(wave, vector), vector.dtype, copy=False
        )
        if plan.real:
            opposite = tuple(-j % n for j, n in zip(frequency, grid, strict=True))
            # The images of two opposite frequencies are conjugate. One gives the real part, the other the imaginary.
            if opposite == tuple(frequency):
                image = xp.real(image)
            else:
                image = math.sqrt(2) * (xp.real(image) if tuple(frequency) < opposite else xp.imag(image))
        interleaved = [axis for i in range(ndim) for axis in (ndim + 1 + i, i)]  # For each axis: grid, class.
        image = xp.permute_dims(image, (ndim, *interleaved))
        image = xp.reshape(image, (channels, *(n * s for n, s in zip(grid, strides, strict=True))))
        parts = [xp.zeros_like(image)] * plan.groups
        parts[group] = image
        return xp.concat(parts, axis=0)


def svd(kernel: Array, input_shape: tuple[int, ...], conv: Conv, *, max_bytes: int = BLOCK_BYTES) -> SVD:
    """Compute the singular value decomposition of a circular convolution at each frequency.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also says what is raised.
    max_bytes : int, default 256 MiB
        Limit, in bytes, of the matrices that are held at one time. The result itself comes on top: it holds
        the vectors of the whole grid.

    Returns
    -------
    SVD
        It unpacks as ``U, S, Vh`` at each frequency, with the shapes that `SVD` states. Its method
        `singular_vectors` returns any singular vector of the whole operator as an image.

    Notes
    -----
    The absolute error is about ``eps * sigma_max``. Traceable. Differentiable for functions that do not depend on
    the vectors' phases, where no singular values repeat and none is 0. Elsewhere the vectors have no derivative.
    Source: Sedghi, Gupta and Long, ICLR 2019.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = np.random.default_rng(0).normal(size=(2, 3, 3, 3))
    >>> decomposition = svd(kernel, (8, 8), Conv("OIHW"))
    >>> u, s, v = decomposition.singular_vectors(0)
    >>> u.shape, v.shape
    ((2, 8, 8), (3, 8, 8))
    """
    operand = make_operand(kernel, input_shape, conv, all_residues=True)
    u, s, vh = operand.run(_svd, as_int("max_bytes", max_bytes, least=1))
    return SVD(u, s, vh, operand.plan)


def _svd(operand: Operand, max_bytes: int) -> tuple[Array, Array, Array]:
    """Return U, S and Vh of an operand at each frequency of the grid."""
    xp, plan = operand.xp, operand.plan
    u, s, vh = _visited_svd(operand, max_bytes)
    u, s = expand(operand, u), expand(operand, s, conjugate=False)
    vh = with_column_phases(operand, expand(operand, vh))
    if plan.conv.transposed:
        u, vh = operand.backend.adjoint(vh), operand.backend.adjoint(u)
    u, s, vh = (xp.reshape(part, (*plan.grid, *part.shape[1:])) for part in (u, s, vh))
    return operand.answer(u, scaled=False), operand.answer(s), operand.answer(vh, scaled=False)


def _visited_svd(operand: Operand, max_bytes: int) -> tuple[Array, Array, Array]:
    """Return U, S and Vh at the visited frequencies; the vectors are real where the symbol is real."""
    plan = operand.plan
    alone = plan.self_conjugate if plan.real else 0
    parts = ((True, plan.frequencies[:alone]), (False, plan.frequencies[alone:]))
    results = [operand.map_blocks(_svd_of_block, rows, real, budget=max_bytes) for real, rows in parts if len(rows)]
    u, s, vh = operand.backend.concatenate(results)
    return u, s, vh


def _svd_of_block(operand: Operand, real: bool) -> BlockWork:
    """Return the work that decomposes the matrices at a block of frequencies.

    `real` says that the symbol is real, as for a real kernel at frequencies that are their own conjugates.
    """
    xp, backend = operand.xp, operand.backend
    # At most 2 ** ndim frequencies are their own conjugates. An FFT, which computes all frequencies, is too much.
    evaluate = symbol_polynomial(operand) if real else symbol_evaluator(operand)

    def decompose(frequencies: Array) -> tuple[Array, ...]:
        return backend.svd(evaluate(frequencies))

    def decompose_real(frequencies: Array) -> tuple[Array, ...]:
        u, s, vh = backend.svd(xp.real(evaluate(frequencies)))
        return xp.astype(u, operand.complex_dtype), s, xp.astype(vh, operand.complex_dtype)

    return BlockWork(decompose_real if real else decompose, 3 * evaluate.row_bytes)
