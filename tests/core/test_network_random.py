"""The certificate on random networks: never below a Jacobian, never above the plain product."""

from __future__ import annotations

import pytest
from random_networks import RandomNetwork, block_values, dense_norm, largest_jacobian

from convsv_core import lipschitz
from convsv_core._network import dense

QUICK, ALL = 100, 2000
"""Number of random networks in the quick half and in both halves together."""

BOX = (-1.0, 2.0)
"""The range of the inputs of networks that have a bound over a range alone."""

LINEAR_GAP = 0.02
"""The bound of a small linear network exceeds the norm of its matrix by at most this share, as the project promises."""


def check(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check one network; the remainder of its seed decides of what sort it is."""
    sort = seed % 4
    monkeypatch.setattr(dense, "MOST_SIDE", 0 if sort == 3 else 1024)
    network = RandomNetwork(seed, linear=sort in (0, 3), ranged=sort == 2).graph
    box = BOX if sort == 2 else None
    found = lipschitz(network, input_range=box, search=5, seed=seed)
    assert found.log10_upper <= found.log10_product + 1e-12
    if sort in (0, 3):
        exact = dense_norm(network)
        assert exact <= found.upper * (1 + 1e-12) + 1e-300
        # Without matrices of small parts, padded convolutions in a row keep their product.
        assert sort == 3 or found.upper <= exact * (1 + LINEAR_GAP) + 1e-12
    else:
        assert largest_jacobian(network, seed, box) <= found.upper
    assert found.lower is None or found.lower <= found.upper
    for block in found.blocks if sort != 2 else ():  # a block's own input is not within the range of the network's
        values = block_values(network, block, seed)
        assert values[0] <= block.largest_singular_value * (1 + 1e-12)
        assert block.smallest_singular_value <= values[-1] + 1e-12


@pytest.mark.parametrize("first", range(0, QUICK, 10))
def test_some_random_networks(first, monkeypatch):
    for seed in range(first, first + 10):
        check(seed, monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("first", range(QUICK, ALL, 100))
def test_many_random_networks(first, monkeypatch):
    for seed in range(first, first + 100):
        check(seed, monkeypatch)
