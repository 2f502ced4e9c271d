"""The backend of CuPy, which has NumPy's interface on CUDA devices."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from convsv_core.backend import Array, Backend
from convsv_core.plugins import hookimpl

__all__ = ["CupyBackend", "convsv_backend"]


class CupyBackend(Backend):
    """Describe CuPy to the core."""

    name = "cupy"
    module = "cupy"

    def owns_array(self, array: object) -> bool:
        """Return whether `array` is a CuPy array."""
        return bool(array_api_compat.is_cupy_array(array))

    def library(self) -> ModuleType:
        """Return CuPy's namespace from array-api-compat."""
        import array_api_compat.cupy as xp

        return xp

    def unavailable(self) -> str:
        """Return why CuPy cannot be used, or "" if it can; without a device CuPy imports, but makes no array."""
        reason = super().unavailable()
        if reason:
            return reason
        import cupy

        return "" if cupy.is_available() else "cupy is installed, but finds no CUDA device"

    def devices(self) -> tuple[str, ...]:
        """Return the names of the CUDA devices."""
        import cupy

        return tuple(f"cuda:{index}" for index in range(cupy.cuda.runtime.getDeviceCount()))

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Return a copy of a NumPy array on a device."""
        import cupy

        with cupy.cuda.Device(int(device.partition(":")[2] or 0) if device else None):
            return cupy.asarray(array, dtype=dtype)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Return a copy of `array` on the host."""
        import cupy

        return cupy.asnumpy(array)


@hookimpl
def convsv_backend() -> Backend:
    """Return the backend of CuPy."""
    return CupyBackend()
