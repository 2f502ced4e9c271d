"""Check the functions of the array API standard that the core calls, each against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from convsv_conformance.checks.arrays import dtype_of, made, random_values
from convsv_conformance.checks.spectrum import VALUE_FACTOR
from convsv_conformance.dense import Array
from convsv_conformance.target import Failure, Ledger, Target

__all__ = ["STANDARD", "standard"]

_Call = Callable[[Any, Any], Any]


def _orthonormal(xp: Any, x: Any) -> Any:
    q = xp.linalg.qr(x)[0]
    return xp.matmul(
        xp.conj(xp.matrix_transpose(q)) if xp.isdtype(q.dtype, "complex floating") else xp.matrix_transpose(q), q
    )


STANDARD: tuple[tuple[str, str, _Call, Callable[[Array], Any]], ...] = (
    ("abs", "rc", lambda xp, x: xp.abs(x), np.abs),
    ("all", "b", lambda xp, x: xp.all(x, axis=0), lambda x: x.all(axis=0)),
    ("any", "b", lambda xp, x: xp.any(x, axis=0), lambda x: x.any(axis=0)),
    ("argmax", "r", lambda xp, x: xp.argmax(x, axis=-1), lambda x: x.argmax(axis=-1)),
    ("argsort", "r", lambda xp, x: xp.argsort(x, axis=-1), lambda x: x.argsort(axis=-1)),
    ("broadcast_to", "rc", lambda xp, x: xp.broadcast_to(x, (2, *x.shape)), lambda x: np.stack([x, x])),
    ("clip", "r", lambda xp, x: xp.clip(x, 0.0, 1.0), lambda x: x.clip(0.0, 1.0)),
    ("concat", "rc", lambda xp, x: xp.concat((x, x), axis=1), lambda x: np.concatenate([x, x], axis=1)),
    ("cumulative_sum", "r", lambda xp, x: xp.cumulative_sum(x, axis=-1), lambda x: x.cumsum(axis=-1)),
    ("flip", "rc", lambda xp, x: xp.flip(x, axis=1), lambda x: x[:, ::-1]),
    ("floor", "r", lambda xp, x: xp.floor(x), np.floor),
    ("imag", "c", lambda xp, x: xp.imag(x), np.imag),
    ("isfinite", "n", lambda xp, x: xp.isfinite(x), np.isfinite),
    ("isnan", "n", lambda xp, x: xp.isnan(x), np.isnan),
    ("linalg.qr", "rc", lambda xp, x: xp.matmul(*xp.linalg.qr(x)), lambda x: x),
    ("linalg.qr, Q* Q", "rc", _orthonormal, lambda x: np.broadcast_to(np.eye(3) + 0 * x[:1], x.shape)),
    ("linalg.trace", "rc", lambda xp, x: xp.linalg.trace(x), lambda x: x.trace(axis1=-2, axis2=-1)),
    ("linalg.vector_norm", "rc", lambda xp, x: xp.linalg.vector_norm(x, axis=-1), lambda x: np.linalg.norm(x, axis=-1)),
    ("log", "p", lambda xp, x: xp.log(x), np.log),
    ("log2", "p", lambda xp, x: xp.log2(x), np.log2),
    ("matmul", "rc", lambda xp, x: xp.matmul(x, xp.matrix_transpose(x)), lambda x: x @ x.swapaxes(-1, -2)),
    (
        "matmul with long rows",
        "l",
        lambda xp, x: xp.matmul(x, xp.matrix_transpose(x)),
        lambda x: x @ x.swapaxes(-1, -2),
    ),
    ("matmul of broadcast stacks", "rc", lambda xp, x: xp.matmul(x[0, ...], x), lambda x: x[0] @ x),
    ("max", "r", lambda xp, x: xp.max(x, axis=1), lambda x: x.max(axis=1)),
    ("max of an array with NaN", "m", lambda xp, x: xp.isnan(xp.max(x)), lambda x: np.isnan(x.max())),
    ("maximum with NaN", "m", lambda xp, x: xp.isnan(xp.maximum(x, xp.ones_like(x))), np.isnan),
    ("maximum", "r", lambda xp, x: xp.maximum(x, xp.zeros_like(x)), lambda x: np.maximum(x, 0)),
    ("min", "r", lambda xp, x: xp.min(x, axis=1), lambda x: x.min(axis=1)),
    ("min of an array with NaN", "m", lambda xp, x: xp.isnan(xp.min(x)), lambda x: np.isnan(x.min())),
    ("minimum", "r", lambda xp, x: xp.minimum(x, xp.ones_like(x)), lambda x: np.minimum(x, 1)),
    ("minimum with NaN", "m", lambda xp, x: xp.isnan(xp.minimum(x, xp.ones_like(x))), np.isnan),
    ("moveaxis", "rc", lambda xp, x: xp.moveaxis(x, 0, -1), lambda x: np.moveaxis(x, 0, -1)),
    ("permute_dims", "rc", lambda xp, x: xp.permute_dims(x, (2, 0, 1)), lambda x: x.transpose(2, 0, 1)),
    ("pow", "p", lambda xp, x: x**1.5, lambda x: x**1.5),
    ("real", "rc", lambda xp, x: xp.real(x), np.real),
    ("repeat", "r", lambda xp, x: xp.repeat(x, 2, axis=1), lambda x: x.repeat(2, axis=1)),
    (
        "reshape",
        "rc",
        lambda xp, x: xp.reshape(xp.matrix_transpose(x), (-1,)),
        lambda x: x.swapaxes(-1, -2).reshape(-1),
    ),
    ("sort", "r", lambda xp, x: xp.sort(x, axis=-1), lambda x: np.sort(x, axis=-1)),
    ("sort, descending", "r", lambda xp, x: xp.sort(x, descending=True), lambda x: np.sort(x, axis=-1)[..., ::-1]),
    ("sqrt", "p", lambda xp, x: xp.sqrt(x), np.sqrt),
    ("stack", "rc", lambda xp, x: xp.stack([x, 2 * x], axis=-1), lambda x: np.stack([x, 2 * x], axis=-1)),
    ("sum", "rc", lambda xp, x: xp.sum(x, axis=(0, 1)), lambda x: x.sum(axis=(0, 1))),
    ("tensordot", "r", lambda xp, x: xp.tensordot(x, x, axes=((1,), (1,))), lambda x: np.tensordot(x, x, ((1,), (1,)))),
    ("tril", "rc", lambda xp, x: xp.tril(x, k=-1), lambda x: np.tril(x, -1)),
    ("where", "r", lambda xp, x: xp.where(x > 0, x, xp.zeros_like(x)), lambda x: np.where(x > 0, x, 0)),
)
"""Functions of the standard that the core calls: a name, the kinds of operands, the call, and NumPy's answer.

The kinds are real, complex, positive, boolean, long, not finite in one entry or part, and with one NaN.
"""


def _operands(target: Target) -> dict[str, tuple[Any, Array]]:
    real, complex_ = random_values((70, 3, 3), "real"), random_values((70, 3, 3), "complex")
    special: Array = np.ones(6, complex)
    special.real[1], special.real[2], special.imag[3], special.imag[4] = np.nan, np.inf, np.nan, np.inf
    missing = np.asarray([1.0, np.nan, 2.0])
    arrays = {"r": made(target, real), "c": made(target, complex_), "p": made(target, np.abs(real) + 0.5)}
    arrays["l"] = made(target, random_values((2, 3, 130), "real"))
    for kind, values in (("n", special), ("m", missing)):
        array = target.backend.asarray(values, dtype=dtype_of(target, values), device=target.device)
        arrays[kind] = (array, values)
    array, values = arrays["r"]
    arrays["b"] = (array > 0, values > 0)
    return arrays


def standard(target: Target, ledger: Ledger) -> None:
    """Check functions of the namespace against NumPy's, with names of those that differ."""
    operands = _operands(target)
    xp = target.backend.namespace(operands["r"][0])
    for name, kinds, call, reference in STANDARD:
        for kind in kinds:
            array, values = operands[kind]
            what = f"{xp.__name__}.{name} of {'complex' if np.iscomplexobj(values) else values.dtype} entries"
            expected = np.asarray(reference(values))
            try:
                host = np.asarray(target.backend.to_numpy(call(xp, array)))
            except Exception as error:  # A library may raise anything where a function is missing.
                raise Failure(f"{what}: {type(error).__name__}: {error}") from error
            if expected.dtype.kind in "bi":
                ledger.true(f"{what} is wrong", host.shape == expected.shape and bool(np.all(host == expected)))
                continue
            dtype = np.dtype(dtype_of(target, expected))
            ledger.true(f"{what}: dtype {host.dtype}, wanted {dtype}", host.dtype == dtype)
            scale = float(np.abs(expected).max()) + float(np.abs(values).max())
            ledger.close(what, host, expected, scale=scale, factor=VALUE_FACTOR)
