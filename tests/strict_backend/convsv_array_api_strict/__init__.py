"""Backend for array-api-strict, which implements the array API standard and nothing else.

The library has simulated devices whose arrays refuse to mix. So it also shows that nothing is moved to the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from convsv_core import Backend, hookimpl

__all__ = ["StrictBackend", "convsv_backend"]


class StrictBackend(Backend):
    """Backend for array-api-strict arrays on the library's CPU and on one of its simulated devices."""

    name = "array_api_strict"
    module = "array_api_strict"

    def devices(self) -> tuple[str, ...]:
        return ("CPU_DEVICE", "device1")

    def dtypes(self, device: str | None = None) -> tuple[str, ...]:
        # The second device runs the cases of float32 only: the first device covers the other dtypes.
        return tuple(name for name in super().dtypes(device) if device != "device1" or name == "float32")

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Any:
        xp = self.library()
        where = None if device is None else xp.Device(device)
        return xp.asarray(array, dtype=None if dtype is None else getattr(xp, dtype), device=where)

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        return np.asarray(array.to_device(self.library().Device("CPU_DEVICE")))


@hookimpl
def convsv_backend() -> Backend:
    return StrictBackend()
