"""The network that ships with the package is well formed and as good as its metadata say."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for name in ("torch", "sklearn", "click", "safetensors"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples" / "train_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_path() -> Path:
    return ROOT / "adapters" / "convsv_adapters" / "data" / "digits.onnx"


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Undo what the script sets for its whole process."""
    torch = pytest.importorskip("torch")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def convolutions(model) -> dict[str, dict]:
    return {
        node.name: {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in model.graph.node
        if node.op_type == "Conv"
    }


def test_shipped_model_is_well_formed_and_small(model_path):
    onnx.checker.check_model(str(model_path), full_check=True)
    assert model_path.stat().st_size < 300_000


def test_shipped_model_has_every_kind_of_convolution(model_path):
    convs = convolutions(onnx.load(model_path))
    assert convs["block1.depthwise"]["group"] == 16
    assert convs["block1.pointwise"]["kernel_shape"] == [1, 1]
    assert convs["dilated"]["dilations"] == [2, 2]
    assert convs["down"]["strides"] == [2, 2]
    assert convs["block2.grouped"]["group"] == 4
    assert len(convs) == 7


def test_shipped_model_reaches_its_claimed_accuracy(model_path, example):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = onnx.load(model_path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    split = example.load_split()
    assert len(split.test_labels) == int(metadata["test_images"])

    session = onnxruntime.InferenceSession(str(model_path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": split.test_images})
    reached = example.accuracy(logits, split.test_labels)

    assert f"{reached:.4f}" == metadata["test_accuracy"]
    assert reached >= 0.97
    assert metadata["test_accuracy"] in model.doc_string
    assert (ROOT / metadata["training_script"]).is_file()


def test_split_is_held_out(example):
    split = example.load_split()
    seen = {image.tobytes() for image in split.train_images}
    assert len(split.train_labels) + len(split.test_labels) == 1797
    assert not any(image.tobytes() in seen for image in split.test_images)
    assert np.bincount(split.test_labels).min() >= 40


def test_script_writes_a_model_and_numbered_checkpoints(example, tmp_path, torch_settings):
    from click.testing import CliRunner
    from safetensors.numpy import load_file

    output, run_dir = tmp_path / "out" / "digits.onnx", tmp_path / "run"
    args = [str(output), "--epochs", "1", "--save-every", "10", "--run-dir", str(run_dir)]
    result = CliRunner().invoke(example.main, args)
    assert result.exit_code == 0, result.output

    checkpoints = sorted(run_dir.iterdir())
    assert [path.stem for path in checkpoints] == ["step_000000", "step_000010", "step_000020", "step_000022"]
    written = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(output).graph.initializer}
    last = load_file(checkpoints[-1])
    assert last.keys() == written.keys()
    for name, value in last.items():
        np.testing.assert_array_equal(value, written[name])
    assert not np.array_equal(load_file(checkpoints[0])["stem.weight"], last["stem.weight"])


def test_comparison_with_torch_catches_a_wrong_graph(model_path, example):
    import click

    onnxruntime = pytest.importorskip("onnxruntime")
    images = example.load_split().test_images[:20]
    model = onnx.load(model_path)
    session = onnxruntime.InferenceSession(str(model_path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(["logits"], {"image": images})
    assert example.check_against_torch(model, images, expected) <= 1

    dilated = next(node for node in model.graph.node if node.name == "dilated")
    for attribute in dilated.attribute:
        if attribute.name in ("dilations", "pads"):  # both, so that the shapes still fit
            attribute.ints[:] = [1] * len(attribute.ints)
    with pytest.raises(click.ClickException, match="differ by"):
        example.check_against_torch(model, images, expected)


def test_script_wants_both_checkpoint_options(example, tmp_path):
    from click.testing import CliRunner

    result = CliRunner().invoke(example.main, [str(tmp_path / "m.onnx"), "--save-every", "10"])
    assert result.exit_code == 2
    assert "--run-dir" in result.output
