"""Penalties on the singular values of a layer, to be added to a training loss.

Each function takes a kernel and its geometry and returns a 0-d array. The value and its gradient are finite
for every kernel, even a zero, orthogonal or rank-deficient one.

A penalty on the whole spectrum is a **mean over frequencies**: it sums over the groups and singular values of
one frequency, and averages the sums. So a weight that was found for one image size serves for others. Sums of
even powers do not depend on the size at all, if the kernel does not wrap round.

Computations run at the kernel's own scale. A value overflows only where the numbers that it sums overflow in
the result's dtype: float32 for kernels of 32 bits or fewer, else float64. A gradient has the kernel's dtype
and overflows only where its true value does. The gradient of a square is computed from numbers of the size of
the square. So it vanishes for kernels below about 1e-19 in float32.

>>> import numpy as np
>>> from convsv_core import Conv, penalties
>>> kernel = np.random.default_rng(0).normal(size=(8, 4, 3, 3))
>>> sizes = [float(penalties.orthogonality(kernel, extent, Conv("OIHW"))) for extent in (16, 32)]
>>> bool(abs(sizes[0] - sizes[1]) < 1e-12 * sizes[0])
True
"""

from convsv_core.penalties._logarithms import log_condition_number, log_lipschitz, negative_log_abs_det
from convsv_core.penalties._norms import norm_hinge, squared_norm, stable_rank
from convsv_core.penalties._sums import orthogonality, schatten, spectrum_hinge

__all__ = [
    "log_condition_number",
    "log_lipschitz",
    "negative_log_abs_det",
    "norm_hinge",
    "orthogonality",
    "schatten",
    "spectrum_hinge",
    "squared_norm",
    "stable_rank",
]
