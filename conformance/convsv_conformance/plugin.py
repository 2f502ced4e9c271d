"""A pytest plugin: parametrises the suite's one test over everything selected on the command line.

Loaded by ``-p convsv_conformance.plugin``. Options: ``--convsv-backend``, ``--convsv-device`` and
``--convsv-dtype``, each repeatable, all available ones by default; ``--convsv-known-failures`` names a file of known
failures for a backend that the suite does not bring one for; ``--convsv-thorough`` runs every case also on libraries
that compile each operation for each shape.
"""

from __future__ import annotations

from pathlib import Path

import pytest


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
        "--convsv-thorough", action="store_true", help="every case also for libraries that take seconds for each"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test that asks for a `conformance_item` every one of them."""
    if "conformance_item" not in metafunc.fixturenames:
        return
    # Imported here: the plugin is loaded by runs that have nothing to do with the suite.
    from convsv_conformance.suite import KnownFailures, Skip, select

    options = metafunc.config.option
    try:
        selection = select(
            options.convsv_backend,
            options.convsv_device,
            options.convsv_dtype,
            thorough=options.convsv_thorough,
        )
        names = {target.backend.name for target in selection.targets}
        known = {name: KnownFailures.of(name, options.convsv_known_failures) for name in names}
    except (ValueError, OSError) as error:
        raise pytest.UsageError(f"convsv conformance: {error}") from error
    parameters = []
    for item in selection.items():
        if isinstance(item, Skip):
            parameters.append(pytest.param(item, id=item.name, marks=pytest.mark.skip(reason=item.reason)))
            continue
        reason = known[item.target.backend.name].reason(item)
        # strict: an entry that no longer fails is an error
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        parameters.append(pytest.param(item, id=item.id, marks=marks))
    metafunc.parametrize("conformance_item", parameters)
