"""A thinned suite begins with every feature, and leaves nothing out if it runs to its end."""

from __future__ import annotations

import itertools

import pytest
from convsv_conformance import suite
from convsv_conformance.running import by_feature_in_turns
from convsv_conformance.suite import Item, Skip, select


def test_checks_come_feature_by_feature_in_turns() -> None:
    items = [item for item in select(["numpy"], ["cpu"], depth="quick").items() if isinstance(item, Item)]
    features = {item.feature.name for item in items}
    ordered = list(by_feature_in_turns(items))
    assert {item.feature.name for item in itertools.islice(ordered, len(features))} == features
    assert sorted(item.id for item in ordered) == sorted(item.id for item in items)
    assert [item.id for item in by_feature_in_turns(items)] == [item.id for item in ordered]


def test_without_hypothesis_its_cases_are_a_skip_and_all_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = select(["numpy"], ["cpu"], depth="quick")
    whole = [item.id for item in chosen.items() if isinstance(item, Item)]
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    items = list(chosen.items())
    (skip,) = [item for item in items if isinstance(item, Skip) and "hypothesis" in item.reason]
    assert skip.name == "random"
    left = [item.id for item in items if isinstance(item, Item)]
    assert left == [name for name in whole if "/random/" not in name]
    assert len(left) < len(whole)
