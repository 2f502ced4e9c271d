"""Tests of writing networks back with other weights, in each format."""

from __future__ import annotations

import collections
import os
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import conv, save, value
from projected_files import BOUND, project, run, weights, within

from convsv_core.layers import ModelError
from convsv_core.reports import read_model, write_model
from convsv_core.reports.project_model import rounded_to

rng = np.random.default_rng(0)


# ---- npz -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    arrays = {
        "large": weights(4, 3, 3, 3),
        "bias": rng.normal(size=4),
        "small": weights(2, 4, 3, 3, norm=0.1),
        "half": weights(4, 4, 3, 3, dtype=np.float16),
        "fortran": np.asfortranarray(weights(4, 4, 3, 3)),
        "big": weights(4, 4, 3, 3).astype(">f4"),
        "text": np.array(["a", "bc"]),
    }
    save(tmp_path / "m.npz", **arrays)
    changed = {"large", "half", "fortran", "big"}
    rows = project(tmp_path / "m.npz", tmp_path / "out.npz")
    assert {name for name, row in rows.items() if row["distance"]} == changed
    assert within(tmp_path / "out.npz")
    with zipfile.ZipFile(tmp_path / "m.npz") as old, zipfile.ZipFile(tmp_path / "out.npz") as new:
        kinds = [[(m.filename, m.compress_type, m.date_time) for m in archive.infolist()] for archive in (old, new)]
        assert kinds[0] == kinds[1]
        for name in arrays:
            before, after = old.read(f"{name}.npy"), new.read(f"{name}.npy")
            assert (before == after) == (name not in changed)
            assert before[:128] == after[:128]
    with np.load(tmp_path / "out.npz") as found:
        for name in changed:
            ratio = found[name].astype(float) / arrays[name]
            np.testing.assert_allclose(ratio[np.abs(arrays[name]) > 0.01], BOUND / 3, rtol=0.02)


# ---- safetensors ---------------------------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    tensors = {
        "b.weight": torch.from_numpy(weights(4, 4, 3, 3)),
        "half": torch.from_numpy(weights(4, 4, 3, 3, dtype=np.float16)),
        "brain": torch.from_numpy(weights(4, 4, 3, 3)).bfloat16(),
        "double": torch.from_numpy(weights(4, 4, 3, 3, dtype=np.float64)),
        "small": torch.from_numpy(weights(4, 4, 3, 3, norm=0.1)),
        "fc": torch.ones(3, 3),
        "count": torch.arange(3),
    }
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt", "by": "hand"})
    rows = project(tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    assert within(tmp_path / "out.safetensors")
    old, new = ((tmp_path / name).read_bytes() for name in ("m.safetensors", "out.safetensors"))
    header = 8 + int.from_bytes(old[:8], "little")
    assert (old[:header], len(old)) == (new[:header], len(new))
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    for name, tensor in tensors.items():
        changed = name in rows and name != "small"
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor) == (not changed)
        if changed:
            found[name].copy_(tensor)
    # With the old weights put back it is the old file.
    kernels = {layer.stored.key: layer.kernel for layer in read_model(tmp_path / "m.safetensors")}
    write_model(tmp_path / "out.safetensors", kernels, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == old


# ---- PyTorch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "older format"])
def test_a_checkpoint_keeps_its_structure(tmp_path, archive):
    tied = torch.from_numpy(weights(4, 4, 3, 3))
    state = collections.OrderedDict(
        {
            "module.a.weight": tied,
            "module.b.weight": tied,
            "module.half": torch.from_numpy(weights(4, 4, 3, 3, dtype=np.float16)),
            "module.brain": torch.from_numpy(weights(4, 4, 3, 3)).bfloat16(),
            "module.parameter": torch.nn.Parameter(torch.from_numpy(weights(4, 4, 3, 3))),
            "module.last": torch.from_numpy(weights(4, 4, 3, 3)).to(memory_format=torch.channels_last),
            "module.small": torch.from_numpy(weights(4, 4, 3, 3, norm=0.1)),
            "module.bias": torch.ones(4),
        }
    )
    state._metadata = {"": {"version": 1}}
    checkpoint = {"epoch": 3, "args": {"lr": 0.1, "names": ["x", (1, 2)]}, "state_dict": state, "ema": {"w": tied}}
    torch.save(checkpoint, tmp_path / "m.pth", _use_new_zipfile_serialization=archive)
    rows = project(tmp_path / "m.pth", tmp_path / "out.pth")
    assert "its weights are those of b.weight too" in rows["a.weight"]["note"]
    assert within(tmp_path / "out.pth")
    assert zipfile.is_zipfile(tmp_path / "out.pth") == archive
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(found) == list(checkpoint)
    assert (found["epoch"], found["args"]) == (3, checkpoint["args"])
    new = found["state_dict"]
    assert (list(new), new._metadata) == (list(state), state._metadata)
    for name, tensor in state.items():
        assert (type(new[name]), new[name].dtype) == (type(tensor), tensor.dtype)
        assert new[name].requires_grad == tensor.requires_grad
        assert new[name].stride() == tensor.stride()
        assert torch.equal(new[name], tensor) == (name in ("module.small", "module.bias"))
    pointers = {new[name].data_ptr() for name in ("module.a.weight", "module.b.weight")} | {
        found["ema"]["w"].data_ptr()
    }
    assert len(pointers) == 1


def test_normalised_weights_are_refused_and_nothing_is_written(tmp_path):
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(4, 4, 3))
    state = {**layer.state_dict(), "plain.weight": torch.from_numpy(weights(4, 4, 3, 3))}
    torch.save(state, tmp_path / "m.pt")
    result = run("project", tmp_path / "m.pt", "--bound", BOUND, "-o", tmp_path / "out.pt", "--method", "rescale")
    assert result.exit_code == 1
    assert "computed from other tensors" in " ".join(result.stdout.split())
    assert "was not written: no norm of at most 0.7 for weight;" in " ".join(result.stderr.split())
    assert os.listdir(tmp_path) == ["m.pt"]
    project(tmp_path / "m.pt", tmp_path / "out.pt", "--only", "plain.*")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert [name for name in state if not torch.equal(found[name], state[name])] == ["plain.weight"]


# ---- ONNX ----------------------------------------------------------------------------------------------------------


def run_network(path, channels=4):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((1, channels, 8, 8), np.float32)})[0]


def test_onnx(tmp_path):
    arrays = {name: weights(4, 4, 3, 3) for name in ("raw", "shared", "identity", "branch")}
    typed = helper.make_tensor("typed", TensorProto.FLOAT, (4, 4, 3, 3), weights(4, 4, 3, 3).ravel().tolist())
    small = numpy_helper.from_array(weights(4, 4, 3, 3, norm=0.1), "small")
    constant = numpy_helper.from_array(weights(4, 4, 3, 3), "")
    then = helper.make_graph(
        [helper.make_node("Constant", [], ["inner"], value=constant), conv("g", "inner", "t", pads=[1] * 4)],
        "then",
        [],
        [value("t")],
    )
    other = helper.make_graph([conv("g", "branch", "o", pads=[1] * 4)], "else", [], [value("o")])
    nodes = [
        helper.make_node("Constant", [], ["fixed"], value=constant),
        helper.make_node("Identity", ["identity"], ["same"]),
        conv("x", "raw", "a", pads=[1] * 4),
        conv("a", "typed", "b", pads=[1] * 4),
        conv("b", "fixed", "c", pads=[1] * 4),
        conv("c", "same", "d", pads=[1] * 4),
        conv("d", "shared", "e", pads=[1] * 4),
        conv("e", "shared", "f", pads=[2] * 4, dilations=[2, 2]),
        conv("f", "small", "g", pads=[1] * 4),
        helper.make_node("If", ["yes"], ["y"], name="if", then_branch=then, else_branch=other),
    ]
    stored = [*(numpy_helper.from_array(array, name) for name, array in arrays.items()), typed, small]
    yes = numpy_helper.from_array(np.array(True), "yes")
    path = save(tmp_path / "m.onnx", nodes, [*stored, yes])
    rows = project(path, tmp_path / "out.onnx")
    assert {name for name, row in rows.items() if not row["distance"]} == {"g"}
    assert len(rows) == 9
    assert "those of f too" in rows["e"]["note"]
    assert within(tmp_path / "out.onnx")
    assert np.linalg.norm(run_network(tmp_path / "out.onnx")) < np.linalg.norm(run_network(path))
    new = onnx.load(tmp_path / "out.onnx")
    kept = next(tensor for tensor in new.graph.initializer if tensor.name == "typed")
    assert (len(kept.float_data), kept.HasField("raw_data")) == (144, False)
    # With the old weights put back it is the old file.
    kernels = {layer.stored.key: layer.kernel for layer in read_model(path)}
    write_model(tmp_path / "out.onnx", kernels, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "DOUBLE"])
def test_onnx_keeps_the_dtype(tmp_path, kind, raw):
    number = getattr(TensorProto, kind)
    array = rounded_to(
        weights(4, 4, 3, 3, dtype=np.float64), {"FLOAT16": "float16", "DOUBLE": "float64"}.get(kind, "bfloat16")
    )
    tensor = helper.make_tensor("w", number, (4, 4, 3, 3), array.ravel().tolist())
    if raw:
        dtype = helper.tensor_dtype_to_np_dtype(number)
        tensor = helper.make_tensor("w", number, (4, 4, 3, 3), array.astype(dtype).tobytes(), raw=True)
    path = save(tmp_path / "m.onnx", [conv("x", "w", "y")], [tensor], opset=22, kind=number)
    project(path, tmp_path / "out.onnx")
    assert within(tmp_path / "out.onnx")
    (new,) = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert (new.data_type, new.HasField("raw_data"), new.dims) == (number, raw, tensor.dims)
    (layer,) = read_model(path)
    write_model(tmp_path / "out.onnx", {"w": layer.kernel}, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


def test_onnx_weights_that_nodes_compute_are_refused(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["w"], ["v"], perm=[1, 0, 2, 3]),
        conv("x", "v", "a", pads=[1] * 4),
        conv("a", "u", "y"),
    ]
    stored = [numpy_helper.from_array(weights(4, 4, 3, 3), name) for name in "wu"]
    path = save(tmp_path / "m.onnx", nodes, stored)
    assert "was not written" in run("project", path, "--bound", 1, "-o", tmp_path / "out.onnx").stderr
    rows = project(path, tmp_path / "out.onnx", "--only", "y")
    assert rows["a"]["norm_after"] is None
    assert within(tmp_path / "out.onnx", {"y"})


def test_a_change_that_reaches_another_layer_through_a_node_is_refused(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["w"], ["v"], perm=[1, 0, 2, 3]),
        conv("x", "v", "a", pads=[1] * 4),
        conv("a", "w", "y"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [numpy_helper.from_array(weights(4, 4, 3, 3), "w")])
    message = project(path, tmp_path / "out.onnx", "--only", "y", status=1)
    assert "a would change with the weights of others" in " ".join(message.split())
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_onnx_with_external_data_is_refused(tmp_path):
    path = save(tmp_path / "m.onnx", [conv("x", "w", "y")], [numpy_helper.from_array(weights(4, 4, 3, 3), "w")])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    (layer,) = read_model(path)
    assert layer.stored is None
    result = run("project", path, "--bound", BOUND, "-o", tmp_path / "out.onnx")
    assert result.exit_code == 1
    assert not (tmp_path / "out.onnx").exists()
    with pytest.raises(ModelError, match="save it as one file first"):
        write_model(path, {"w": layer.kernel}, tmp_path / "out.onnx")


def test_onnx_functions_keep_their_weights_and_initialisers_change(tmp_path):
    inner = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(weights(4, 4, 3, 3, norm=0.1)))
    body = [inner, conv("a", "w", "b", pads=[1] * 4), conv("b", "k", "c", pads=[1] * 4)]
    function = helper.make_function("own", "Block", ["a", "w"], ["c"], body, [helper.make_opsetid("", 17)])
    node = helper.make_node("Block", ["x", "w"], ["y"], domain="own")
    initializers = [numpy_helper.from_array(weights(4, 4, 3, 3), "w")]
    path = save(tmp_path / "m.onnx", [node], initializers, functions=[function])
    rows = project(path, tmp_path / "out.onnx")
    assert sorted(bool(row["distance"]) for row in rows.values()) == [False, True]
    assert within(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx").functions == onnx.load(path).functions


def test_a_format_that_nothing_writes(tmp_path):
    (tmp_path / "m").write_bytes(b"junk")
    with pytest.raises(ModelError, match="in no format that can be written here"):
        write_model(tmp_path / "m", {"a": weights(1, 1, 3, 3)}, tmp_path / "out")
