"""Files that `convsv project` writes: random kernels to put into them, the command, and a check of the result."""

from __future__ import annotations

import json

import numpy as np
from click.testing import CliRunner
from convsv_adapters.cli.group import convsv

from convsv_core import Conv, norm_bounds

__all__ = ["BOUND", "project", "run", "weights", "within"]

BOUND = 0.7
_rng = np.random.default_rng(0)


def weights(*shape, dtype=np.float32, norm=3.0):
    """Return a random kernel of the given norm, to within rounding."""
    kernel = _rng.normal(size=shape)
    return (kernel * (norm / float(norm_bounds(kernel, Conv("OIHW")).upper))).astype(dtype)


def run(*arguments):
    """Run the command line."""
    return CliRunner(env={"COLUMNS": None}).invoke(convsv, [str(argument) for argument in arguments])


def project(path, output, *arguments, status=0):
    """Rescale a model to `BOUND`, and return the rows of the report by layer, or the messages if there is none."""
    result = run("project", path, "--bound", BOUND, "-o", output, "--method", "rescale", *arguments, "--json", "-")
    assert result.exit_code == status, result.output
    return {layer["name"]: layer for layer in json.loads(result.stdout)["layers"]} if result.stdout else result.stderr


def within(path, names=None):
    """Return whether `convsv norm` proves the bound for each layer, or for each of the layers named."""
    result = run("norm", path, "--json", "-")
    layers = json.loads(result.stdout)["layers"]
    return all(layer["upper"] <= BOUND for layer in layers if names is None or layer["name"] in names)
