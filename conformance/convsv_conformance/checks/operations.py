"""Check each method of a backend alone, against NumPy, so that a failure names the method that is wrong.

These checks also have batches of many matrices, equal eigenvalues, odd and even lengths, and views of other arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from convsv_conformance.checks.arrays import dtype_of, made, random_values, table_eps
from convsv_conformance.checks.spectrum import VALUE_FACTOR
from convsv_conformance.checks.standard import standard
from convsv_conformance.dense import Array
from convsv_conformance.target import Ledger, Target
from convsv_core.backend import ArraySpec, BlockWork

__all__ = ["OPERATIONS", "Operation", "check"]

SHAPES = ((3, 4, 4), (2, 2, 3, 5), (2, 5, 2), (70, 3, 3), (1, 20, 24))
"""Shapes of matrices: square, wide with two batch axes, tall, a batch of many, and a larger one."""

HERMITIAN = ((2, 1, 1), (2, 20, 20), (70, 3, 3))
"""Shapes of Hermitian matrices: numbers, larger matrices, and a batch of many."""

INDEFINITE = 1000.0
"""Distance of the least eigenvalue from 0, in units of eps times the largest, at which a test must see its sign.

A guess: a factorisation of these small matrices has errors of some tens of such units.
"""

BLOCK_BYTES = 1 << 26
"""Working memory that a row is said to need, so that libraries with threads use them. Nothing of it is allocated."""


@dataclass(frozen=True)
class Operation:
    """A method of `Backend`, or several that belong together.

    Parameters
    ----------
    name : str
    check : callable
        Takes a target and a ledger, and raises where an answer is wrong.
    lazy : bool
        Whether a library of lazy arrays is asked too. Such a library computes blocks in another library.
    """

    name: str
    check: Callable[[Target, Ledger], None]
    lazy: bool = False


def check(target: Target, operation: Operation, ledger: Ledger) -> None:
    """Check the answers of one operation."""
    operation.check(target, ledger)


def _view(target: Target, values: Array) -> tuple[Any, Array]:
    """Return the same as `made`, with an array that is a transposed view of another array."""
    array, exact = made(target, np.ascontiguousarray(values.swapaxes(-1, -2)))
    return target.backend.namespace(array).matrix_transpose(array), exact.swapaxes(-1, -2)


def _matrices(target: Target) -> Iterator[tuple[str, Any, Array]]:
    """Yield a description, an array of the library and its values, for matrices of every kind."""
    for kind in ("real", "complex"):
        for shape in SHAPES:
            yield f"{kind} matrices of shape {shape}", *made(target, random_values(shape, kind))
        yield f"{kind} matrices in a transposed view", *_view(target, random_values(SHAPES[0], kind))
        yield (
            f"{kind} matrices of rank one",
            *made(target, random_values((3, 4, 1), kind) @ random_values((3, 1, 4), kind)),
        )
        yield f"{kind} matrices of zeros", *made(target, 0 * random_values(SHAPES[0], kind))


def _hermitian(target: Target) -> Iterator[tuple[str, Any, Array]]:
    for kind in ("real", "complex"):
        for shape in HERMITIAN:
            drawn = random_values(shape, kind)
            whole = drawn + drawn.conj().swapaxes(-1, -2)
            yield f"{kind} Hermitian matrices of shape {shape}", *made(target, whole)
        frame = np.linalg.qr(random_values((3, 4, 4), kind))[0]
        equal = (frame * np.asarray([3.0, 3.0, 1.0, 1.0])) @ frame.conj().swapaxes(-1, -2)
        yield f"{kind} Hermitian matrices with equal eigenvalues", *made(target, equal)
        yield f"{kind} identity matrices", *made(target, np.broadcast_to(np.eye(4) + 0 * frame, (3, 4, 4)).copy())
        yield f"{kind} Hermitian matrices of zeros", *made(target, 0 * frame)


def _adjoint(values: Array) -> Array:
    adjoint: Array = values.conj().swapaxes(-1, -2)
    return adjoint


def _largest(values: Array) -> float:
    return float(np.linalg.norm(values, 2, axis=(-2, -1)).max())


# ---- decompositions ------------------------------------------------------------------------------------


def _fourier(target: Target, ledger: Ledger) -> None:
    array, values = made(target, random_values((5, 4, 3, 2), "complex"))
    for axes in ((0,), (1,), (0, 1), (0, 1, 2)):
        for name, reference in (("fftn", np.fft.fftn), ("ifftn", np.fft.ifftn)):
            expected = reference(values, axes=axes)
            what = f"{name} over {axes}"
            got = target.fetch(what, getattr(target.backend, name)(array, axes), values.shape, target.complex_answer)
            ledger.close(what, got, expected, scale=float(np.abs(expected).max()), factor=VALUE_FACTOR)


def _svd(target: Target, ledger: Ledger) -> None:
    for what, array, values in _matrices(target):
        rows, columns = values.shape[-2:]
        side, outer = min(rows, columns), values.shape[:-2]
        u, s, vh = target.backend.svd(array)
        left = target.fetch(f"svd of {what}: U", u, (*outer, rows, side), dtype_of(target, values))
        middle = target.fetch(f"svd of {what}: S", s, (*outer, side))
        right = target.fetch(f"svd of {what}: Vh", vh, (*outer, side, columns), dtype_of(target, values))
        ledger.true(f"svd of {what}: S is not in descending order", bool(np.all(np.diff(middle, axis=-1) <= 0)))
        factor, unit = VALUE_FACTOR * side, np.broadcast_to(np.eye(side), (*outer, side, side))
        product = (left * middle[..., None, :]) @ right
        ledger.close(f"svd of {what}: U S Vh", product, values, scale=_largest(values), factor=factor)
        ledger.close(f"svd of {what}: U* U", _adjoint(left) @ left, unit, scale=1.0, factor=factor)
        ledger.close(f"svd of {what}: Vh Vh*", right @ _adjoint(right), unit, scale=1.0, factor=factor)


def _svdvals(target: Target, ledger: Ledger) -> None:
    for what, array, values in _matrices(target):
        expected = np.linalg.svd(values, compute_uv=False)
        got = target.fetch(f"svdvals of {what}", target.backend.svdvals(array), expected.shape)
        ledger.close(f"svdvals of {what}", got, expected, scale=_largest(values), factor=VALUE_FACTOR)


def _eigh(target: Target, ledger: Ledger) -> None:
    for what, array, values in _hermitian(target):
        side, expected = values.shape[-1], np.linalg.eigvalsh(values)
        squares, vectors = target.backend.eigh(array)
        got = target.fetch(f"eigh of {what}: values", squares, expected.shape)
        columns = target.fetch(f"eigh of {what}: vectors", vectors, values.shape, dtype_of(target, values))
        factor, unit = VALUE_FACTOR * side, np.broadcast_to(np.eye(side), values.shape)
        ledger.close(f"eigh of {what}: values", got, expected, scale=_largest(values), factor=VALUE_FACTOR)
        product = columns * got[..., None, :]
        ledger.close(f"eigh of {what}: A V = V w", values @ columns, product, scale=_largest(values), factor=factor)
        ledger.close(f"eigh of {what}: V* V", _adjoint(columns) @ columns, unit, scale=1.0, factor=factor)


def _eigvalsh(target: Target, ledger: Ledger) -> None:
    for what, array, values in _hermitian(target):
        expected = np.linalg.eigvalsh(values)
        got = target.fetch(f"eigvalsh of {what}", target.backend.eigvalsh(array), expected.shape)
        ledger.close(f"eigvalsh of {what}", got, expected, scale=_largest(values), factor=VALUE_FACTOR)


def _positive(target: Target, ledger: Ledger) -> None:
    for kind in ("real", "complex"):
        for shape in HERMITIAN:
            count, side = shape[0], shape[-1]
            least = INDEFINITE * side * target.eps * np.where(np.arange(count) % 3 == 1, -1.0, 1.0)
            spread = np.linspace(0.0, 1.0, side)[1:]
            eigenvalues = np.concatenate([least[:, None], np.broadcast_to(spread, (count, side - 1))], axis=1)
            frame = np.linalg.qr(random_values(shape, kind))[0]
            array, _ = made(target, (frame * eigenvalues[:, None, :]) @ _adjoint(frame))
            what = f"is_positive_definite of {kind} matrices of shape {shape}"
            got = target.fetch(what, target.backend.is_positive_definite(array), (count,), "bool")
            wrong = np.flatnonzero(got != (least > 0))
            ledger.true(f"{what}: wrong at {wrong[:5].tolist()} of {count}", not len(wrong))


# ---- numbers and places --------------------------------------------------------------------------------


def _conjugates(target: Target, ledger: Ledger) -> None:
    for kind in ("real", "complex"):
        array, values = made(target, random_values((2, 3, 3, 4), kind))
        for what, result, expected in (
            ("conj", target.backend.conj(array), values.conj()),
            ("adjoint", target.backend.adjoint(array), _adjoint(values)),
        ):
            got = target.fetch(f"{what} of {kind} arrays", result, expected.shape, dtype_of(target, values))
            ledger.true(f"{what} of {kind} arrays is wrong", bool(np.all(got == expected)))


def _complex(target: Target, ledger: Ledger) -> None:
    (one, real), (other, imaginary) = (
        made(target, random_values((3, 2), "real")),
        made(target, random_values((2, 3), "real").T),
    )
    got = target.fetch("complex", target.backend.complex(one, other), real.shape, target.complex_answer)
    ledger.true("complex does not have the parts that it was given", bool(np.all(got == real + 1j * imaginary)))


def _places(target: Target, ledger: Ledger) -> None:
    array, values = made(target, random_values((4, 5, 3), "complex"))
    for axis, places in ((0, [3, 0, 0]), (1, [4, 1, 1, 2, 0, 3]), (2, [2, 0])):
        expected = np.take(values, places, axis=axis)
        what = f"take of the places {places} along axis {axis}"
        got = target.fetch(
            what, target.backend.take(array, np.asarray(places), axis), expected.shape, target.complex_answer
        )
        ledger.true(f"{what} is wrong", bool(np.all(got == expected)))
    view = target.backend.namespace(array).permute_dims(array, (2, 0, 1))
    for name in ("contiguous", "in_one_piece"):
        got = target.fetch(name, getattr(target.backend, name)(view), (3, 4, 5), target.complex_answer)
        ledger.true(f"{name} changes the values", bool(np.all(got == values.transpose(2, 0, 1))))


def _tables(target: Target, ledger: Ledger) -> None:
    like, _ = made(target, np.zeros((2, 3)))
    for table in (np.linspace(0.1, 7.0, 9), np.arange(12).reshape(3, 4), np.asarray([True, False])):
        host = np.asarray(target.backend.to_numpy(target.backend.asarray_like(table, like)))
        what = f"asarray_like of a table of {table.dtype}"
        ledger.true(f"{what}: shape {host.shape}, dtype {host.dtype}", host.shape == table.shape)
        ledger.true(f"{what}: dtype {host.dtype}, wanted {table.dtype}", host.dtype.kind == table.dtype.kind)
        off = np.abs(host.astype(float) - table.astype(float))
        ledger.true(f"{what}: off by {off.max()}", bool(np.all(off <= table_eps(target) * np.abs(table))))


# ---- control -------------------------------------------------------------------------------------------


def _scaled_and_summed(block: Any, scale: Any = 2.0) -> tuple[Any, Any]:
    return scale * block, block[:, 0] + block[:, 1]


def _prepare(kernel: Any, other: Any, factor: int) -> BlockWork:
    scale = factor * kernel[0, 0] + other[1]
    return BlockWork(functools.partial(_scaled_and_summed, scale=scale), BLOCK_BYTES)


def _blocks(target: Target, ledger: Ledger) -> None:
    """Check that blocks keep the order of the rows, with a budget for one, for a few and for all rows."""
    (like, _), (other, _) = made(target, np.full((2, 2), 3.0)), made(target, np.asarray([5.0, -4.0]))
    rows = np.stack([np.arange(11) / 3, np.arange(11) ** 2 + 0.1], axis=1)

    def agree(what: str, result: Any, wanted: Array) -> None:
        host = np.asarray(target.backend.to_numpy(result))
        off = 4 * table_eps(target) * np.abs(wanted).max()
        same = host.shape == wanted.shape and bool(np.all(np.abs(host - wanted) <= off))
        ledger.true(f"{what}: {host.tolist()}, wanted {wanted.tolist()}", same)

    for at_once in (1, 3, 20):
        room = f"with room for {at_once} rows"
        found = [
            ("map_prepared", target.backend.map_prepared(_prepare, rows, (like, other), (2,), at_once * BLOCK_BYTES))
        ]
        if not target.backend.lazy:
            run = functools.partial(target.backend.map_blocks, row_bytes=BLOCK_BYTES, budget=at_once * BLOCK_BYTES)
            found.append(("map_blocks", run(_scaled_and_summed, rows, like)))
            agree(f"map_blocks of one result, {room}", run(lambda block: 2 * block, rows, like), 2 * rows)
            sums = run(lambda block: target.backend.namespace(block).sum(block, axis=0, keepdims=True), rows, like)
            total = target.backend.namespace(sums).sum(sums, axis=0)
            agree(f"map_blocks of a sum, {room}", total, rows.sum(axis=0))
        for name, results in found:
            what = f"{name} of two results, {room}"
            ledger.true(f"{what}: {type(results).__name__}, wanted a tuple of 2", len(results) == 2)
            for got, wanted in zip(results, (2 * rows, rows.sum(axis=1)), strict=True):
                agree(what, got, wanted)


def _groups(target: Target, ledger: Ledger) -> None:
    like, _ = made(target, np.ones((2, 2)))
    groups = ((1, 2, 3, 4, 5), (6,), (7, 8))
    for cost in (1.0, 1e9):
        found = target.backend.map_groups(lambda group: [10 * one for one in group], groups, (cost,) * 3, like)
        wanted = [[10 * one for one in group] for group in groups]
        ledger.true(f"map_groups: {found}, wanted {wanted}", [list(group) for group in found] == wanted)


def _joined(target: Target, ledger: Ledger) -> None:
    parts = [made(target, random_values((count, 2, 2), "complex")) for count in (2, 1, 3)]
    expected = np.concatenate([values for _, values in parts])
    arrays = [array for array, _ in parts]
    pairs = target.backend.concatenate([(array, 2 * array) for array in arrays])
    for what, result, wanted in (
        ("arrays", target.backend.concatenate(arrays), expected),
        ("tuples, first", pairs[0], expected),
        ("tuples, second", pairs[1], 2 * expected),
    ):
        got = target.fetch(f"concatenate of {what}", result, wanted.shape, target.complex_answer)
        ledger.true(f"concatenate of {what} is wrong", bool(np.all(got == wanted)))


def _repeated(target: Target, ledger: Ledger) -> None:
    state, values = made(target, np.asarray([[1.0, 2.0], [3.0, 5.0]]))
    for count in (0, 1, 7):
        found = target.backend.repeat(lambda one, other: (other, one + other), (state, 2 * state), count, state)
        one, other = values, 2 * values
        for _ in range(count):
            one, other = other, one + other
        for got, wanted in zip(found, (one, other), strict=True):
            host = target.fetch(f"repeat, {count} times", got, wanted.shape)
            ledger.true(
                f"repeat, {count} times: {host.tolist()}, wanted {wanted.tolist()}", np.array_equal(host, wanted)
            )


def _scaled(array: Any, factor: int) -> Any:
    return factor * array


def _called(target: Target, ledger: Ledger) -> None:
    """Check that `run` and `call_host` keep no answer of other values, or of other static arguments."""
    for values in (random_values((2, 3), "real"), 2 * random_values((2, 3), "real")):
        array, exact = made(target, values)
        for factor in (2, 3):
            got = target.fetch("run", target.backend.run(_scaled, (array,), (factor,)), exact.shape)
            scale = float(np.abs(factor * exact).max())
            ledger.close("run", got, factor * exact, scale=scale, factor=VALUE_FACTOR)
        (total,) = target.backend.call_host(
            lambda host: (np.sum(np.asarray(host) ** 2, dtype=host.dtype),),
            (array,),
            (ArraySpec((), target.answer),),
            lambda one: (target.backend.namespace(one).sum(one * one),),
        )
        got = target.fetch("call_host", total, ())
        ledger.close("call_host", got, np.sum(exact**2), scale=float(np.sum(exact**2)), factor=VALUE_FACTOR)
    for count in (1, 2, 3, 17, 64, 65, 200):
        size = target.backend.batch_size(count)
        ledger.true(
            f"batch_size({count}) = {size!r}, wanted an int of at least {count}", type(size) is int and size >= count
        )


def _contexts(target: Target, ledger: Ledger) -> None:
    """Check that context managers can be entered twice, and let exceptions pass."""
    array, _ = made(target, np.ones((2, 2)))
    contexts: tuple[tuple[str, Callable[[], AbstractContextManager[object]]], ...] = (
        ("computation_context", lambda: target.backend.computation_context(array)),
        ("products_context", lambda: target.backend.products_context(4)),
        ("single_threaded", target.backend.single_threaded),
    )
    for name, make in contexts:
        passed = False
        try:
            with make(), make():
                raise KeyError
        except KeyError:
            passed = True
        ledger.true(f"{name} swallows exceptions", passed)


def _conditions(target: Target, ledger: Ledger) -> None:
    array, _ = made(target, np.asarray([1.0, 2.0]))
    ledger.true("owns_array is False for an array of the library", target.backend.owns_array(array))
    ledger.true("owns_array is True for a list", not target.backend.owns_array([1.0]))
    for condition, wanted in ((array[0] < array[1], True), (array[0] > array[1], False)):
        got = target.backend.truth(condition)
        allowed = (None,) if target.backend.lazy else (None, wanted)
        ledger.true(f"truth of a condition that is {wanted}: {got!r}, wanted one of {allowed}", got in allowed)
    readable = target.backend.has_values(array)
    ledger.true(f"has_values: {readable!r} of a lazy array", not (target.backend.lazy and readable))


def _derivatives(target: Target, ledger: Ledger) -> None:
    array, values = made(target, np.asarray([1.0, 2.0, -0.5]))
    got = target.fetch("stop_gradient", target.backend.stop_gradient(array), values.shape)
    ledger.true("stop_gradient changes the values", bool(np.all(got == values)))
    for what, function, expected in (
        ("grad of a sum of cubes", lambda x, xp: xp.sum(x * x * x), 3 * values**2),
        ("grad of x * stop_gradient(x)", lambda x, xp: xp.sum(x * target.backend.stop_gradient(x)), values),
    ):
        gradient = target.backend.grad(lambda x, f=function: f(x, target.backend.namespace(x)))
        if gradient is not None:
            found = target.fetch(what, gradient(array), values.shape)
            ledger.close(what, found, expected, scale=float(np.abs(expected).max()), factor=VALUE_FACTOR)


OPERATIONS = (
    Operation("conditions", _conditions, lazy=True),
    Operation("conj-and-adjoint", _conjugates, lazy=True),
    Operation("complex", _complex),
    Operation("take-and-contiguous", _places, lazy=True),
    Operation("asarray_like", _tables, lazy=True),
    Operation("fftn", _fourier),
    Operation("svd", _svd),
    Operation("svdvals", _svdvals),
    Operation("eigh", _eigh),
    Operation("eigvalsh", _eigvalsh),
    Operation("is_positive_definite", _positive),
    Operation("map_blocks", _blocks, lazy=True),
    Operation("map_groups", _groups),
    Operation("concatenate", _joined, lazy=True),
    Operation("repeat", _repeated),
    Operation("run-and-call_host", _called, lazy=True),
    Operation("contexts", _contexts, lazy=True),
    Operation("stop_gradient-and-grad", _derivatives, lazy=True),
    Operation("array-api", standard),
)
"""The methods of `Backend` that are checked alone."""
