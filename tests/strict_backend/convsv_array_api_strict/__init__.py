"""array-api-strict for `convsv`: the array API standard and nothing beside it.

The library has simulated devices that refuse to mix, so it also shows that nothing is moved to the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from convsv_core import Backend, hookimpl


class StrictBackend(Backend):
    """array-api-strict arrays, on its CPU and on one of its simulated devices."""

    name = "array_api_strict"
    module = "array_api_strict"

    def devices(self) -> tuple[str, ...]:
        return ("CPU_DEVICE", "device1")

    def dtypes(self, device: str | None = None) -> tuple[str, ...]:
        # complex128 follows from float64 here; the cases of one precision on the second device will do
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
