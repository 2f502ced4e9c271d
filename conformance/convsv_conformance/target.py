"""Describe what is under test, one library on one device in one dtype, and record what was compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import array_api_compat
import numpy as np

from convsv_conformance.cases import Case, Truth
from convsv_conformance.dense import Array
from convsv_core.backend import Backend

__all__ = ["UNITS_IN_LAST_PLACE", "Failure", "Ledger", "Target"]

REAL_ANSWERS = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex64": "float32",
    "complex128": "float64",
}
"""The dtype of real results, by the dtype of the kernel."""

COMPLEX_ANSWERS = {"float32": "complex64", "float64": "complex128"}
"""The dtype of complex results, by the dtype of real results."""

UNITS_IN_LAST_PLACE = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
"""The distance from 1 to the next larger number of a dtype, which is its eps."""

REFERENCE_FACTOR = 16.0
"""Error allowed to the reference's own norms, in units of the rounding of double precision; a guess, twice LAPACK's."""


class Failure(AssertionError):
    """A result differs from the dense reference, or has another kind than the documentation says."""


class Ledger:
    """A record of comparisons: their number, and the largest error in units of eps times the scale of the result.

    Parameters
    ----------
    eps : float
        Unit of rounding of the results.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps
        self.cases = 0
        self.largest = 0.0

    def close(self, what: str, actual: Array | float, expected: Array | float, *, scale: float, factor: float) -> None:
        """Raise `Failure` unless ``|actual - expected| <= factor * eps * scale`` everywhere.

        Infinities must be equal. A NaN is never close to anything.
        """
        got, wanted = np.asarray(actual), np.asarray(expected)
        if got.shape != wanted.shape:
            raise Failure(f"{what}: shape {got.shape}, wanted {wanted.shape}")
        if not got.size:
            return
        with np.errstate(invalid="ignore"):
            error = np.where(got == wanted, 0.0, np.abs(got - wanted))
        worst = float(np.max(error))  # NaN if any error is NaN
        unit = self.eps * scale
        units = worst / unit if unit else (0.0 if worst == 0 else math.inf)
        if not units <= factor:
            place = np.unravel_index(int(np.argmax(np.where(np.isnan(error), np.inf, error))), got.shape)
            where = f" at {tuple(int(i) for i in place)}" if got.ndim else ""
            raise Failure(
                f"{what}: {got[place]!r}{where}, wanted {wanted[place]!r}; the error {error[place]:.3g} is "
                f"{units:.3g} units of eps * scale = {unit:.3g}, allowed {factor:g}"
            )
        self.largest = max(self.largest, units)

    def not_above(self, what: str, value: float, limit: float) -> None:
        """Raise `Failure` unless ``value <= limit``, with room for the error of the reference's own norms."""
        room = REFERENCE_FACTOR * UNITS_IN_LAST_PLACE["float64"] * abs(value)
        self.true(f"{what}: {value} is more than {limit}", value <= limit + room)

    def true(self, what: str, condition: bool) -> None:
        """Raise `Failure` unless `condition` holds."""
        if not condition:
            raise Failure(what)


@dataclass(frozen=True)
class Target:
    """One library on one device in one dtype."""

    backend: Backend = field(repr=False)
    device: str
    dtype: str
    made: list[tuple[Any, Array]] | None = field(default=None, repr=False, compare=False)
    """Arrays that `array` has made, with their values; None if nobody asks `check_unchanged`."""

    @property
    def name(self) -> str:
        """Return the name that ids and reports use, as ``torch-cpu-float32``."""
        return f"{self.backend.name}-{self.device}-{self.dtype}"

    @property
    def answer(self) -> str:
        """Return the name of the dtype of real results."""
        return REAL_ANSWERS[self.dtype]

    @property
    def eps(self) -> float:
        """Return the unit of rounding of real results."""
        return UNITS_IN_LAST_PLACE[self.answer]

    @property
    def kernel_eps(self) -> float:
        """Return the unit of rounding of the kernel itself."""
        return UNITS_IN_LAST_PLACE.get(self.dtype, self.eps)

    @property
    def is_complex(self) -> bool:
        """Return whether kernels are complex."""
        return self.dtype.startswith("complex")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` compiled, if the library has a compiler: without it such a library takes seconds."""
        return self.backend.jit(function) or function

    def array(self, values: Array, dtype: str | None = None) -> Any:
        """Return `values` as an array of the library, on the device, in `dtype` or else in the target's dtype."""
        dtype = dtype or self.dtype
        made = self.backend.asarray(values, dtype=dtype, device=self.device)
        exact = self.backend.to_numpy(made)
        eps = UNITS_IN_LAST_PLACE.get(dtype, UNITS_IN_LAST_PLACE[REAL_ANSWERS[dtype]])
        if exact.shape != values.shape or not np.all(np.abs(exact - values) <= eps * np.max(np.abs(values))):
            raise Failure(f"{self.backend.name}: asarray and to_numpy do not give back the values put in")
        if self.made is not None:
            self.made.append((made, np.array(exact)))
        return made

    def check_unchanged(self) -> None:
        """Raise `Failure` if one of the arrays that `array` has made was written to: they are the user's."""
        for array, values in self.made or ():
            if not np.array_equal(self.backend.to_numpy(array), values):
                raise Failure(f"the user's array of shape {values.shape} was written to")

    def kernel(self, case: Case) -> tuple[Any, Truth]:
        """Return the kernel of `case` as an array of the library, and the truth about its rounded values."""
        kernel = self.array(case.values(self.dtype))
        return kernel, case.truth(self.exact(kernel))

    def exact(self, array: Any) -> Array:
        """Return the values of an array of the library, in double precision on the host."""
        host = self.backend.to_numpy(array)
        return host.astype(np.complex128 if np.iscomplexobj(host) else np.float64)

    def fetch(self, what: str, result: Any, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        """Return the values of a result, after a check of its library, shape, dtype and device.

        The wanted dtype is `dtype`, or else the dtype of real results.
        """
        like = self.backend.asarray(np.zeros(1), dtype=dtype or self.answer, device=self.device)
        if not self.backend.owns_array(result) and not _alike(result, like):
            kind = type(result)
            raise Failure(
                f"{what}: a {kind.__module__}.{kind.__qualname__}, not an array of {self.backend.name}: "
                "its owns_array is False"
            )
        if tuple(result.shape) != shape:
            raise Failure(f"{what}: shape {tuple(result.shape)}, wanted {shape}")
        if result.dtype != like.dtype:
            raise Failure(f"{what}: dtype {result.dtype}, wanted {like.dtype}")
        there, wanted = _device(result), _device(like)
        if there != wanted:
            raise Failure(f"{what}: on {there}, wanted {wanted}")
        return self.exact(result)

    @property
    def complex_answer(self) -> str:
        """Return the name of the dtype of complex results."""
        return COMPLEX_ANSWERS[self.answer]


def _alike(result: Any, like: Any) -> bool:
    """Return whether two arrays have one namespace: NumPy's reductions give a scalar where others give an array."""
    both = array_api_compat.is_array_api_obj(result) and array_api_compat.is_array_api_obj(like)
    return both and array_api_compat.array_namespace(result) is array_api_compat.array_namespace(like)


def _device(array: Any) -> Any:
    """Return the device of an array; None where arrays of the library have no attribute for it."""
    try:
        return array_api_compat.device(array)
    except AttributeError:
        return None
