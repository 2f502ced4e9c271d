"""The operator of a layer on an image of fixed extents under any padding, and its exact norm.

A layer that is not circulant has no Fourier basis. It is applied pixel by pixel instead. Every output pixel gathers,
for each tap, the input pixel that the padding puts there, or a zero. One matrix product over taps and channels then
gives the outputs. The adjoint makes the matrix product first. Every input pixel then gathers and adds the products
that belong to it.

The norm is the square root of the largest eigenvalue of ``A* A``, or of ``A A*`` where that matrix is smaller.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from convsv_core._geometry.padded_plan import PaddedPlan, make_padded_plan
from convsv_core._geometry.padding import tap_reads
from convsv_core._geometry.shapes import check_input_shape
from convsv_core._norm import lanczos
from convsv_core._norm.image_operator import ImageOperator
from convsv_core._norm.lanczos import largest_eigenvector, table_like, unit
from convsv_core._norm.padded_transform import (
    TransformedOperator,
    make_transformed_operator,
    transform_error,
    transforms_are_cheaper,
)
from convsv_core._symbol.operand import Operand, check_conv, make_operand
from convsv_core.backend import Array, ArraySpec
from convsv_core.conv import Conv

__all__ = ["PaddedOperator", "make_padded_operator", "padded_operator_norm", "padded_rounding"]

DENSE_SIDE = 128
"""Largest number of inputs, or of outputs if those are fewer, with which an operator is decomposed as a matrix.

That is faster than the iteration, and exact under tracing too. The number is a guess.
"""

DENSE_ENTRIES = 1 << 22
"""Largest number of entries of such a matrix. A guess."""


@dataclass(frozen=True)
class PaddedOperator(ImageOperator):
    """The linear operator of a layer on an image, applied by a table of the pixels that every output reads.

    Attributes
    ----------
    operand, transposed
        As for `ImageOperator`.
    plan : PaddedPlan
        Tables of integers on the host.
    taps : array, shape (groups, taps * columns, rows)
        The taps of the forward convolution. A column holds the taps of one output channel.
    gather, scatter : int arrays, 1-D
        The tables of `plan`, flattened, on the device of the kernel.
    """

    plan: PaddedPlan
    taps: Array
    gather: Array
    scatter: Array

    @property
    def _shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        plan = self.operand.plan
        return (
            (plan.groups, len(self.plan.scatter), plan.columns),
            (plan.groups, len(self.plan.gather), plan.rows),
        )

    def widened(self) -> PaddedOperator:
        """Return the same operator in float64, where the library computes in it fast."""
        operand = self.operand.widen()
        taps = operand.xp.astype(self.taps, operand.kernel.dtype, copy=False)
        return dataclasses.replace(self, operand=operand, taps=taps)

    def detached(self) -> PaddedOperator:
        """Return the same operator as a constant to automatic differentiation."""
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
        """Take entries along the second last axis; a place equal to the axis's extent gives zeros."""
        xp = self.operand.xp
        axis = array.ndim - 2
        return xp.take(xp.concat([array, xp.zeros_like(array[..., :1, :])], axis=axis), places, axis=axis)


def make_padded_operator(kernel: Array, input_shape: object, conv: Conv) -> PaddedOperator | TransformedOperator:
    """Check a call's arguments and make the operator of a layer, which transforms apply where they are cheaper.

    Raises what `padded_operator_norm` raises.
    """
    check_conv(conv)
    extents = check_input_shape(input_shape, conv)
    return _operator_of(_bare_operand(kernel, conv), extents, conv)


def _operator_of(operand: Operand, extents: tuple[int, ...], conv: Conv) -> PaddedOperator | TransformedOperator:
    """Return the operator of a kernel that has been checked."""
    taps = tuple(axis.taps for axis in operand.plan.axes)
    reads = tap_reads(taps, extents, conv)
    if transforms_are_cheaper(operand, reads):
        return make_transformed_operator(operand, reads, conv.padding_mode)
    plan = make_padded_plan(taps, extents, conv)
    gather, scatter = (
        operand.backend.asarray_like(table.reshape(-1), operand.kernel) for table in (plan.gather, plan.scatter)
    )
    xp = operand.xp
    taps = xp.permute_dims(operand.taps(), (1, 0, 3, 2))
    taps = xp.reshape(taps, (operand.plan.groups, -1, operand.plan.rows))
    return PaddedOperator(operand, conv.transposed, plan, taps, gather, scatter)


def _bare_operand(kernel: Array, conv: Conv) -> Operand:
    """Return the kernel with a plan that describes the taps alone, without stride, dilation and padding."""
    bare = dataclasses.replace(conv, stride=1, dilation=1, padding="valid", padding_mode="zeros", output_padding=None)
    return make_operand(kernel, None, bare, lattice=True)


def padded_rounding(kernel: Array, input_shape: tuple[int, ...], conv: Conv, norm: float) -> float:
    """Return a bound of what transforms add to the rounding error of `padded_operator_norm`.

    It is 0 where the layer is applied pixel by pixel. `norm` is an upper bound of the operator's norm.
    """
    operand = _bare_operand(kernel, conv).widen()
    reads = tap_reads(tuple(axis.taps for axis in operand.plan.axes), input_shape, conv)
    if not transforms_are_cheaper(_bare_operand(kernel, conv), reads):
        return 0.0
    return transform_error(operand, reads, norm / float(operand.scale)) * float(operand.scale)


def padded_operator_norm(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the operator norm of a layer on an image of fixed extents, with the layer's own padding.

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
        the convolution that takes the layer's outputs to its inputs. ``conv.output_padding`` says how many outputs
        there are, and None stands for ``input_shape * stride``.

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
    A layer of many taps is applied through transforms where tables of pixels and taps would take more memory. Their
    rounding error has a bound in `padded_rounding`.

    Operators with at most `DENSE_SIDE` inputs or outputs are decomposed as a matrix. For others the value is a
    Rayleigh quotient, which never exceeds the norm by more than rounding. The iteration is that of
    `convsv_core._norm.lanczos`. With the eps of the result's dtype, it ends once both

    - ``|A* A v - s^2 v| <= 2 eps^(3/4) s^2``, so that a singular value lies within ``eps^(3/4) s`` of the result s
      (2e-12 s in float64, 7e-6 s in float32);
    - the second-order error estimate from the residuals and gaps of all Ritz values is at most ``eps s``,

    or after a fixed number of restarts. It can miss a larger singular value whose vector is orthogonal, up to about
    that residual, to a fixed pseudo-random vector and to the Krylov space that starts from it.

    Traceable with `conv` and `input_shape` static. A traced program calls the host for the maximiser where it can (JAX
    on a CPU). Otherwise the number of steps is fixed: 132 applications of ``A* A``. The result is then below the norm.
    The relative error is rounding for small images and isolated maxima, and about 1e-6 in a hard case, a Gaussian
    kernel of 64 channels on 56 x 56 pixels.

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
    with operator.operand.backend.computation_context(operator.operand.kernel):
        maximiser = _maximiser_or_host(operator.detached(), check_input_shape(input_shape, conv), conv)
        # An error of the maximiser enters its Rayleigh quotient squared, so only the quotient needs float64.
        operator = operator.widened()
        operand, xp = operator.operand, operator.operand.xp
        maximiser = unit(operand, xp.astype(maximiser, operand.kernel.dtype, copy=False))
        left = unit(operand, operator.detached().apply(maximiser))
        right = operator.apply(maximiser)
    products = operand.backend.conj(left) * right
    return operand.answer(xp.sum(products if operand.plan.real else xp.real(products)))


def _maximiser_or_host(operator: PaddedOperator | TransformedOperator, extents: tuple[int, ...], conv: Conv) -> Array:
    """Return what `_maximiser` does, from the host where a traced program can call it."""
    operand, backend = operator.operand, operator.operand.backend
    if not backend.compiles or backend.has_values(operand.kernel):
        return _maximiser(operator)
    detached = operand.of(backend.stop_gradient(operand.kernel))

    def maximiser(operand: Operand) -> tuple[Array, ...]:
        return (_maximiser(_operator_of(operand, extents, conv).narrowed()),)

    (found,) = detached.call_host(
        maximiser, results=(ArraySpec(operator.input_shape, operand.kernel_dtype),), otherwise=maximiser
    )
    return found


def _maximiser(operator: PaddedOperator | TransformedOperator) -> Array:
    """Return the image that a narrowed operator lengthens most, of shape `operator.input_shape`."""
    size = math.prod(operator.input_shape)
    entries = size * math.prod(operator.output_shape)
    xp = operator.operand.xp

    def gram(row: Array) -> Array:
        image = xp.reshape(row, operator.input_shape)
        return xp.reshape(operator.adjoint(operator.apply(image)), (1, -1))

    if size <= lanczos.BASIS or (size <= DENSE_SIDE and entries <= DENSE_ENTRIES):
        row = _dense_eigenvector(operator, size)
    else:
        row = largest_eigenvector(operator.operand, gram, size, operator.taps)
    return xp.reshape(row, operator.input_shape)


def _dense_eigenvector(operator: PaddedOperator | TransformedOperator, size: int) -> Array:
    """Return the largest eigenvector of the Gram matrix, assembled by applying the operator to the identity."""
    xp, backend = operator.operand.xp, operator.operand.backend
    images = operator.apply(xp.reshape(table_like(operator.operand, np.eye(size)), (size, *operator.input_shape)))
    images = xp.reshape(images, (size, -1))
    _, vectors = backend.eigh(xp.matmul(images, backend.adjoint(images)))
    return backend.adjoint(vectors[:, -1:])
