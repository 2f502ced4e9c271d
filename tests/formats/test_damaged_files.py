"""Files of every format with random damage: each is read, or refused by an error that names the file."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner
from convsv_adapters.cli.group import convsv
from torch import nn

FORMATS = ["pt", "onnx", "safetensors", "npz", "keras"]
"""HDF5 alone is left out: its library can take for ever to read a damaged file. Keras's archives have check sums."""

halves = [
    pytest.param(range(60), id="quick"),
    pytest.param(range(60, 3000), id="thorough", marks=pytest.mark.thorough),
]


def write_file(path: Path) -> None:
    """Write a small network in the format of the file's suffix."""
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2)).eval()
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    if path.suffix == ".pt":
        torch.save(model.state_dict(), path)
    elif path.suffix == ".onnx":
        torch.onnx.export(model, (torch.zeros(1, 3, 10, 10),), path, dynamo=False)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        layers = [keras.layers.Conv2D(4, 3, strides=2), keras.layers.DepthwiseConv2D(3)]
        keras.Sequential([keras.Input((10, 10, 3)), *layers]).save(path)


def damaged(content: bytes, seed: int) -> bytes:
    """Return the content with some bytes changed, lost, doubled or set to 0."""
    rng, found = random.Random(seed), bytearray(content)
    start = rng.randrange(len(found))
    end = min(len(found), start + rng.randrange(1, 200))
    kind = rng.randrange(5)
    if kind == 0:
        del found[start:]
    elif kind == 1:
        found[start:start] = found[start:end]
    elif kind == 2:
        found[start:end] = bytes(end - start)
    else:
        for _ in range(rng.randrange(1, 20)):  # Most of a format's structure stands at its ends.
            place = rng.randrange(min(len(found), 2000))
            found[place if rng.random() < 0.5 else -1 - place] = rng.randrange(256)
    return bytes(found)


@pytest.mark.parametrize("seeds", halves)
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_damage_is_reported_in_a_sentence(tmp_path: Path, suffix: str, seeds: range) -> None:
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}"
    write_file(whole)
    sound = CliRunner().invoke(convsv, ["norm", str(whole)])
    assert sound.exit_code == 0, sound.output
    content, exits = whole.read_bytes(), {sound.exit_code}
    for seed, command in zip(seeds, itertools.cycle(["norm", "spectrum", "lipschitz"])):
        path.write_bytes(damaged(content, seed))
        result = CliRunner().invoke(convsv, [command, str(path)])
        if not isinstance(result.exception, SystemExit | None):
            raise AssertionError(f"damage {seed} under {command}") from result.exception
        assert result.exit_code in (0, 1), (seed, result.output)
        if result.exit_code and not result.stdout:
            assert result.stderr.startswith("Error: "), (seed, result.output)
        exits.add(result.exit_code)
    assert exits == {0, 1}
