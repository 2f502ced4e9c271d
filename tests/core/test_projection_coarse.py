"""The projection that begins on a coarse grid of frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import convsv_core as convsv
from convsv_core._projection import dykstra


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (6, 4, 2, 2), (4, 2, 5, 5)])
def test_a_coarse_grid_first_gives_as_near_a_kernel(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """Beginning with few frequencies changes the distance by less than the gap, and the bound holds."""
    kernel = np.random.default_rng(sum(shape)).standard_normal(shape)
    conv, rtol, sizes = convsv.Conv("OIHW"), 1e-2, []

    def whole(problem: Any, places: Any) -> Any:
        sizes.append((len(places), len(coarse(problem, places))))
        return places

    def nearest() -> Any:
        return convsv.project(kernel, None, conv, 1.0, rtol=rtol)

    first = nearest()
    coarse = dykstra._coarse
    monkeypatch.setattr(dykstra, "_coarse", whole)
    second = nearest()
    assert all(few < many / 2 for many, few in sizes)
    assert first.converged
    assert second.converged
    assert first.distance**2 == pytest.approx(second.distance**2, rel=2 * rtol)
    assert convsv.norm_bounds(first.kernel, conv).lower <= 1.0
