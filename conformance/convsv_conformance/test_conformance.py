"""The suite under pytest: the plugin parametrises this one test."""

from convsv_conformance.suite import Item

__all__ = ["test_conformance"]


def test_conformance(conformance_item: Item) -> None:
    """The backend's answer agrees with the dense reference."""
    conformance_item.verify()
