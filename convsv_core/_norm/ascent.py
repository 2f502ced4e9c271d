"""Local maximisation of the symbol's norm over the frequencies, which needs only products with the taps."""

from __future__ import annotations

import itertools

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.small_matrices import divisors
from convsv_core.backend import Array

__all__ = ["ascend"]

SCHEDULE = ((8, 4), (2, 8), (1, 12))
"""Pairs of a number of starts and a number of steps: the best starts are kept and take that many steps.

A step moves the frequency once and applies the power method once. A guess: no comparison with other values was
recorded.
"""

LARGEST_STEP = 0.5
"""Longest step along an axis, in units of the reciprocal of the exponential type there. A guess."""


def ascend(operand: Operand, starts: HostArray, types: HostArray) -> HostArray:
    """Return the angles with the largest norm among the local maxima that are reached from `starts`.

    With u fixed, ``|A(theta)* u|^2`` is a trigonometric polynomial with known derivatives. Each step moves theta
    towards a maximum of this polynomial, and then applies the power method with ``A A*`` to u.

    The computation runs in single precision and bounds nothing. The caller must compute the norm at the result.

    Parameters
    ----------
    operand : Operand
    starts : float array, shape (starts, ndim)
        Angles in radians, for the plan's offsets.
    types : float array, shape (ndim,)
        Exponential type along each axis.

    Returns
    -------
    float array, shape (ndim,)
        Angles in radians.
    """
    xp, backend, plan = operand.xp, operand.backend, operand.plan
    offsets = np.asarray(list(itertools.product(*plan.offsets)), float)
    taps = xp.astype(operand.taps(), xp.complex64)
    count, groups, rows, columns = taps.shape
    taps = xp.reshape(xp.permute_dims(taps, (1, 2, 0, 3)), (groups, rows, count * columns))
    adjoint = backend.adjoint(taps)

    ndim = len(types)
    first, second = np.triu_indices(ndim)
    # The rows hold factors of the phases, for the polynomial, its first derivatives and its second derivatives.
    orders = np.concatenate([np.ones((1, count)), -1j * offsets.T, -(offsets[:, first] * offsets[:, second]).T])

    def step(left: Array, angles: HostArray) -> tuple[Array, HostArray, Array]:
        """Return new vectors, new angles and the norms there.

        The shapes are (groups, rows, starts), (groups, starts, ndim) and (groups, starts).
        """
        starts = angles.shape[1]
        parts = xp.reshape(xp.matmul(adjoint, left), (groups, count, columns, starts))
        parts = xp.permute_dims(parts, (0, 3, 1, 2))
        derivatives = xp.matmul(single(np.exp(-1j * angles @ offsets.T)[:, :, None, :] * orders), parts)
        products = 2 * backend.to_numpy(xp.real(xp.matmul(derivatives, backend.adjoint(derivatives)))).astype(float)
        gradient = products[..., 1 : 1 + ndim, 0]
        hessian = products[..., 1 : 1 + ndim, 1 : 1 + ndim]
        hessian[..., first, second] += products[..., 1 + ndim :, 0]
        hessian[..., second, first] = hessian[..., first, second]
        angles = angles + _uphill(gradient, hessian, LARGEST_STEP / np.maximum(types, 0.5))
        phases = single(np.exp(-1j * angles @ offsets.T)[:, :, None, :])
        right = unit(xp.matmul(phases, parts), -1)
        right = xp.matrix_transpose(backend.conj(phases)) * right
        right = xp.reshape(xp.permute_dims(right, (0, 2, 3, 1)), (groups, count * columns, starts))
        left = xp.matmul(taps, right)
        return unit(left, -2), angles, xp.linalg.vector_norm(left, axis=-2)

    def single(table: HostArray) -> Array:
        return xp.astype(backend.asarray_like(table, taps), xp.complex64)

    def unit(vectors: Array, axis: int) -> Array:
        sizes = xp.linalg.vector_norm(vectors, axis=axis, keepdims=True)
        return vectors / divisors(xp, sizes)

    rng = np.random.default_rng(0)
    shape = (groups, rows, len(starts))
    left = single(rng.standard_normal(shape) + 1j * rng.standard_normal(shape))
    angles = np.broadcast_to(starts, (groups, *starts.shape))
    norms = np.zeros(angles.shape[:2])
    for kept, rounds in SCHEDULE:
        if kept < angles.shape[1]:
            best = np.argsort(-norms, axis=1)[:, :kept]
            angles = np.take_along_axis(angles, best[:, :, None], axis=1)
            left = xp.take_along_axis(
                left, backend.asarray_like(np.repeat(best[:, None, :], rows, axis=1), left), axis=2
            )
        for _ in range(rounds):
            left, angles, found = step(left, angles)
        norms = backend.to_numpy(found)
    return np.asarray(angles.reshape(-1, ndim)[np.argmax(norms)])


def _uphill(gradient: HostArray, hessian: HostArray, largest: HostArray) -> HostArray:
    """Return a step of Newton's method, at most `largest` along each axis.

    Curvatures are taken by their absolute values, so that every step goes uphill.
    """
    curvatures, axes = np.linalg.eigh(hessian)
    along = (gradient[..., None, :] @ axes)[..., 0, :]
    # The floor keeps the quotient finite where the function is nearly flat. The step is cut to `largest` afterwards.
    floor = 1e-3 * np.maximum(np.max(np.abs(curvatures), axis=-1, keepdims=True), np.abs(along))
    along = along / np.maximum(np.maximum(np.abs(curvatures), floor), np.finfo(float).tiny)
    step = (axes @ along[..., None])[..., 0]
    return np.asarray(np.clip(step, -largest, largest))
