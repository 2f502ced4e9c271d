"""Make arrays of a library from random values, for checks of single operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from convsv_conformance.dense import Array
from convsv_conformance.target import Target

__all__ = ["dtype_of", "made", "random_values", "table_eps"]


def dtype_of(target: Target, values: Array) -> str:
    """Return the name of the dtype of answers that are real or complex like `values`."""
    return target.complex_answer if np.iscomplexobj(values) else target.answer


def made(target: Target, values: Array) -> tuple[Any, Array]:
    """Return `values` as an array of the library, and the values after rounding to its dtype."""
    array = target.array(values, dtype_of(target, values))
    return array, target.exact(array)


def random_values(shape: tuple[int, ...], kind: str) -> Array:
    """Return normally distributed numbers, "real" or "complex", which depend on the shape alone."""
    rng = np.random.default_rng(len(shape) + sum(shape))
    values: Array = rng.standard_normal(shape)
    return values + 1j * rng.standard_normal(shape) if kind == "complex" else values


def table_eps(target: Target) -> float:
    """Return the eps of a table from the host. It is that of float32 without float64, as in JAX."""
    return float(np.finfo(np.float64 if "float64" in target.backend.dtypes(target.device) else np.float32).eps)
