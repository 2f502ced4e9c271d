"""Where the figures of stored kernels are computed: the library, the dtype and the device."""

from __future__ import annotations

from dataclasses import dataclass

from convsv_core._geometry.plan import HostArray
from convsv_core.backend import Array, Backend

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """The library, dtype and device that stored kernels are computed with.

    Attributes
    ----------
    backend : Backend
    dtype : str, optional
        Such as "float64". By default float64 for kernels that are stored in it where the library has it, else
        float32. Complex kernels keep their dtype in any case, and integers are refused where they are used.
    device : str, optional
        Such as "cuda:0"; by default the library's own.
    """

    backend: Backend
    dtype: str | None = None
    device: str | None = None

    def dtype_of(self, stored: HostArray) -> str | None:
        """Return the name of the dtype to compute a kernel in; None leaves the array as it is.

        A real dtype would drop the imaginary part of a complex kernel. Integers have a scale that is not known here.
        """
        if stored.dtype.kind in "cbiu":
            return None
        if self.dtype is not None or stored.dtype.kind != "f":
            return self.dtype
        return "float64" if stored.dtype.itemsize > 4 and "float64" in self.backend.dtypes(self.device) else "float32"

    def array(self, kernel: HostArray, dtype: str | None) -> Array:
        """Return a kernel on the host as an array of the library, in the given dtype."""
        return self.backend.asarray(kernel, dtype=dtype, device=self.device)
