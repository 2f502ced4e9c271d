"""Name the dtypes of kernels, of the arithmetic, and of results.

A dtype has the same name in every library, such as "float32", but is a different object in each.
"""

from __future__ import annotations

from typing import Any

__all__ = ["COMPLEX_OF", "DTYPES", "REAL_OF", "answer_dtype", "dtype_name"]

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
"""Names of the dtypes that a kernel may have."""

COMPLEX_OF = {"float32": "complex64", "float64": "complex128"}
"""The complex dtype of the same precision, by the name of the real dtype."""

REAL_OF = {"complex64": "float32", "complex128": "float64"}
"""The real dtype of the same precision, by the name of the complex dtype."""

ANSWERED_IN = {"float16": "float32", "bfloat16": "float32"}
"""Dtypes of kernels that are too narrow to compute with, and the dtype that is used instead."""


def dtype_name(dtype: Any) -> str:
    """Return the name of an array's dtype, of any library, such as "float32"."""
    name: str = getattr(dtype, "name", "") or str(dtype).rpartition(".")[2]
    return name


def answer_dtype(kernel: Any) -> str:
    """Return the name of the dtype of a kernel's results: its own, or float32 for 16 bits.

    Real results of a complex kernel have the real dtype in `REAL_OF`. A TypeError is raised for integers and for
    every dtype that is not in `DTYPES`.
    """
    name = dtype_name(kernel.dtype)
    answered = ANSWERED_IN.get(name, name)
    if answered not in COMPLEX_OF and answered not in REAL_OF:
        raise TypeError(
            f"kernel has dtype {name}: wanted one of {', '.join((*ANSWERED_IN, *COMPLEX_OF, *REAL_OF))}; "
            f"convert it first, for integers to a floating-point dtype with the scale that they stand for"
        )
    return answered
