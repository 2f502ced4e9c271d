"""Compute the norm of a convolution in other ways, each written from its paper.

Each function takes the kernel with its spatial axes first and returns an estimate, or a bound, of the norm in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from benchmarks.libraries import Function, Library
from benchmarks.shapes import HostArray, Shape
from convsv_core.backend import Array

__all__ = ["gram_bounds", "kernel_gram_bound", "power_iteration", "reshaped_norm", "tensor_norm_bound"]

GRAM_ITERATIONS = 6
"""Squarings at each frequency: the bound is then at most ``rank ** (1 / 2 ** 7)`` times the norm, which is proved."""

KERNEL_ITERATIONS = 4
"""Squarings of the kernel: a guess. Each doubles the reach, so that a 3 x 3 kernel comes to 33 x 33 taps."""

TENSOR_ITERATIONS = 100
"""Sweeps of the higher-order power method: a guess."""


def gram_bounds(library: Library, iterations: int = GRAM_ITERATIONS) -> Function:
    """Return a function from matrices to upper bounds of their norms.

    Each squaring ``G <- G* G`` squares the singular values, and the Frobenius norm of the last Gram matrix bounds
    the norm. Every matrix is scaled to norm 1 before it is squared. Source: Delattre, Barthelemy, Araujo and
    Allauzen, *Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration*, ICML 2023,
    algorithms 2 and 3.
    """

    def bounds(matrices: Array) -> Array:
        xp, adjoint = library.backend.namespace(matrices), library.backend.adjoint
        logarithm = xp.zeros_like(xp.real(matrices[..., 0, 0]))
        if matrices.shape[-2] < matrices.shape[-1]:
            matrices = adjoint(matrices)
        for step in range(iterations + 1):
            size = xp.sqrt(xp.sum(xp.abs(matrices) ** 2, axis=(-2, -1)))
            logarithm = logarithm + xp.log(size) / 2**step
            if step < iterations:
                matrices = matrices / size[..., None, None]
                matrices = xp.matmul(adjoint(matrices), matrices)
        return xp.exp(logarithm)

    return bounds


def kernel_gram_bound(library: Library, iterations: int = KERNEL_ITERATIONS) -> Function:
    """Return a function from the polyphase kernel to an upper bound for every input size and zero padding.

    A squaring is the correlation of the kernel with itself, here through FFTs of just the size that holds it, on
    half of the frequencies, since the kernel is real. The last operator is Hermitian, and its norm is at most the
    largest absolute sum of one of its rows. Source: Delattre, Barthelemy and Allauzen, *Spectral Norm of
    Convolutional Layers with Circular and Zero Paddings*, 2024.
    """

    def bound(kernel: Array) -> Array:
        xp, adjoint = library.backend.namespace(kernel), library.backend.adjoint
        kernel = kernel[..., 0, :, :] if kernel.shape[-2] >= kernel.shape[-1] else adjoint(kernel[..., 0, :, :])
        logarithm = 0.0
        for step in range(iterations):
            size = xp.sqrt(xp.sum(kernel**2))
            logarithm = logarithm + xp.log(size) / 2**step
            extents = tuple(2 * extent - 1 for extent in kernel.shape[:2])
            symbol = library.rfft(kernel / size, extents)
            middle = tuple(extent - 1 for extent in kernel.shape[:2])
            kernel = library.irfft(xp.matmul(adjoint(symbol), symbol), extents)
            kernel = xp.roll(kernel, middle, axis=(0, 1))  # from -middle to middle, not wrapped
        largest = xp.max(xp.sum(xp.abs(kernel), axis=(0, 1, 2)))
        return xp.exp(logarithm + xp.log(largest) / 2**iterations)

    return bound


def tensor_norm_bound(library: Library, extents: tuple[int, ...], iterations: int = TENSOR_ITERATIONS) -> Function:
    """Return a function from the polyphase kernel to ``sqrt(taps)`` times its norm as a tensor of four axes.

    The norm of the tensor bounds that of the operator. But the higher-order power method finds local maxima, so that
    the result is no certificate. Source: Grishina, Gorbunov and Rakhuba, *Tight and Efficient Upper Bound on
    Spectral Norm of Convolutional Layers*, ECCV 2024.
    """
    high, wide, _, inputs, outputs = extents
    rng = np.random.default_rng(0)
    state = tuple(
        library.asarray(_unit(rng.standard_normal(n) + 1j * rng.standard_normal(n)))
        for n in (high, wide, inputs, outputs)
    )

    def bound(kernel: Array) -> Array:
        xp = library.backend.namespace(kernel)
        kernel = xp.astype(kernel, xp.complex64)
        rows = xp.reshape(kernel, (high * wide, inputs * outputs))

        def unit(vector: Array) -> Array:
            return vector / xp.sqrt(xp.sum(xp.abs(vector) ** 2))

        def sweep(a: Array, b: Array, u: Array, v: Array) -> tuple[Array, ...]:
            along = xp.reshape(xp.conj(a)[:, None] * xp.conj(b)[None, :], (1, -1))
            matrix = xp.reshape(along @ rows, (inputs, outputs))
            u = unit(matrix @ xp.conj(v))
            v = unit(xp.conj(u) @ matrix)
            across = xp.reshape(xp.conj(u)[:, None] * xp.conj(v)[None, :], (-1,))
            taps = xp.reshape(rows @ across, (high, wide))
            a = unit(taps @ xp.conj(b))
            return a, unit(xp.conj(a) @ taps), u, v

        a, b, u, v = library.backend.repeat(sweep, state, iterations, kernel)
        taps = xp.reshape(xp.conj(u)[:, None] * xp.conj(v)[None, :], (-1,))
        value = xp.sum(xp.reshape(rows @ taps, (high, wide)) * xp.conj(a)[:, None] * xp.conj(b)[None, :])
        return math.sqrt(high * wide) * xp.abs(value)

    return bound


def power_iteration(library: Library, shape: Shape, steps: int) -> Function:
    """Return a function from the layer's kernel to an estimate from below of its norm with zero padding.

    A step applies the convolution and its adjoint to one random image. Source: Farnia, Zhang and Tse, *Generalizable
    Adversarial Training via Spectral Normalization*, ICLR 2019; also Ryu et al., ICML 2019.
    """
    start = _unit(np.random.default_rng(0).standard_normal((shape.inputs, *shape.extents)))

    def estimate(kernel: Array) -> Array:
        xp = library.backend.namespace(kernel)
        apply, adjoint, image = library.convolution(kernel, shape, start.astype(np.float32))

        def step(image: Array) -> tuple[Array]:
            image = adjoint(apply(image))
            return (image / xp.sqrt(xp.sum(image**2)),)

        (image,) = library.backend.repeat(step, (image,), steps, kernel)
        return xp.sqrt(xp.sum(apply(image) ** 2))

    return estimate


def reshaped_norm(library: Library) -> Callable[[Array], Array]:
    """Return a function from the layer's kernel to the norm of its matrix of (taps, inputs) by outputs.

    Neither a bound nor an estimate of the layer's norm. Source: Miyato et al., *Spectral Normalization for
    Generative Adversarial Networks*, ICLR 2018.
    """

    def norm(kernel: Array) -> Array:
        xp = library.backend.namespace(kernel)
        return library.svdvals(xp.reshape(kernel, (-1, kernel.shape[-1])))[0]

    return norm


def _unit(vector: HostArray) -> HostArray:
    unit = vector / np.linalg.norm(vector)
    return unit.astype(np.complex64 if np.iscomplexobj(unit) else np.float32)
