"""The finite operator of a layer under any padding, and its exact norm.

A layer that is not circulant has no Fourier basis. It is applied pixel by pixel instead: every output pixel gathers,
for each tap, the input pixel that the padding puts there, or a zero; one matrix product over taps and channels does
the rest. The adjoint is the same product first, after which every input pixel gathers and adds what the outputs that
read it hold. Both tables are host integers, planned once.

The norm is the root of the largest eigenvalue of ``A* A``, or of ``A A*`` where that is smaller, by the Lanczos
method with full reorthogonalisation and thick restarts (Wu and Simon, *Thick-restart Lanczos method for large
symmetric eigenvalue problems*, SIAM J. Matrix Anal. Appl. 22, 2000). The largest eigenvalues lie close together as
a rule: near its maximum the symbol is a parabola, which a large image samples finely. So a restart keeps many Ritz
vectors, and what ends the iteration is not the residual alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convsv_core._geometry.padding import padding_sources, tap_places
from convsv_core.backend import Array
from convsv_core.conv import Conv
from convsv_core.evaluation import itemsize
from convsv_core.operand import Operand, check_conv, make_operand
from convsv_core.plan import HostArray, IntArray, check_input_shape, forward_extents

DENSE_SIDE = 128
"""Operators whose smaller side is at most this are decomposed as a matrix: faster, and exact under tracing too."""

DENSE_ENTRIES = 1 << 22
"""Entries that such a matrix may have."""

BASIS = 32
"""Lanczos vectors held at a time."""

LEAST_BASIS = 10
"""Lanczos vectors held at a time where `BASIS` of them would take more than `BASIS_BYTES`."""

BASIS_BYTES = 1 << 29
"""Memory for the Lanczos vectors of large operators."""

KEPT = 0.4
"""Share of the Lanczos vectors' span that a restart keeps, as Ritz vectors."""

MOST_CYCLES = 100
"""Restarts after which the best value so far is the answer."""

TRACED_CYCLES = 6
"""Restarts under tracing, where no value can decide."""

ROUNDING = 8
"""Units of rounding, relative to a vector, at which what orthogonalisation leaves of it is nothing."""

SURE = 0.75
"""Exponent of eps in the largest residual, relative to the norm, with which the iteration may end."""


@dataclass(frozen=True, eq=False)
class PaddedPlan:
    """The geometry of a padded convolution, resolved to integers.

    Attributes
    ----------
    extents, outputs : tuple of int
        Spatial extents that the forward convolution takes in and puts out.
    gather : int array, shape (pixels out, taps)
        The input pixel, in row-major order, that each tap reads for each output pixel; ``pixels in`` where it
        reads a zero.
    scatter : int array, shape (pixels in, most readers)
        The places in `gather`, flattened, that hold each input pixel; filled up with ``pixels out * taps``.
    """

    extents: tuple[int, ...]
    outputs: tuple[int, ...]
    gather: IntArray
    scatter: IntArray


@functools.lru_cache(maxsize=16)
def make_padded_plan(taps: tuple[int, ...], input_shape: tuple[int, ...], conv: Conv) -> PaddedPlan:
    """Resolve a padded convolution; raises ValueError for a geometry that is impossible."""
    extents = forward_extents(input_shape, conv)
    places = tap_places(taps, input_shape, conv)
    outputs = tuple(len(along) for along in places)
    pixels = math.prod(extents)
    gather = np.zeros((1, 1), np.int64)
    inside = np.ones((1, 1), np.bool_)
    for along, extent in zip(places, extents, strict=True):
        source = padding_sources(along, extent, conv.padding_mode)
        gather = _over_axes(np.add, gather * extent, source)
        inside = _over_axes(np.logical_and, inside, source >= 0)
    gather = np.where(inside, gather, pixels)
    return PaddedPlan(extents, outputs, gather, _readers(gather.reshape(-1), pixels))


@dataclass(frozen=True)
class PaddedOperator:
    """The linear operator of a layer on an image of fixed extents.

    Images are arrays of shape ``(*batch, groups, pixels, channels of a group)``, pixels in row-major order.

    Attributes
    ----------
    operand : Operand
        Its kernel acts, at its own scale and in its computing dtype.
    plan : PaddedPlan
    transposed : bool
        Whether the operator is the adjoint of the forward convolution.
    taps : array, shape (groups, taps * columns, rows)
        The forward convolution's, those of one output channel in a column.
    gather, scatter : int arrays, 1-D
        The plan's tables, beside the kernel.
    """

    operand: Operand
    plan: PaddedPlan
    transposed: bool
    taps: Array
    gather: Array
    scatter: Array

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Groups, pixels and channels of a group that `apply` takes."""
        return self._shapes[1 if self.transposed else 0]

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Groups, pixels and channels of a group that `apply` returns."""
        return self._shapes[0 if self.transposed else 1]

    @property
    def _shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        plan = self.operand.plan
        return (
            (plan.groups, len(self.plan.scatter), plan.columns),
            (plan.groups, len(self.plan.gather), plan.rows),
        )

    def apply(self, images: Array) -> Array:
        """Outputs for `images`."""
        return self._convolve_adjoint(images) if self.transposed else self._convolve(images)

    def adjoint(self, images: Array) -> Array:
        """Outputs of the adjoint: ``<adjoint(y), x> == <y, apply(x)>``."""
        return self._convolve(images) if self.transposed else self._convolve_adjoint(images)

    def narrowed(self) -> PaddedOperator:
        """The operator or its adjoint, whichever does not take in more elements than it puts out."""
        wide = math.prod(self.input_shape) > math.prod(self.output_shape)
        return dataclasses.replace(self, transposed=self.transposed != wide)

    def widened(self) -> PaddedOperator:
        """The same operator in float64 where the library has it at hand."""
        operand = self.operand.widen()
        taps = operand.xp.astype(self.taps, operand.kernel.dtype, copy=False)
        return dataclasses.replace(self, operand=operand, taps=taps)

    def constant(self) -> PaddedOperator:
        """The same operator, constant to automatic differentiation."""
        return dataclasses.replace(self, taps=self.operand.backend.stop_gradient(self.taps))

    def _convolve(self, images: Array) -> Array:
        xp, batch = self.operand.xp, images.shape[:-2]
        patches = xp.reshape(self._take(images, self.gather), (*batch, len(self.plan.gather), self.taps.shape[-2]))
        return xp.matmul(patches, self.taps)

    def _convolve_adjoint(self, images: Array) -> Array:
        xp, batch, columns = self.operand.xp, images.shape[:-2], self.operand.plan.columns
        patches = xp.matmul(images, self.operand.backend.adjoint(self.taps))
        patches = xp.reshape(patches, (*batch, self.plan.gather.size, columns))
        return xp.sum(
            xp.reshape(self._take(patches, self.scatter), (*batch, *self.plan.scatter.shape, columns)), axis=-2
        )

    def _take(self, array: Array, places: Array) -> Array:
        """Entries of `array` along its second last axis; zeros where a place is the extent of that axis."""
        xp = self.operand.xp
        axis = array.ndim - 2
        return xp.take(xp.concat([array, xp.zeros_like(array[..., :1, :])], axis=axis), places, axis=axis)


def make_padded_operator(kernel: Array, input_shape: object, conv: Conv) -> PaddedOperator:
    """Check a call's arguments and make the operator of a layer.

    Raises what `padded_operator_norm` raises.
    """
    check_conv(conv)
    extents = check_input_shape(input_shape, conv)
    # The operand's plan is of the taps alone: the integer tables know of stride, dilation and padding.
    bare = dataclasses.replace(conv, stride=1, dilation=1, padding="valid", padding_mode="zeros")
    operand = make_operand(kernel, None, bare)
    plan = make_padded_plan(tuple(axis.taps for axis in operand.plan.axes), extents, conv)
    gather, scatter = (
        operand.backend.constant(table.reshape(-1), operand.kernel) for table in (plan.gather, plan.scatter)
    )
    xp = operand.xp
    taps = xp.permute_dims(operand.taps(), (1, 0, 3, 2))
    taps = xp.reshape(taps, (operand.plan.groups, -1, operand.plan.rows))
    return PaddedOperator(operand, plan, conv.transposed, taps, gather, scatter)


def padded_operator_norm(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the operator norm of a layer on an image of fixed extents, with the padding that it declares.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or
        complex128.
    input_shape : tuple of int
        Spatial extents of the layer's input, in the order of ``conv.spatial``. An int stands for every axis.
    conv : Conv
        The geometry, of any padding and padding mode. A stride need not divide the extents: there are
        ``(extent + pads - dilation * (taps - 1) - 1) // stride + 1`` outputs. A transposed layer is the transpose of
        the convolution that takes ``input_shape * stride`` elements; with zero padding that is PyTorch's
        transposed convolution with the `output_padding` that gives so many.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        `kernel` is not an array of an installed library, or not of a floating dtype.
    ValueError
        The shapes do not fit each other, the dilated kernel is larger than the padded image, reflect padding is
        not smaller than the image, circular padding is larger than it, a transposed layer's padding does not give
        back the extents, or the kernel holds NaN or infinity (under tracing the result is then NaN).

    Notes
    -----
    Operators with at most `DENSE_SIDE` inputs or outputs are decomposed as a matrix. For others the value is a
    Rayleigh quotient, which never exceeds the norm by more than rounding. With eps that of the result's dtype, the
    iteration ends once both

    - ``|A* A v - s^2 v| <= 2 eps^(3/4) s^2``, so that a singular value lies within ``eps^(3/4) s`` of the result s
      (2e-12 s in float64, 7e-6 s in float32);
    - the second-order error estimate from the residuals and gaps of all Ritz values is at most ``eps s``,

    or after `MOST_CYCLES` restarts. What may be missed is a larger singular value whose vector is orthogonal, to
    about that residual, to a fixed pseudo-random vector and everything reached from it.

    Traceable with `conv` and `input_shape` static. Under tracing shapes decide: `TRACED_CYCLES` restarts, 132
    applications of ``A* A``. The result is then below the norm, by a relative error that is rounding for small
    images and isolated maxima, and about 1e-6 for a Gaussian kernel of 64 channels, the hard case, on 56 x 56 pixels.

    Differentiable once: the value is ``Re <u, A(kernel) v>`` with u and v constant, so the gradient is that of
    ``u v*`` at the maximiser. Where the maximum is attained more than once it is a subgradient; at the zero
    kernel it is 0.

    Examples
    --------
    The all-ones kernel of three taps on three pixels is a tridiagonal matrix:

    >>> import numpy as np
    >>> conv = Conv("OIW", padding_mode="zeros")
    >>> float(padded_operator_norm(np.ones((1, 1, 3)), (3,), conv)) - 1 - math.sqrt(2) < 1e-14
    True
    """
    operator = make_padded_operator(kernel, input_shape, conv).narrowed()
    with operator.operand.backend.computing(operator.operand.kernel):
        maximiser = _maximiser(operator.constant())
        # An error of the maximiser enters its Rayleigh quotient squared, so only the quotient need be wide.
        operator = operator.widened()
        operand, xp = operator.operand, operator.operand.xp
        maximiser = _unit(operator, xp.astype(maximiser, operand.kernel.dtype, copy=False))
        left = _unit(operator, operator.constant().apply(maximiser))
        right = operator.apply(maximiser)
    products = xp.conj(left) * right if xp.isdtype(right.dtype, "complex floating") else left * right
    return operand.answer(xp.sum(products if operand.plan.real else xp.real(products)))


# ---- integers -----------------------------------------------------------------------------------------


def _over_axes(combine: Callable[[HostArray, HostArray], HostArray], left: HostArray, right: HostArray) -> HostArray:
    """A table of (outputs, taps) over one axis more, by `combine`."""
    table = combine(left[:, None, :, None], right[None, :, None, :])
    return table.reshape(len(left) * len(right), -1)


def _readers(sources: IntArray, count: int) -> IntArray:
    """For each of `count` elements, the places in `sources` that hold it, filled up with ``len(sources)``."""
    order = np.argsort(sources, kind="stable")
    counts = np.bincount(sources, minlength=count)[:count]
    element = np.repeat(np.arange(count), counts)
    rank = np.arange(len(element)) - np.repeat(np.cumsum(counts) - counts, counts)
    readers = np.full((count, max(1, int(counts.max()))), len(sources))
    readers[element, rank] = order[: len(element)]
    return readers


# ---- the largest singular value's vector ----------------------------------------------------------------


def _maximiser(operator: PaddedOperator) -> Array:
    """The image that a narrowed operator lengthens most, of shape `operator.input_shape`."""
    size = math.prod(operator.input_shape)
    entries = size * math.prod(operator.output_shape)
    dense = size <= BASIS or (size <= DENSE_SIDE and entries <= DENSE_ENTRIES)
    row = _dense(operator, size) if dense else _lanczos(operator, size)
    return operator.operand.xp.reshape(row, operator.input_shape)


def _dense(operator: PaddedOperator, size: int) -> Array:
    """From the Gram matrix, assembled by applying the operator to the identity."""
    xp, backend = operator.operand.xp, operator.operand.backend
    images = operator.apply(xp.reshape(_constant(operator, np.eye(size)), (size, *operator.input_shape)))
    images = xp.reshape(images, (size, -1))
    _, vectors = backend.eigh(xp.matmul(images, backend.adjoint(images)))
    return backend.adjoint(vectors[:, -1:])


def _lanczos(operator: PaddedOperator, size: int) -> Array:
    """From a Krylov space of the Gram operator ``A* A``, restarted with its Ritz vectors.

    Vectors are rows. Row i of `projected` holds the inner products of ``A* A v_i`` with the vectors up to itself;
    those beyond follow by symmetry. After a restart the Ritz values stand on its diagonal.
    """
    operand = operator.operand
    xp, backend = operand.xp, operand.backend
    vector_bytes = size * itemsize(operand) // (2 if operand.plan.real else 1)
    count = min(size, BASIS, max(LEAST_BASIS, BASIS_BYTES // vector_bytes))
    kept = int(KEPT * count)
    diagonal, slots = _constant(operator, np.eye(count)), backend.constant(np.arange(count)[:, None], operand.kernel)
    vector = _constant(operator, _start(size, operand.plan.real))
    basis = xp.zeros_like(vector) * diagonal[:, :1]
    projected, residual, index = xp.zeros_like(diagonal), xp.zeros_like(operand.scale), slots[0, 0]
    for cycle in range(MOST_CYCLES):
        basis, projected, vector, residual, index = backend.repeat(
            functools.partial(_step, operator, slots),
            (basis, projected, vector, residual, index),
            count - kept if cycle else count,
            operator.taps,
        )
        projected = xp.tril(projected)
        values, vectors = backend.eigh(projected + backend.adjoint(xp.tril(projected, k=-1)))
        values, vectors = xp.flip(values, axis=0), xp.flip(vectors, axis=1)
        ritz = xp.matmul(backend.adjoint(vectors[:, :kept]), basis)
        done = backend.truth(_is_converged(operator, values, residual * xp.abs(vectors[-1, :])))
        if done or (done is None and cycle + 1 == TRACED_CYCLES):
            break
        basis = xp.concat([ritz, xp.zeros_like(basis[kept:, :])], axis=0)
        projected = values[:, None] * diagonal
        index = slots[kept, 0]
    return ritz[:1, :]


def _step(
    operator: PaddedOperator,
    slots: Array,
    basis: Array,
    projected: Array,
    vector: Array,
    residual: Array,
    index: Array,
) -> tuple[Array, ...]:
    """Take `vector` into the basis at `index`, and what ``A* A`` makes of it, orthogonal to the basis, as the next.

    Where nothing but rounding is orthogonal to the basis, the next vector is 0, and so are all that follow.
    """
    operand = operator.operand
    xp, backend = operand.xp, operand.backend
    basis = xp.where(slots == index, vector, basis)
    image = operator.adjoint(operator.apply(xp.reshape(vector, operator.input_shape)))
    rest = xp.reshape(image, (1, -1))
    least = ROUNDING * float(xp.finfo(operand.real_dtype).eps) * xp.linalg.vector_norm(rest)
    row = xp.zeros_like(projected[:1, :])
    for _ in range(2):  # the second time for what cancellation left of the first
        products = xp.matmul(rest, backend.adjoint(basis))
        rest = rest - xp.matmul(products, basis)
        row = row + products
    residual = xp.linalg.vector_norm(rest)
    is_new = residual > least
    residual = xp.where(is_new, residual, xp.zeros_like(residual))
    vector = _unit(operator, xp.where(is_new, rest, xp.zeros_like(rest)))
    return basis, xp.where(slots == index, row, projected), vector, residual, index + 1


def _is_converged(operator: PaddedOperator, values: Array, residuals: Array) -> Array:
    """Whether the iteration may end: a 0-d boolean array.

    `values` are the Ritz values of ``A* A``, descending, and `residuals` the norms of their residuals. With p of them
    taken together, what is left out adds at most ``sum of residuals^2 / (first value - largest of the rest)``, for
    which the Ritz value p stands. The p that gives least is the cluster that the first value belongs to.
    """
    xp = operator.operand.xp
    eps = operator.operand.answer_eps
    gaps = values[:1] - values[1:]
    separate = gaps > 0
    errors = xp.cumulative_sum(residuals**2)[:-1] / xp.where(separate, gaps, xp.ones_like(gaps))
    error = xp.min(xp.where(separate, errors, xp.full_like(errors, math.inf)))
    # Relative errors of the singular value are half of those of its square.
    sure = residuals[0] <= 2 * eps**SURE * values[0]
    return sure & ((error <= 2 * eps * values[0]) | (residuals[0] <= 2 * eps * values[0]))


def _start(size: int, real: bool) -> HostArray:
    """A fixed pseudo-random row, as no structured one may be orthogonal to the answer."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, size))
    if not real:
        row = row + 1j * rng.standard_normal((1, size))
    return np.asarray(row / np.linalg.norm(row))


def _constant(operator: PaddedOperator, table: HostArray) -> Array:
    """A host table beside the taps, in their dtype."""
    operand = operator.operand
    return operand.xp.astype(operand.backend.constant(table, operand.kernel), operand.kernel.dtype, copy=False)


def _unit(operator: PaddedOperator, array: Array) -> Array:
    """`array` divided by its norm; zeros stay."""
    xp = operator.operand.xp
    norm = xp.linalg.vector_norm(array)
    return array / xp.where(norm > 0, norm, xp.ones_like(norm))
