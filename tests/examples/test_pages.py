"""Every code block of the README and of the site's pages runs as it stands; the gallery runs when the site is built."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
from click.testing import CliRunner
from convsv_adapters.cli.group import convsv
from pages import PAGES, README, ROOT, blocks, run_page

import convsv_core

GUIDES = ROOT / "docs" / "guides"
LANGUAGES = {"python", "sh", "toml", "", "{toctree}"}
"""The languages of blocks. Those without a language are output that is shown."""


def check_readme(found: dict[str, Any]) -> None:
    assert found["values"].shape == (8192,)
    layer = found["model"][0]
    conv = convsv_core.Conv("OIHW", padding=1, padding_mode="zeros")
    assert float(convsv_core.norm_bounds(layer.weight.detach(), conv).upper) <= 1 + 1e-6
    assert found["projection"].steps == 5


def check_library(found: dict[str, Any]) -> None:
    assert found["values"].shape == (8192,)


def check_torch(found: dict[str, Any]) -> None:
    layer = found["model"][0]
    conv = convsv_core.Conv("OIHW", padding=1, padding_mode="zeros")
    assert float(convsv_core.norm_bounds(layer.weight.detach(), conv).upper) <= 1 + 1e-6
    assert found["projection"].steps == 5


def check_jax(found: dict[str, Any]) -> None:
    for layer in found["model"].layers[0], found["model"].layers[2]:
        conv = convsv_core.Conv("HWIO", padding_mode="zeros")
        assert float(convsv_core.norm_bounds(np.asarray(layer.kernel[...]), conv, rtol=1e-7).upper) <= 1 + 1e-6


def check_keras(found: dict[str, Any]) -> None:
    kernel = np.asarray(found["keras"].ops.convert_to_numpy(found["conv"].kernel), float)
    conv = convsv_core.Conv("HWIO", padding_mode="zeros")
    assert float(convsv_core.norm_bounds(kernel, conv).upper) <= 1 + 1e-6


def check_large(found: dict[str, Any]) -> None:
    assert found["values"].shape == (64 * 64 * 16,)
    assert type(found["median"]).__module__.startswith("dask")
    kernel, conv = np.asarray(found["kernel"]), convsv_core.Conv("OIHW")  # of the mesh, the last example
    expected = float(convsv_core.operator_norm(kernel, (64, 64), conv))
    assert abs(float(found["norm"]) - expected) <= 20 * np.finfo(kernel.dtype).eps * expected


CHECKS: dict[Path, Callable[[dict[str, Any]], None]] = {
    README: check_readme,
    GUIDES / "library.md": check_library,
    GUIDES / "torch.md": check_torch,
    GUIDES / "jax.md": check_jax,
    GUIDES / "keras.md": check_keras,
    GUIDES / "large.md": check_large,
}
"""Conditions that hold after a page has run, besides its own assertions."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_page(page)
    CHECKS.get(page, lambda found: None)(found)


def test_every_block_has_a_language_that_is_checked() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)
        assert len(fences) % 2 == 0, page
        assert set(fences[::2]) <= LANGUAGES, page
        for block in blocks(page, "toml"):
            assert tomllib.loads(block), page


# ---- commands


def commands(page: Path) -> list[str]:
    """Return the commands of a page, without their comments."""
    return [shlex.join(shlex.split(line, comments=True)) for block in blocks(page, "sh") for line in block.splitlines()]


COMMANDS = [pytest.param(line, id=f"{name_of(page)}: {line}") for page in PAGES for line in commands(page)]
"""Every command of every page."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the files that the pages' commands name, and go to their folder."""
    onnx_models.two_convolutions(tmp_path / "model.onnx", ["N", 3, "H", "W"])
    onnx_models.two_convolutions(tmp_path / "quantised.onnx", ["N", 3, "H", "W"])
    torch = pytest.importorskip("torch")
    weight = torch.from_numpy(onnx_models.KERNEL_OF_3)
    torch.save({"conv1.weight": weight, "layer1.conv1.weight": weight}, tmp_path / "weights.pth")
    (tmp_path / "run").mkdir()
    from safetensors.numpy import save_file

    for step in (1, 2):
        save_file({"conv.weight": onnx_models.KERNEL * step}, tmp_path / "run" / f"step_{step}.safetensors")
    for index, shard in (("model.safetensors.index.json", "m.safetensors"), ("pytorch_model.bin.index.json", "m.bin")):
        (tmp_path / index).write_text(json.dumps({"weight_map": {"conv.weight": shard}}))
    save_file({"conv.weight": onnx_models.KERNEL}, tmp_path / "m.safetensors")
    torch.save({"conv.weight": weight}, tmp_path / "m.bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def keras_files(folder: Path) -> None:
    """Make the Keras files that the pages' commands name."""
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    model.save_weights(folder / "model.weights.h5")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", [one for one in COMMANDS if one.values[0].startswith("convsv ")])
def test_the_commands_run(line: str, folder: Path, request: pytest.FixtureRequest) -> None:
    if re.search(r"\.(keras|h5)\b", line):
        request.getfixturevalue("keras_files")
    _, command, *arguments = shlex.split(line)
    if command == "conformance":
        arguments.append("--help")  # the suite itself is half of the tests
    if "--scheduler" in arguments:
        if not request.config.option.thorough:
            pytest.skip("a cluster is started by --thorough alone; tests/many has the quick form")
        arguments += ["--input-shape", "8,8"]
    result = CliRunner(env={"COLUMNS": None}).invoke(convsv, [command, *arguments], prog_name="convsv")
    assert result.exit_code == 0, result.output
    for option in ("--plot", "--json", "-o", "--out", "--html"):
        if option in arguments:
            assert (folder / arguments[arguments.index(option) + 1]).exists()


@pytest.mark.parametrize("line", [one for one in COMMANDS if not one.values[0].startswith("convsv ")])
def test_other_commands_are_right_calls(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that take long are parsed, and not run. CI runs those that install packages and build the site."""
    monkeypatch.syspath_prepend(str(ROOT))
    words = shlex.split(line)
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [name for word in words for part in re.findall(r"^\.\[(.*)\]$", word) for name in part.split(",")]
        assert named
        assert set(named) <= set(extras)
    elif words[:2] == ["python", "-m"] and words[2] in ("benchmarks", "examples.paper"):
        module = importlib.import_module(f"{words[2]}.__main__")
        (group,) = [value for value in vars(module).values() if hasattr(value, "commands")]
        group.commands[words[3]].make_context(words[3], words[4:])
    else:
        assert line in (ROOT / ".ci" / "run").read_text() or words[:3] == ["python", "-m", "convsv_conformance"]
