"""The command line as a fixture, and a file of kernels to call it with."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from convsv_adapters.cli.group import convsv


@pytest.fixture
def run():
    """Call the command line: ``run("spectrum", path)``. Keywords are environment variables."""

    def call(*arguments, **environment):
        # A width that the caller's terminal, or the test runner, has set would narrow the table.
        return CliRunner(env={"COLUMNS": None} | environment).invoke(
            convsv, [str(argument) for argument in arguments], prog_name="convsv"
        )

    return call


@pytest.fixture
def spectrum(run):
    """Call ``convsv spectrum`` and return its JSON."""
    return lambda *arguments: document_of(run("spectrum", *arguments, "--json", "-"))


@pytest.fixture
def norm(run):
    """Call ``convsv norm`` and return its JSON."""
    return lambda *arguments: document_of(run("norm", *arguments, "--json", "-"))


def document_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def kernels(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "kernels.npz"
    np.savez(
        path, first=rng.normal(size=(4, 3, 3, 3)), second=np.zeros((2, 4, 3, 3)), third_conv=rng.normal(size=(2, 2, 5))
    )
    return path
