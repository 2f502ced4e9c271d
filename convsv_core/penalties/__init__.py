"""Penalties on the singular values of a layer, to be added to a training loss.

Each function takes a kernel and its geometry to a 0-d array, differentiable and finite, as its gradient is, for every
kernel: zero, orthogonal, rank-deficient. Sums over singular values are **means over frequencies** of the sum at
one frequency, groups included, so that a weight found at one image size serves at another: for taps that do not wrap
round, sums of even powers do not depend on the size at all.

What is not homogeneous is computed at the kernel's own scale. A value overflows where the numbers that it sums do so in
the answer's dtype (float32 for kernels of 32 bits or fewer, else float64), and a gradient, which has the kernel's
dtype, where its true value does. The gradient of a square passes through numbers of the square's size, so it
vanishes for kernels below about 1e-19 in float32.

>>> import numpy as np
>>> from convsv_core import Conv, penalties
>>> kernel = np.random.default_rng(0).normal(size=(8, 4, 3, 3))
>>> sizes = [float(penalties.orthogonality(kernel, extent, Conv("OIHW"))) for extent in (16, 32)]
>>> bool(abs(sizes[0] - sizes[1]) < 1e-12 * sizes[0])
True
"""

from convsv_core.penalties._logarithms import log_condition_number, negative_log_abs_det
from convsv_core.penalties._norms import norm_hinge, squared_norm, stable_rank
from convsv_core.penalties._sums import orthogonality, schatten, spectrum_hinge

__all__ = [
    "log_condition_number",
    "negative_log_abs_det",
    "norm_hinge",
    "orthogonality",
    "schatten",
    "spectrum_hinge",
    "squared_norm",
    "stable_rank",
]
