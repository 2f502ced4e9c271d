"""Run checks one after the other, and record what each finds."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from convsv_conformance.failures import KnownFailures
from convsv_conformance.report import Cell, Report
from convsv_conformance.suite import Item

__all__ = ["by_feature_in_turns", "run"]


def run(items: Iterable[Item], known: Mapping[str, KnownFailures], skipped: Sequence[tuple[str, str]] = ()) -> Report:
    """Return the report of some checks.

    Parameters
    ----------
    items : iterable of Item
        They are run in this order, so that an iterator may end a run.
    known : mapping of str to KnownFailures
        The entries of every backend of the items.
    skipped : sequence of pairs of str
        What the report lists as skipped: a name and a reason each.
    """
    cells: dict[tuple[str, ...], Cell] = {}
    for item in items:
        target = item.target
        key = (target.backend.name, target.device, target.dtype, item.feature.name)
        cell = cells.setdefault(key, Cell(*key))
        reason = known[target.backend.name].reason(item)
        start = time.perf_counter()
        try:
            ledger = item.verify()
        except Exception as error:  # a backend may raise anything, and each exception fails its case only
            cell.cases += 1
            if reason:
                cell.known += 1
            else:
                cell.failures.append(f"{item.id}: {type(error).__name__}: {' '.join(str(error).split())}")
        else:
            cell.cases += ledger.cases
            cell.largest = max(cell.largest, ledger.largest)
            if reason:
                cell.failures.append(f"{item.id}: no longer fails, so its entry must go: {reason}")
        cell.seconds += time.perf_counter() - start
    return Report(list(cells.values()), skipped)


def by_feature_in_turns(items: Iterable[Item]) -> Iterator[Item]:
    """Yield one check of every feature, then a second one of every feature, and so on.

    The checks of a feature come in an order that is drawn at random by a fixed seed. So any number of the first checks
    is a thinned suite, spread over the features, cases and dtypes.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.feature.name, []).append(item)
    for group in groups.values():
        random.Random(0).shuffle(group)
    for turn in itertools.zip_longest(*groups.values()):
        yield from (item for item in turn if item is not None)
