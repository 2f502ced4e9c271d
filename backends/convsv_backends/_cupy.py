"""CuPy: NumPy's interface on CUDA devices."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from convsv_core.backend import Array, Backend
from convsv_core.plugins import hookimpl


class CupyBackend(Backend):
    """CuPy arrays."""

    name = "cupy"
    module = "cupy"

    def owns(self, array: object) -> bool:
        """Whether `array` is a CuPy array."""
        return bool(array_api_compat.is_cupy_array(array))

    def library(self) -> ModuleType:
        """CuPy through array-api-compat."""
        import array_api_compat.cupy as xp

        return xp

    def unavailable(self) -> str:
        """CuPy imports without a device, and then fails at its first array."""
        reason = super().unavailable()
        if reason:
            return reason
        import cupy

        return "" if cupy.is_available() else "cupy is installed, but it finds no CUDA device"

    def devices(self) -> tuple[str, ...]:
        """Each CUDA device."""
        import cupy

        return tuple(f"cuda:{index}" for index in range(cupy.cuda.runtime.getDeviceCount()))

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Copy a NumPy array to a device."""
        import cupy

        with cupy.cuda.Device(int(device.partition(":")[2] or 0) if device else None):
            return cupy.asarray(array, dtype=dtype)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Copy to the host."""
        import cupy

        return cupy.asnumpy(array)


@hookimpl
def convsv_backend() -> Backend:
    """Hand CuPy over."""
    return CupyBackend()
