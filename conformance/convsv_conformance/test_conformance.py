"""The suite under pytest: one test, which the plugin parametrises."""

from convsv_conformance.suite import Item


def test_conformance(conformance_item: Item) -> None:
    """The backend's answer is that of the dense reference."""
    conformance_item.verify()
