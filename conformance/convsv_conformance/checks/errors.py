"""Check that bad input gives the right exception, with a message that says what was passed and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import convsv_core as convsv
from convsv_conformance.target import Ledger, Target

__all__ = ["MISTAKES", "Mistake", "mistakes"]

Arrays = Callable[..., Any]
"""A function from a shape, and optionally a last entry and a dtype, to an array of the library."""


@dataclass(frozen=True)
class Mistake:
    """A wrong call.

    Parameters
    ----------
    name : str
    call : callable
        Makes the wrong call. Its argument is a function that makes arrays of the library, see `Arrays`.
    error : type of exception
        The exception that the call must raise.
    words : tuple of str
        Words that the message must contain.
    of_values : bool
        Whether the mistake lies in the kernel's values. A lazy library cannot see it, and must return NaN.
    """

    name: str
    call: Callable[[Arrays], object]
    error: type[Exception]
    words: tuple[str, ...]
    of_values: bool = False


_CONV = convsv.Conv("OIHW")
_TEXT: Any = "OIHW"
_PUBLIC = {
    "singular_values": convsv.singular_values,
    "frequency_singular_values": convsv.frequency_singular_values,
    "symbol": convsv.symbol,
    "svd": convsv.svd,
    "operator_norm": convsv.operator_norm,
    "frobenius_norm": convsv.frobenius_norm,
    "stable_rank": convsv.stable_rank,
    "condition_number": convsv.condition_number,
    "log_abs_det": convsv.log_abs_det,
    "clip": lambda kernel, shape, conv: convsv.clip(kernel, shape, conv, 1.0),
    "project": lambda kernel, shape, conv: convsv.project(kernel, shape, conv, 1.0),
}


def _values(shape: tuple[int, ...], input_shape: Any, conv: Any = _CONV, **options: Any) -> Callable[[Arrays], object]:
    return lambda make: convsv.singular_values(make(shape), input_shape, conv, **options)


def _project(bound: Any = 1.0, **options: Any) -> Callable[[Arrays], object]:
    return lambda make: convsv.project(make((2, 2, 3, 3)), (4, 4), _CONV, bound, **options)


def _every_size(public: str, function: Any) -> Mistake:
    return Mistake(
        f"no-extents-{public}",
        lambda make: function(make((2, 2, 3, 3)), None, _CONV),
        TypeError,
        ("input_shape=None", "(32, 32)", "norm_bounds"),
    )


def _of_all(name: str, make_arguments: Callable[[Arrays], tuple[Any, ...]], *rest: Any) -> tuple[Mistake, ...]:
    """Return one mistake as a call of each public function."""

    def call(function: Any) -> Callable[[Arrays], object]:
        return lambda make: function(*make_arguments(make))

    return tuple(Mistake(f"{name}-{public}", call(function), *rest) for public, function in _PUBLIC.items())


MISTAKES = (
    *_of_all("nan", lambda make: (make((2, 2, 3, 3), math.nan), (4, 4), _CONV), ValueError, ("kernel", "NaN"), True),
    *_of_all("list", lambda make: ([[[[1.0]]]], (4, 4), _CONV), TypeError, ("kernel", "list", "numpy.asarray")),
    *_of_all("rank", lambda make: (make((2, 2, 3)), (4, 4), _CONV), ValueError, ("(2, 2, 3)", "'OIHW'", "layout")),
    Mistake(
        "infinity",
        lambda make: convsv.operator_norm(make((2, 2, 3, 3), math.inf), (4, 4), _CONV),
        ValueError,
        ("kernel", "infinity"),
        of_values=True,
    ),
    Mistake(
        "integers",
        lambda make: convsv.operator_norm(make((2, 2, 3, 3), dtype="int32"), (4, 4), _CONV),
        TypeError,
        ("kernel", "int32", "float32"),
    ),
    Mistake(
        "booleans",
        lambda make: convsv.operator_norm(make((2, 2, 3, 3), dtype="bool"), (4, 4), _CONV),
        TypeError,
        ("kernel", "bool", "float32"),
    ),
    Mistake("number", lambda make: convsv.operator_norm(1.0, (4, 4), _CONV), TypeError, ("kernel", "float")),
    Mistake(
        "layout-for-conv",
        lambda make: convsv.operator_norm(make((2, 2, 3, 3)), (4, 4), _TEXT),
        TypeError,
        ("conv", "'OIHW'", "Conv"),
    ),
    Mistake(
        "groups",
        _values((3, 2, 3, 3), (4, 4), convsv.Conv("OIHW", groups=2)),
        ValueError,
        ("groups=2", "3", "(3, 2, 3, 3)"),
    ),
    Mistake(
        "groups-transposed",
        _values((3, 2, 3, 3), (4, 4), convsv.Conv("IOHW", groups=2, transposed=True)),
        ValueError,
        ("groups=2", "3"),
    ),
    Mistake("no-channels", _values((0, 2, 3, 3), (4, 4)), ValueError, ("kernel", "0")),
    Mistake("no-taps", _values((2, 2, 0, 3), (4, 4)), ValueError, ("kernel", "0")),
    Mistake("stride", _values((2, 2, 3, 3), (4, 5), convsv.Conv("OIHW", stride=2)), ValueError, ("stride", "2", "5")),
    Mistake("empty-input", _values((2, 2, 3, 3), (4, 0)), ValueError, ("input_shape", "0")),
    Mistake("negative-input", _values((2, 2, 3, 3), (-4, 4)), ValueError, ("input_shape", "-4")),
    Mistake("float-input", _values((2, 2, 3, 3), (4.0, 4.0)), TypeError, ("input_shape", "4.0", "integer")),
    Mistake(
        "channels-in-input",
        _values((2, 2, 3, 3), (2, 4, 4)),
        ValueError,
        ("input_shape", "(2, 4, 4)", "without the channels"),
    ),
    *(_every_size(public, function) for public, function in _PUBLIC.items() if public != "project"),
    _every_size("nearest_orthogonal", convsv.nearest_orthogonal),
    _every_size("schatten", lambda kernel, shape, conv: convsv.penalties.schatten(kernel, shape, conv, 2)),
    Mistake("method", _values((2, 2, 3, 3), (4, 4), method="qr"), ValueError, ("method", "'qr'", "gram")),
    Mistake(
        "valid",
        _values((2, 2, 3, 3), (4, 4), convsv.Conv("OIHW", padding="valid")),
        NotImplementedError,
        ("padding", "'valid'", "circular"),
    ),
    Mistake(
        "half-of-even",
        _values((2, 2, 4, 4), (4, 4), convsv.Conv("OIHW", padding=2)),
        NotImplementedError,
        ("padding", "5 outputs", "same"),
    ),
    *(
        Mistake(
            f"mode-{mode}",
            _values((2, 2, 3, 3), (4, 4), convsv.Conv("OIHW", padding_mode=mode)),
            NotImplementedError,
            ("padding_mode", f"'{mode}'", "circular"),
        )
        for mode in ("zeros", "reflect", "replicate")
    ),
    Mistake(
        "negative-bound",
        lambda make: convsv.clip(make((2, 2, 3, 3)), (4, 4), _CONV, -1.0),
        ValueError,
        ("bound", "-1.0"),
    ),
    Mistake(
        "nan-bound", lambda make: convsv.clip(make((2, 2, 3, 3)), (4, 4), _CONV, math.nan), ValueError, ("bound", "nan")
    ),
    Mistake(
        "text-bound", lambda make: convsv.clip(make((2, 2, 3, 3)), (4, 4), _CONV, "1"), TypeError, ("bound", "'1'")
    ),
    Mistake(
        "lower",
        lambda make: convsv.clip(make((2, 2, 3, 3)), (4, 4), _CONV, 1.0, lower=2.0),
        ValueError,
        ("lower=2.0", "bound=1.0"),
    ),
    Mistake(
        "negative-lower",
        lambda make: convsv.clip(make((2, 2, 3, 3)), (4, 4), _CONV, 1.0, lower=-2.0),
        ValueError,
        ("lower", "-2.0"),
    ),
    Mistake("project-negative-bound", _project(-1.0), ValueError, ("bound", "-1.0")),
    Mistake("project-nan-bound", _project(math.nan), ValueError, ("bound", "nan")),
    Mistake("project-list-bound", _project([1.0]), TypeError, ("bound", "[1.0]")),
    Mistake("project-method", _project(method="admm"), ValueError, ("method", "'admm'", "dykstra")),
    Mistake("project-rtol", _project(rtol=0.0), ValueError, ("rtol", "0.0", "positive")),
    Mistake("project-no-iterations", _project(max_iterations=0), ValueError, ("max_iterations", "0")),
    Mistake("project-no-steps", _project(steps=0), ValueError, ("steps", "0")),
    Mistake(
        "project-zeros",
        lambda make: convsv.project(make((2, 2, 3, 3)), (4, 4), convsv.Conv("OIHW", padding_mode="zeros"), 1.0),
        NotImplementedError,
        ("padding_mode", "'zeros'", "input_shape=None"),
    ),
    Mistake(
        "project-reflect",
        lambda make: convsv.project(make((2, 2, 3, 3)), None, convsv.Conv("OIHW", padding_mode="reflect"), 1.0),
        NotImplementedError,
        ("padding_mode", "'reflect'"),
    ),
    Mistake(
        "determinant",
        lambda make: convsv.log_abs_det(make((3, 2, 3, 3)), (4, 4), _CONV),
        ValueError,
        ("not square", "(3, 2, 3, 3)"),
    ),
    Mistake(
        "vector-beyond",
        lambda make: convsv.svd(make((2, 2, 3, 3)), (4, 4), _CONV).singular_vectors(32),
        IndexError,
        ("index=32", "32 singular values"),
    ),
)


def mistakes(target: Target, mistake: Mistake, ledger: Ledger) -> None:
    """Check the exception's type and message; a lazy library must return NaN for a mistake in the values."""

    def make(shape: tuple[int, ...], last: float = 1.0, dtype: str | None = None) -> Any:
        values = np.ones(shape)
        if values.size:
            values[(-1,) * values.ndim] = last
        return target.backend.asarray(values, dtype=dtype or target.dtype, device=target.device)

    try:
        result: Any = mistake.call(make)
    except mistake.error as error:
        message = str(error)
        missing = [word for word in mistake.words if word.lower() not in message.lower()]
        ledger.true(f"the message {message!r} does not say {missing}", not missing)
    except Exception as error:
        ledger.true(f"{type(error).__name__}: {error}, wanted {mistake.error.__name__}", False)
    else:
        if target.backend.lazy and mistake.of_values:
            for part in result if isinstance(result, tuple | convsv.SVD) else (result,):
                ledger.true(f"{mistake.name}: a number is finite", not np.isfinite(target.exact(part)).any())
            return
        ledger.true(f"no error but {result!r}, wanted {mistake.error.__name__}", False)
