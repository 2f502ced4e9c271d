"""A thinned suite begins with every feature, and leaves nothing out if it runs to its end."""

from __future__ import annotations

import itertools

from convsv_conformance.running import by_feature_in_turns
from convsv_conformance.suite import Item, select


def test_checks_come_feature_by_feature_in_turns() -> None:
    items = [item for item in select(["numpy"], ["cpu"], depth="quick").items() if isinstance(item, Item)]
    features = {item.feature.name for item in items}
    ordered = list(by_feature_in_turns(items))
    assert {item.feature.name for item in itertools.islice(ordered, len(features))} == features
    assert sorted(item.id for item in ordered) == sorted(item.id for item in items)
    assert [item.id for item in by_feature_in_turns(items)] == [item.id for item in ordered]
