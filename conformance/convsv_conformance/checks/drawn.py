"""Check values, symbol and vectors of convolutions that hypothesis draws."""

from __future__ import annotations

from dataclasses import dataclass

from convsv_conformance.cases import Case
from convsv_conformance.checks import spectrum
from convsv_conformance.table import random_cases
from convsv_conformance.target import Ledger, Target

__all__ = ["Drawn", "of_drawn_cases"]


@dataclass(frozen=True)
class Drawn:
    """A number of cases that hypothesis draws; one number gives equal cases in every run."""

    name: str
    examples: int


def of_drawn_cases(target: Target, subject: Drawn, ledger: Ledger) -> None:
    """Check values, symbol and vectors of drawn convolutions; hypothesis shrinks one that fails."""
    from hypothesis import HealthCheck, Phase, given, settings

    @settings(
        max_examples=subject.examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(random_cases())
    def hold(case: Case) -> None:
        ledger.cases += 1
        spectrum.values(target, case, ledger)
        spectrum.symbol(target, case, ledger)
        spectrum.singular_vectors(target, case, ledger)

    hold()
