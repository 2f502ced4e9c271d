"""The orthogonal convolution nearest to a given one, and orthogonal kernels to start training from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from convsv_core._geometry.shapes import check_input_shape, resolve_channels
from convsv_core._projection.excess import Samples, nearest_taps
from convsv_core._projection.momentum import next_momentum
from convsv_core._projection.polar import polar_factors
from convsv_core._spectrum.values import visited_values
from convsv_core._symbol.kernel_values import check_values
from convsv_core._symbol.operand import Operand, check_conv, make_operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, symbol_polynomial
from convsv_core.backend import Array
from convsv_core.conv import Conv, as_float, as_int, check_positive
from convsv_core.dtypes import dtype_name
from convsv_core.plugins import backend_of, get_backend, on_values

__all__ = ["NearestOrthogonal", "nearest_orthogonal", "orthogonal_kernel", "polar_and_cut"]

OUTER = 0.1
"""Scale of the taps off the centre in the Gaussian kernel that `orthogonal_kernel` starts from. A guess.

Without a dominant centre, Gaussian kernels of square layers ended at deviations of 0.5 to 0.9.
"""

CHECK_EVERY = 10
"""Number of iterations between two computations of the singular values, which decide whether to stop. A guess."""


class NearestOrthogonal(NamedTuple):
    """Hold a kernel whose convolution is as nearly orthogonal as the iteration made it.

    Attributes
    ----------
    kernel : array
    deviation : 0-d array
        The largest distance of a singular value from 1.
    iterations : int
    converged : bool
        Whether `deviation` is at most the tolerance. It stays False if the support holds no orthogonal convolution
        near the given one.
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
    """Bring a circular convolution as near to an orthogonal one as its support allows.

    Two steps alternate, with momentum. One takes the polar factor at each frequency, which is the nearest orthogonal
    operator. The operator is semi-orthogonal if the layer has more or fewer outputs than inputs. The other step cuts
    the kernel to its taps.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also says what is raised.
    tolerance : float, default 1e-3
        Stop when every singular value is within this distance of 1. Positive.
    max_iterations : int, default 200

    Returns
    -------
    NearestOrthogonal
        Its kernel has the shape of `kernel`. Arrays have the precision of the kernel, but float32 for kernels of 16
        bits.

    Raises
    ------
    ValueError
        Also if `tolerance` is not positive.

    Notes
    -----
    A constant for differentiation. Not traceable, because it stops when it has converged. A lazy kernel (Dask) is
    computed now, as one task in the library of its chunks. Kernels of JAX and PyTorch on one device of a CPU are
    computed with NumPy. If the matrix of a frequency is rank-deficient, its polar
    factor is not unique and the SVD's is taken. So the zero kernel gives the identity.

    Orthogonal convolutions of a given support form several families, which differ in how often their phases turn
    along the grid. If a square kernel has no dominant tap, as a Gaussian kernel, the iteration often ends between two
    families, far from both. `orthogonal_kernel` starts near one family.

    Sources: Sedghi, Gupta and Long, ICLR 2019, with all singular values clipped to 1 from both sides; Xiao et al.,
    ICML 2018, for orthogonal convolutions as initial values; Li et al., NeurIPS 2019, for the families.

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
    check_values(operand.backend, operand.kernel, "the iteration stops when it has converged")
    # The polar factor does not depend on the kernel's scale. With the scale 1 no result is multiplied by it.
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
    """Draw a kernel whose convolution is orthogonal, times `gain`, to start training from.

    Parameters
    ----------
    kernel_shape : tuple of int
        Extents of the axes that ``conv.layout`` names.
    input_shape, conv
        As for `singular_values`.
    seed : int, default 0
        The same seed gives the same kernel, up to rounding, in every library.
    gain : float, default 1.0
        Every singular value is near this number.
    backend : str, default "numpy"
        A name that `backends` lists.
    dtype : str, default "float32"
        The name of a dtype. A complex kernel has an imaginary part of 0.
    device : str, optional
        A device of the backend's library. The default device if not given.

    Returns
    -------
    array, of `kernel_shape`

    Raises
    ------
    TypeError
        `conv` is not a `Conv`, or `seed`, `gain` or an extent is of the wrong kind.
    ValueError
        The shapes do not fit each other, `backend` is not one that is available, or the library has no such `dtype` on
        the device. Also if `gain` is not finite, or if `seed` is negative.

    Notes
    -----
    The result is `nearest_orthogonal`, with default arguments, of a Gaussian kernel whose central taps are ten times
    the other taps. For a stride s, there are s central taps along the axis. Sources: as for `nearest_orthogonal`;
    Saxe, McClelland and Ganguli, ICLR 2014.

    Examples
    --------
    >>> kernel = orthogonal_kernel((8, 8, 3, 3), (8, 8), Conv("OIHW"), seed=1)
    >>> kernel.shape
    (8, 8, 3, 3)
    """
    check_conv(conv)
    shape = tuple(as_int(f"kernel_shape[{axis}]", extent, least=1) for axis, extent in enumerate(kernel_shape))
    resolve_channels(shape, conv)
    check_input_shape(input_shape, conv)
    as_int("seed", seed, least=0)
    if not math.isfinite(as_float("gain", gain)):
        raise ValueError(f"gain={gain}: wanted a finite number")
    library = get_backend(backend)
    if dtype not in library.dtypes(device):
        raise ValueError(f"dtype={dtype!r}: wanted one of {', '.join(library.dtypes(device))} with backend={backend!r}")
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
    """Hold a kernel, the point ahead of it from which the next step starts, and Nesterov's number."""

    kernel: Array
    ahead: Array
    momentum: Array


def _step(operand: Operand, *arrays: Array) -> _State:
    """Return the state after one projection of the point ahead of the kernel."""
    xp, state = operand.xp, _State(*arrays)
    new = polar_and_cut(operand, state.ahead)
    turned = xp.sum(xp.real(operand.backend.conj(new - state.ahead) * (new - state.kernel))) < 0
    momentum, beyond = next_momentum(xp, state.momentum, turned)
    return _State(new, new + xp.astype(beyond, new.dtype) * (new - state.kernel), momentum)


def polar_and_cut(operand: Operand, kernel: Array) -> Array:
    """Return the taps nearest to the polar factors of a kernel's symbol."""
    operand = operand.of(kernel)
    symbol = symbol_polynomial(operand)

    def polar(phases: Array, _: Array) -> tuple[Array, ...]:
        return (polar_factors(operand.backend, symbol.matrices(phases)),)

    (cut,) = nearest_taps(symbol, Samples.at(operand), polar)
    return cut


def _deviation(operand: Operand, kernel: Array) -> Array:
    """Return the largest distance of a singular value from 1."""
    values = visited_values(operand.of(kernel), "auto", BLOCK_BYTES)
    return operand.xp.max(operand.xp.abs(values - 1))
