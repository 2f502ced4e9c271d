"""The comparison of optimizers runs in short; what it finds is not asserted."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

torch = pytest.importorskip("torch")
for name in ("sklearn", "click", "matplotlib", "onnx", "safetensors"):
    pytest.importorskip(name)


def test_every_optimizer_is_searched_and_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from click.testing import CliRunner

    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    module = importlib.import_module("examples.muon")
    result = CliRunner().invoke(module.muon, ["--quick", "--seeds", "2", "--output", str(tmp_path)])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "muon.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "muon.json").read_text())
    for kind, count in (("search", 2), ("runs", 2)):
        assert [one["optimizer"] for one in content[kind]] == [name for name in module.OPTIMIZERS for _ in range(count)]
    assert all(0 <= one["accuracy"] <= 1 for one in content["runs"])


def test_it_trains_on_a_folder_of_cifar10(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from click.testing import CliRunner

    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    module, data = (importlib.import_module(name) for name in ("examples.muon", "examples.paper.data"))
    rng = np.random.default_rng(0)
    for name in (*data.TRAIN_FILES, data.TEST_FILE):
        records = rng.integers(0, 256, (4, data.RECORD), np.uint8)
        records[:, 0] = range(4)
        (tmp_path / name).write_bytes(records.tobytes())
    options = ["--quick", "--seeds", "1", "--cifar10", str(tmp_path), "--output", str(tmp_path / "results")]
    result = CliRunner().invoke(module.muon, options)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "results" / "muon.json").read_text())
    assert [one["optimizer"] for one in content["runs"]] == list(module.OPTIMIZERS)
    assert all(np.isfinite(one["losses"]).all() for one in content["runs"])


def test_the_flattened_muon_moves_the_weights_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("examples.muon")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    before = [one.detach().clone() for one in model.parameters()]
    optimizers = module.flattened_muon(model, 0.1)
    model(torch.ones(1, 2, 4, 4)).square().mean().backward()
    for one in optimizers:
        one.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
