"""Run the baselines of `clip` and `project`: the paper's clip, and Dykstra's algorithm as it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.baselines import TwoLines, from_polyphase, polyphase
from benchmarks.libraries import Library
from benchmarks.shapes import HostArray, Shape
from convsv_core.backend import Array

__all__ = ["PaperClip", "PlainProjection", "clip_matrices", "paper_clip", "plain_dykstra"]

CHECK_EVERY = 10
"""Iterations of Dykstra's algorithm from one computation of the gap to the next: a guess."""


def clip_matrices(library: Library, matrices: Array, bound: float) -> Array:
    """Return the nearest matrices of norm at most `bound`, by the SVD with vectors of every matrix."""
    u, s, vh = library.svd(matrices)
    s = s.clip(max=bound)
    if u.shape[-2] <= vh.shape[-1]:
        return (u * s[..., None, :]) @ vh
    return u @ (s[..., None] * vh)


@dataclass(eq=False)
class PaperClip(TwoLines):
    """Run one clip-and-cut step, in one library.

    The kernel is padded with zeros to the input's extents and transformed. The matrix at every frequency is decomposed
    with its vectors, and its singular values are replaced by their minimum with the bound. The product is transformed
    back and cut to the kernel's extents. A strided or grouped layer gets its polyphase kernel, as in `TwoLines`;
    making it, and going back to the kernel, are not timed.
    Source: Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, ICLR 2019, section 3 and appendix.

    Parameters
    ----------
    bound : float
        Largest singular value of the result; it does not change the time.
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        self.values = lambda matrices: clip_matrices(self.library, matrices, self.bound)
        super().__post_init__()

    def __call__(self, kernel: Array) -> Array:
        """Run the step, from one polyphase kernel to another."""
        return self._cut(self._values(self.library.fft(kernel, self.shape.grid)))

    def transform(self, kernel: Array) -> Array:
        """Transform forth and back, without a change of the matrices at the frequencies."""
        return self._cut(self.library.fft(kernel, self.shape.grid))

    def _cut(self, matrices: Array) -> Array:
        extents = self.kernel.shape[: len(self.shape.grid)]
        return self.library.ifft(matrices, self.shape.grid)[tuple(slice(n) for n in extents)].real


def paper_clip(library: Library, shape: Shape, kernel: HostArray, bound: float) -> HostArray:
    """Return the clipped kernel, with the axes of `kernel` and in its dtype."""
    step = PaperClip(library, shape, limit=0.0, sample_seconds=0.0, bound=bound)
    clipped = step(library.asarray(polyphase(shape, kernel)))
    return from_polyphase(shape, library.backend.to_numpy(clipped)).astype(kernel.dtype)


@dataclass(frozen=True)
class PlainProjection:
    """Hold the result of Dykstra's algorithm.

    Attributes
    ----------
    kernel : numpy.ndarray
        Rescaled to the bound.
    iterations : int
    gap : float
        ``(distance^2 - d^2) / distance^2``, where the dual proves that no feasible kernel is nearer than d.
    """

    kernel: HostArray
    iterations: int
    gap: float


def plain_dykstra(shape: Shape, kernel: HostArray, bound: float, gap: float, most: int) -> PlainProjection:
    """Project a kernel onto the operators of norm at most `bound` by Dykstra's algorithm.

    The two sets are the ball of operators, and the kernels of one support. The support is a linear subspace, which
    needs no correction. The computation is NumPy's in float64; strided and dilated layers have their polyphase
    kernels. Taps must not wrap onto each other.
    Source: Boyle and Dykstra, *Advances in Order Restricted Statistical Inference*, 1986.

    Parameters
    ----------
    shape : Shape
    kernel : numpy.ndarray
    bound : float
        Positive.
    gap : float
        The iteration stops at this gap.
    most : int
        Largest number of iterations.
    """
    if most < 1:
        raise ValueError(f"most={most}: wanted at least 1")
    axes, count = tuple(range(len(shape.taps))), math.prod(shape.grid)
    wanted = polyphase(shape, kernel.astype(np.float64))
    held = polyphase(shape, np.ones(shape.kernel_shape)) > 0
    inside = tuple(slice(n) for n in wanted.shape[: len(axes)])
    current, correction = wanted, np.zeros((*shape.grid, *wanted.shape[len(axes) :]), np.complex128)
    feasible, reached = current, math.inf
    for iteration in range(1, most + 1):
        moved = np.fft.fftn(current, s=shape.grid, axes=axes) + correction
        u, s, vh = np.linalg.svd(moved, full_matrices=False)
        excess = np.clip(s - bound, 0.0, None)
        correction = (u * excess[..., None, :]) @ vh
        current = np.fft.ifftn(moved - correction, axes=axes)[inside].real * held
        if iteration % CHECK_EVERY and iteration < most:
            continue
        norm = float(np.linalg.svd(np.fft.fftn(current, s=shape.grid, axes=axes), compute_uv=False).max())
        feasible = current * min(1.0, bound / norm)
        change = wanted - current
        dual = count * float(np.sum(change * (wanted - change / 2))) - bound * float(excess.sum())
        squared = count * float(np.sum((feasible - wanted) ** 2))
        reached = (squared - 2 * dual) / squared if squared > 0 else 0.0
        if reached <= gap:
            break
    return PlainProjection(from_polyphase(shape, feasible), iteration, reached)
