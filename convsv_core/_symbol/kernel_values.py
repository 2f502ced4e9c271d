"""Checks of a kernel's values, and the scale to which they are brought before anything is computed from them."""

from __future__ import annotations

from convsv_core.backend import Array, Backend

__all__ = ["check_finite", "check_values", "normalise"]


def check_values(backend: Backend, kernel: Array, reason: str) -> None:
    """Raise ValueError, with the reason why values are read, if a kernel is traced and has none."""
    if not backend.has_values(kernel):
        raise ValueError(f"kernel is traced: wanted an array with values, because {reason}")


def check_finite(backend: Backend, kernel: Array, name: str = "kernel") -> tuple[Array, Array | None]:
    """Raise ValueError, with the name of the argument, if the kernel holds NaN or infinity.

    Returns
    -------
    kernel : array
        The kernel. Under tracing it is the zero kernel if an entry is not finite.
    finite : 0-d boolean array or None
        Under tracing, whether all entries are finite; None if the entries have been checked.
    """
    xp = backend.namespace(kernel)
    finite = xp.all(xp.isfinite(kernel))
    known = backend.truth(finite)
    if known is None:
        return xp.where(finite, kernel, xp.zeros_like(kernel)), finite
    if not known:
        raise ValueError(f"{name} holds NaN or infinity: wanted finite numbers (has training diverged?)")
    return kernel, None


def normalise(kernel: Array, backend: Backend) -> tuple[Array, Array]:
    """Return the kernel divided by a power of two near its largest entry, and that power as a 0-d array.

    The power is 1 for the zero kernel. Subnormal entries become normal numbers whose squares do not vanish.
    """
    xp = backend.namespace(kernel)
    largest = xp.max(xp.abs(backend.stop_gradient(kernel)))
    # The factor 4 at each end of the range keeps the power and its reciprocal normal numbers.
    limits = xp.finfo(largest.dtype)
    least, most = (xp.full_like(largest, x) for x in (4 * float(limits.smallest_normal), float(limits.max) / 4))
    largest = xp.where(largest > 0, xp.minimum(xp.maximum(largest, least), most), xp.ones_like(largest))
    scale = xp.pow(xp.full_like(largest, 2.0), xp.floor(xp.log2(largest)))
    return kernel / scale, scale
