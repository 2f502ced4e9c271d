"""Wrong backends are caught by the checks of single operations, which name the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from convsv_conformance.checks.operations import OPERATIONS
from convsv_conformance.suite import Item, select
from convsv_conformance.target import Failure, Target

from convsv_core.plugins import get_backend, plugins


def _many(array: Any) -> bool:
    """Tell whether a batch has more than 64 matrices."""
    return int(np.prod(array.shape[:-2])) > 64


def _single(array: Any) -> Any:
    return array.astype("complex64" if array.dtype.kind == "c" else "float32").astype(array.dtype)


def _tied(values: Any, vectors: Any) -> tuple[Any, Any]:
    """Return eigenvectors of equal eigenvalues that are not orthogonal."""
    vectors = vectors.copy()
    same = np.isclose(values[..., 3], values[..., 2]) if values.shape[-1] == 4 else np.zeros(values.shape[:-1], bool)
    if same.any():
        vectors[same, :, 3] = (vectors[same, :, 3] + vectors[same, :, 2]) / np.sqrt(2)
    return values, vectors


def _emptied(result: Any, array: Any) -> Any:
    if array.flags.writeable:
        array[...] = 0
    return result


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "one axis of several": ("fftn", lambda right, a, axes: right(a, axes[:1])),
    "lengths that are odd": ("ifftn", lambda right, a, axes: right(a, axes) * (1.01 if a.shape[axes[-1]] % 2 else 1)),
    "double for single": ("fftn", lambda right, a, axes: right(a, axes).astype(complex)),
    "no conjugate": ("adjoint", lambda right, a: a.swapaxes(-1, -2)),
    "many matrices": ("svdvals", lambda right, a: right(a) * np.asarray(1.01 if _many(a) else 1, a.real.dtype)),
    "single precision": ("eigvalsh", lambda right, a: _single(right(a))),
    "equal eigenvalues": ("eigh", lambda right, a: _tied(*right(a))),
    "an argument overwritten": ("eigvalsh", lambda right, a: _emptied(right(a), a)),
    "views": ("svdvals", lambda right, a: right(a) * np.asarray(1 if a.flags.c_contiguous else 1.01, a.real.dtype)),
    "everything is positive": ("is_positive_definite", lambda right, a: np.ones(a.shape[:-2], bool)),
    "one repetition less": ("repeat", lambda right, f, state, count, like: right(f, state, max(count - 1, 0), like)),
    "members in another order": (
        "map_groups",
        lambda right, f, g, c, like: [one[::-1] for one in right(f, g, c, like)],
    ),
    "blocks in another order": ("concatenate", lambda right, results: right(results[::-1])),
    "an array that is left out": (
        "map_prepared",
        lambda right, f, rows, arrays, *rest: right(f, rows, (arrays[0], *(0 * a for a in arrays[1:])), *rest),
    ),
    "a table in single precision": ("asarray_like", lambda right, a, like: right(_single(a), like)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_method_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    method, wrong = WRONG[name]
    right_class = type(get_backend("numpy"))
    right = getattr(right_class, method)
    planted = type(
        "Planted", (right_class,), {method: lambda self, *a, **o: wrong(lambda *b, **p: right(self, *b, **p), *a, **o)}
    )()
    monkeypatch.setitem(plugins().backends, "numpy", planted)
    failures = []
    for item in select(["numpy"], features=["operations"]).items():
        if isinstance(item, Item):
            try:
                item.verify()
            except Failure as failure:
                failures.append(str(failure))
    assert failures


def test_a_write_to_the_users_kernel_is_caught() -> None:
    target = Target(get_backend("numpy"), "cpu", "float32", made=[])
    array = target.array(np.ones((2, 3)))
    target.check_unchanged()
    array[0, 0] = 2
    with pytest.raises(Failure, match="was written to"):
        target.check_unchanged()


def test_an_array_of_another_library_is_named() -> None:
    target = Target(get_backend("numpy"), "cpu", "float32")
    with pytest.raises(Failure, match=r"values: a builtins.list, not an array of numpy: its owns_array is False"):
        target.fetch("values", [1.0], (1,))


def test_names_of_operations_are_unique() -> None:
    assert len({operation.name for operation in OPERATIONS}) == len(OPERATIONS)
