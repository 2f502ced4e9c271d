"""Read the files that list the cases that a backend is known to fail."""

from __future__ import annotations

import fnmatch
import importlib.resources
import itertools
from collections.abc import Iterator
from pathlib import Path

import convsv_core as convsv
from convsv_conformance.features import FEATURES
from convsv_conformance.suite import Item
from convsv_conformance.target import Target

__all__ = ["KnownFailures"]


class KnownFailures:
    """The cases that a library cannot do, each with its reason.

    Each line holds one entry, ``feature/subject/dtype: reason``, with ``*`` for any part. A line that starts with
    ``#`` is a comment. Every case that an entry matches must fail: a case that passes is an error. An entry that
    matches no case of the suite is an error too.

    Parameters
    ----------
    text : str
        The entries.
    source : str
        Name of the file, for error messages.

    Raises
    ------
    ValueError
        If a line is not an entry, or matches no case.
    """

    def __init__(self, text: str, source: str) -> None:
        self.entries: dict[str, str] = {}
        known_keys = set(_all_keys())
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            pattern, colon, reason = (part.strip() for part in line.partition(":"))
            if not colon or not reason:
                raise ValueError(f"{source}, line {number}: wanted 'feature/subject/dtype: reason', not {line!r}")
            if not fnmatch.filter(known_keys, pattern):
                raise ValueError(f"{source}, line {number}: {pattern!r} matches no case of the suite")
            self.entries[pattern] = reason

    @classmethod
    def of(cls, backend: str, path: Path | None = None) -> KnownFailures:
        """Return the entries of the file at `path`, or of the file that the suite brings for `backend`, if any."""
        if path is not None:
            return cls(path.read_text(encoding="utf-8"), str(path))
        packaged = importlib.resources.files("convsv_conformance") / "known_failures" / f"{backend}.txt"
        return cls(packaged.read_text(encoding="utf-8") if packaged.is_file() else "", packaged.name)

    def reason(self, item: Item) -> str | None:
        """Return why `item` is known to fail, or None where it must pass."""
        return next((why for pattern, why in self.entries.items() if fnmatch.fnmatchcase(item.key, pattern)), None)


def _all_keys() -> Iterator[str]:
    for feature in FEATURES:
        for subject, dtype in itertools.product(feature.subjects, feature.dtypes):
            yield Item(feature, subject, Target(convsv.Backend(), "", dtype)).key
