"""What `clip` and `project` are measured against: the paper's clip, and Dykstra's algorithm as it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.baselines import HostArray, TwoLines, from_polyphase, polyphase
from benchmarks.libraries import Library
from benchmarks.shapes import Shape
from convsv_core.backend import Array

CHECK_EVERY = 10
"""Iterations of Dykstra's algorithm from one look at the gap to the next."""


def clip_matrices(library: Library, matrices: Array, bound: float) -> Array:
    """The nearest matrices of norm at most `bound`, by the SVD with vectors of every one."""
    u, s, vh = library.svd(matrices)
    s = s.clip(max=bound)
    if u.shape[-2] <= vh.shape[-1]:
        return (u * s[..., None, :]) @ vh
    return u @ (s[..., None] * vh)


@dataclass(eq=False)
class PaperClip(TwoLines):
    """One clip-and-cut step, in one library.

    The kernel padded with zeros to the input's extents is transformed, the matrix at every frequency decomposed with
    its vectors, the singular values replaced by their minimum with the bound, the product transformed back, and cut
    to the kernel's extents. A strided or grouped layer gets its polyphase kernel, as in `TwoLines`; back from it
    is not timed. Source: Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, ICLR 2019, section 3
    and appendix.

    Parameters
    ----------
    bound : float
        Which does not change what it costs.
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        self.values = lambda matrices: clip_matrices(self.library, matrices, self.bound)
        super().__post_init__()

    def __call__(self, kernel: Array) -> Array:
        """The step, from one polyphase kernel to another."""
        return self._cut(self._values(self.library.fft(kernel, self.shape.grid)))

    def transform(self, kernel: Array) -> Array:
        """There and back: all but the matrices at the frequencies."""
        return self._cut(self.library.fft(kernel, self.shape.grid))

    def _cut(self, matrices: Array) -> Array:
        extents = self.kernel.shape[: len(self.shape.grid)]
        return self.library.ifft(matrices, self.shape.grid)[tuple(slice(n) for n in extents)].real


def paper_clip(library: Library, shape: Shape, kernel: HostArray, bound: float) -> HostArray:
    """The clipped kernel, with the axes of `kernel` and in its dtype."""
    step = PaperClip(library, shape, limit=0.0, sample_seconds=0.0, bound=bound)
    clipped = step(library.asarray(polyphase(shape, kernel)))
    return from_polyphase(shape, library.backend.to_numpy(clipped)).astype(kernel.dtype)


@dataclass(frozen=True)
class PlainProjection:
    """Where Dykstra's algorithm has come to.

    Attributes
    ----------
    kernel : numpy.ndarray
        Rescaled to the bound.
    iterations : int
    gap : float
        ``(distance^2 - d^2) / distance^2`` with the lower bound d of the least distance that the dual gives.
    """

    kernel: HostArray
    iterations: int
    gap: float


def plain_dykstra(shape: Shape, kernel: HostArray, bound: float, gap: float, most: int) -> PlainProjection:
    """Dykstra's algorithm between the ball of operators of norm at most `bound` and the kernels of one support.

    The support is a linear subspace, which needs no correction. NumPy, float64; strided and dilated layers by
    their polyphase kernels. Taps must not wrap onto each other.
    Source: Boyle and Dykstra, *Advances in Order Restricted Statistical Inference*, 1986.

    Parameters
    ----------
    shape : Shape
    kernel : numpy.ndarray
    bound : float
        Positive.
    gap : float
        At which to stop.
    most : int
        Iterations.
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
