"""A pytest plugin: parametrises the suite's one test over everything selected on the command line.

Load it by ``-p convsv_conformance.plugin``. The options ``--convsv-backend``, ``--convsv-device`` and
``--convsv-dtype`` are repeatable; each takes all available ones by default. ``--convsv-known-failures`` names a file of
known failures, in place of the file that the suite brings for a backend. ``--convsv-quick`` lets one case stand for
several. ``--convsv-thorough`` runs every case also on libraries that compile each operation for each shape. Items that
``--convsv-quick`` leaves out have the mark ``thorough``, so that ``-m thorough`` runs the rest after a quick run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

__all__ = ["pytest_addoption", "pytest_configure", "pytest_generate_tests"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("convsv", "conformance of array backends")
    for name in ("backend", "device", "dtype"):
        group.addoption(
            f"--convsv-{name}",
            action="append",
            default=[],
            metavar="NAME",
            help=f"run the conformance cases on this {name} only (repeatable; default: all there are)",
        )
    group.addoption(
        "--convsv-known-failures", type=Path, metavar="FILE", help="known failures, in place of those of the suite"
    )
    group.addoption(
        "--convsv-quick", action="store_true", help="every feature on every backend, with few cases for each"
    )
    group.addoption(
        "--convsv-thorough", action="store_true", help="every case also for libraries that take seconds for each"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark ``thorough``."""
    config.addinivalue_line("markers", "thorough: this test is left out of quick runs")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise each test that asks for a `conformance_item` over all selected items."""
    if "conformance_item" not in metafunc.fixturenames:
        return
    # The suite is imported here since the plugin is also loaded by runs that do not use the suite.
    from convsv_conformance.failures import KnownFailures
    from convsv_conformance.suite import Item, Skip, select

    options = metafunc.config.option
    try:
        selection = select(
            options.convsv_backend,
            options.convsv_device,
            options.convsv_dtype,
            depth="thorough" if options.convsv_thorough else "quick" if options.convsv_quick else "usual",
        )
        names = {target.backend.name for target in selection.targets}
        known = {name: KnownFailures.of(name, options.convsv_known_failures) for name in names}
    except (ValueError, OSError) as error:
        raise pytest.UsageError(f"convsv conformance: {error}") from error
    quick = {item.id: item.subject for item in replace(selection, depth="quick").items() if isinstance(item, Item)}
    parameters = []
    for item in selection.items():
        if isinstance(item, Skip):
            parameters.append(pytest.param(item, id=item.name, marks=pytest.mark.skip(reason=item.reason)))
            continue
        reason = known[item.target.backend.name].reason(item)
        # With strict=True an entry that no longer fails is an error.
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        if quick.get(item.id) != item.subject:
            marks.append(pytest.mark.thorough)
        parameters.append(pytest.param(item, id=item.id, marks=marks))
    metafunc.parametrize("conformance_item", parameters)
