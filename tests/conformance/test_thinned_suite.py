"""A thinned suite begins with every feature, and leaves nothing out if it runs to its end."""

from __future__ import annotations

import itertools

import pytest
from convsv_conformance.failures import KnownFailures
from convsv_conformance.running import by_feature_in_turns, run
from convsv_conformance.suite import Item, select


def test_checks_come_feature_by_feature_in_turns() -> None:
    items = [item for item in select(["numpy"], ["cpu"], depth="quick").items() if isinstance(item, Item)]
    features = {item.feature.name for item in items}
    ordered = list(by_feature_in_turns(items))
    assert {item.feature.name for item in itertools.islice(ordered, len(features))} == features
    assert sorted(item.id for item in ordered) == sorted(item.id for item in items)
    assert [item.id for item in by_feature_in_turns(items)] == [item.id for item in ordered]


@pytest.mark.thorough
def test_pytorch_passes_on_the_routes_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator PyTorch calls no host, shares no blocks out to threads, and computes in complex64."""
    pytest.importorskip("torch")
    from convsv_backends import _torch

    monkeypatch.setattr(_torch.TorchBackend, "prefers_host", lambda self, arguments, *, search=False: False)
    monkeypatch.setattr(_torch.TorchBackend, "_on_host", lambda self, array: False)
    monkeypatch.setattr(_torch.TorchBackend, "has_fast_float64", lambda self, array: False)
    monkeypatch.setattr(_torch, "_is_plain", lambda array: False)
    items = [item for item in select(["torch"], ["cpu"], depth="quick").items() if isinstance(item, Item)]
    checks = list(itertools.islice(by_feature_in_turns(items), 400))
    cells = run(checks, {"torch": KnownFailures.of("torch")}).cells
    assert len({cell.feature for cell in cells}) == len({item.feature.name for item in items})
    assert not [failure for cell in cells for failure in cell.failures]
