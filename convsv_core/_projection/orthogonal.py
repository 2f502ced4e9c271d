"""The convolution nearest to an orthogonal one, and kernels to begin training from."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from convsv_core._geometry.shapes import check_input_shape, resolve_channels
from convsv_core._projection.excess import Samples, nearest_taps
from convsv_core._projection.momentum import next_momentum
from convsv_core._spectrum.values import visited_values
from convsv_core._symbol.operand import Operand, dtype_name, make_operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, symbol_polynomial
from convsv_core.backend import Array
from convsv_core.conv import Conv, as_int, check_positive
from convsv_core.plugins import backend_of, get_backend, on_values

OUTER = 0.1
"""Scale of the taps off the centre in the kernel that an orthogonal one is made from."""

CHECK_EVERY = 10
"""Iterations from one look at the singular values to the next."""


class NearestOrthogonal(NamedTuple):
    """A kernel whose convolution is orthogonal, as nearly as its support allows.

    Attributes
    ----------
    kernel : array
    deviation : 0-d array
        The largest distance of a singular value from 1.
    iterations : int
    converged : bool
        Whether `deviation` is at most the tolerance. Where the support holds no orthogonal convolution near the
        given one, it is as small as the iteration made it.
    """

    kernel: Array
    deviation: Array
    iterations: int
    converged: bool


@on_values
def nearest_orthogonal(
    kernel: Array,
    input_shape: tuple[int, ...],
    conv: Conv,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
) -> NearestOrthogonal:
    """Bring a circular convolution as near as its support allows to an orthogonal one.

    Alternates between the polar factor at each frequency, which is the nearest orthogonal operator (semi-orthogonal
    where the layer does not have as many outputs as inputs), and the cut to the taps, with momentum.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also tells what is raised.
    tolerance : float, default 1e-3
        Largest distance of a singular value from 1 at which to stop.
    max_iterations : int, default 200

    Returns
    -------
    NearestOrthogonal
        With a kernel of the shape given. Arrays are float32 for kernels of 32 bits or fewer, else float64.

    Raises
    ------
    ValueError
        Also where `tolerance` is not positive.

    Notes
    -----
    A constant to differentiation. Not traceable: it stops when it has converged. A lazy kernel (Dask) is computed now,
    and handled as one task in the library of its chunks. Where a frequency's matrix is
    rank-deficient, its polar factor is not unique, and the SVD's is taken: the zero kernel gives the identity.

    Orthogonal convolutions of a given support are not connected: they differ in how often their phases turn round
    the grid. From a square kernel with no dominant tap, as a Gaussian one, the iteration often ends between two such
    families, far from both. `orthogonal_kernel` begins near one.

    Source: Sedghi, Gupta and Long, ICLR 2019, with all singular values clipped to 1 from both sides; Xiao et al.,
    ICML 2018, for orthogonal convolutions as initial values; Li et al., NeurIPS 2019, for their families.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = np.random.default_rng(0).normal(size=(8, 4, 3, 3))
    >>> kernel[:, :, 1, 1] *= 5
    >>> found = nearest_orthogonal(kernel, (8, 8), Conv("OIHW"))
    >>> found.converged, bool(found.deviation < 1e-3)
    (True, True)
    """
    check_positive("tolerance", tolerance)
    limit = as_int("max_iterations", max_iterations, least=1)
    operand = make_operand(backend_of(kernel).stop_gradient(kernel), input_shape, conv)
    # The polar factor does not depend on the scale, so the kernel's own need not be put back until the end.
    one = operand.xp.ones_like(operand.scale)
    operand = dataclasses.replace(operand, scale=one).widen()
    state = _State(operand.kernel, operand.kernel, one)
    iterations = 0
    while True:
        state = operand.run(_step, arrays=state)
        iterations += 1
        if iterations % CHECK_EVERY and iterations < limit:
            continue
        deviation = operand.run(_deviation, arrays=(state.kernel,))
        if float(deviation) <= tolerance or iterations >= limit:
            kernel = operand.answer(state.kernel)
            return NearestOrthogonal(kernel, operand.answer(deviation), iterations, bool(deviation <= tolerance))


def orthogonal_kernel(
    kernel_shape: tuple[int, ...],
    input_shape: tuple[int, ...],
    conv: Conv,
    *,
    seed: int = 0,
    gain: float = 1.0,
    backend: str = "numpy",
    dtype: str = "float32",
    device: Any = None,
) -> Array:
    """Draw a kernel whose convolution is orthogonal, to begin training with: every singular value is `gain`.

    Parameters
    ----------
    kernel_shape : tuple of int
        Extents of the axes that ``conv.layout`` names.
    input_shape, conv
        As for `singular_values`.
    seed : int, default 0
        The same seed gives the same kernel, to rounding, whichever the library.
    gain : float, default 1.0
    backend, dtype, device : str
        Where the array is to be: a name that `backends` lists, a real dtype, and a device of that library.

    Returns
    -------
    array, of `kernel_shape`

    Raises
    ------
    ValueError
        The shapes do not fit each other, or `backend` is not one that is available.

    Notes
    -----
    `nearest_orthogonal`, with its defaults, of a Gaussian kernel whose central taps are ten times the others (for a
    stride s, the s central ones along an axis). Source: as there; Saxe, McClelland and Ganguli, ICLR
    2014.

    Examples
    --------
    >>> kernel = orthogonal_kernel((8, 8, 3, 3), (8, 8), Conv("OIHW"), seed=1)
    >>> kernel.shape
    (8, 8, 3, 3)
    """
    shape = tuple(int(extent) for extent in kernel_shape)
    resolve_channels(shape, conv)
    check_input_shape(input_shape, conv)
    library = get_backend(backend)
    start = np.random.default_rng(seed).standard_normal(shape)
    for letter, stride in zip(conv.spatial, conv.strides, strict=True):
        axis = conv.layout.index(letter)
        off_centre = np.abs(np.arange(shape[axis]) - (shape[axis] - 1) // 2 - (stride - 1) / 2) > stride / 2
        scale = np.where(off_centre, OUTER, 1.0)
        start *= scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    found = nearest_orthogonal(library.asarray(start, dtype=dtype, device=device), input_shape, conv)
    kernel = found.kernel * gain
    xp = library.namespace(kernel)
    return kernel if dtype_name(kernel.dtype) == dtype else xp.astype(kernel, getattr(xp, dtype))


class _State(NamedTuple):
    """A kernel, the point ahead of it that the next step starts from, and Nesterov's number."""

    kernel: Array
    ahead: Array
    momentum: Array


def _step(operand: Operand, *arrays: Array) -> _State:
    """Take one projection, from a point ahead of the kernel in the direction that it moved in."""
    xp, state = operand.xp, _State(*arrays)
    new = _polar_and_cut(operand, state.ahead)
    turned = xp.sum(xp.real(operand.backend.conj(new - state.ahead) * (new - state.kernel))) < 0
    momentum, beyond = next_momentum(xp, state.momentum, turned)
    return _State(new, new + xp.astype(beyond, new.dtype) * (new - state.kernel), momentum)


def _polar_and_cut(operand: Operand, kernel: Array) -> Array:
    """Return the taps nearest to the polar factors of a kernel's symbol."""
    operand = dataclasses.replace(operand, kernel=kernel)
    symbol = symbol_polynomial(operand)

    def polar(phases: Array, _: Array) -> tuple[Array, ...]:
        u, _, vh = operand.backend.svd(symbol.matrices(phases))
        return (operand.xp.matmul(u, vh),)

    (cut,) = nearest_taps(symbol, Samples.at(operand), polar)
    return cut


def _deviation(operand: Operand, kernel: Array) -> Array:
    values = visited_values(dataclasses.replace(operand, kernel=kernel), "auto", BLOCK_BYTES)
    return operand.xp.max(operand.xp.abs(values - 1))
