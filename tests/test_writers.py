"""Writing networks back with other weights: each format, and `convsv project`, which does it."""

from __future__ import annotations

import collections
import json
import os
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from click.testing import CliRunner
from convsv_adapters.cli import files, request
from convsv_adapters.cli.group import convsv
from onnx import TensorProto, helper, numpy_helper

from convsv_core import Conv, norm_bounds
from convsv_core.analysis import read_model, write_model
from convsv_core.layers import Layer, ModelError, Stored
from convsv_core.model_projection import STORED_EPS, project_layers, rounded_to
from convsv_core.plugins import get_backend

rng = np.random.default_rng(0)
BOUND = 0.7


def weights(*shape, dtype=np.float32, norm=3.0):
    """A kernel of that norm, to within rounding."""
    kernel = rng.normal(size=shape)
    return (kernel * (norm / float(norm_bounds(kernel, Conv("OIHW")).upper))).astype(dtype)


def run(*arguments):
    return CliRunner(env={"COLUMNS": None}).invoke(convsv, [str(argument) for argument in arguments])


def project(path, output, *arguments, status=0):
    result = run("project", path, "--bound", BOUND, "-o", output, "--method", "rescale", *arguments, "--json", "-")
    assert result.exit_code == status, result.output
    return {layer["name"]: layer for layer in json.loads(result.stdout)["layers"]} if result.stdout else result.stderr


def within(path, names=None):
    """Norms of the layers as `convsv norm` gives them."""
    result = run("norm", path, "--json", "-")
    layers = json.loads(result.stdout)["layers"]
    return all(layer["upper"] <= BOUND for layer in layers if names is None or layer["name"] in names)


# ---- the projection of a list of layers ------------------------------------------------------------------------


def report_of(*layers, bound=BOUND, **options):
    return list(project_layers(layers, get_backend("numpy"), bound, method="rescale", **options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_stored_is_within_the_bound_and_no_smaller_than_rounding_asks(dtype):
    for _ in range(5):
        kernel = rounded_to(weights(5, 4, 3, 3, dtype=np.float64), dtype)
        (report,) = report_of(Layer("a", kernel, Conv("OIHW", padding_mode="zeros"), None, "", Stored("a", dtype)))
        np.testing.assert_array_equal(rounded_to(report.kernel, dtype), report.kernel)
        upper = float(norm_bounds(report.kernel, Conv("OIHW")).upper)
        assert report.norm_after == upper <= BOUND
        assert upper >= BOUND * (1 - 2e-3 - 16 * STORED_EPS[dtype])
        assert report.distance == pytest.approx(np.linalg.norm(report.kernel.astype(float) - kernel), rel=1e-6)
        (again,) = report_of(Layer("a", report.kernel, Conv("OIHW"), None, "", Stored("a", dtype)))
        assert (again.kernel, again.distance, again.norm_after) == (None, 0, report.norm_after)


def test_a_float64_kernel_is_certified_in_full_where_it_is_looked_at_in_float32():
    kernel = weights(4, 4, 3, 3, dtype=np.float64)
    (report,) = report_of(Layer("a", kernel, Conv("OIHW"), (8, 8), "", Stored("a", "float64")), dtype="float32")
    assert float(norm_bounds(report.kernel, Conv("OIHW"), rtol=1e-6).upper) <= report.norm_after <= BOUND
    assert report.kernel.dtype == np.float64


def test_shared_weights_satisfy_the_bound_in_every_geometry():
    kernel, stored = weights(4, 4, 3, 3), Stored("w", "float32")
    convs = [Conv("OIHW", padding_mode="zeros"), Conv("OIHW", stride=2), Conv("OIHW", groups=1, dilation=2)]
    layers = [Layer(f"l{index}", kernel, conv, (8, 8), "", stored) for index, conv in enumerate(convs)]
    reports = report_of(*layers)
    assert all(report.kernel is reports[0].kernel for report in reports)
    assert reports[0].note == "its weights are those of l1, l2 too"
    for report, conv in zip(reports, convs, strict=True):
        assert not report.failed
        assert float(norm_bounds(report.kernel, conv).upper) == report.norm_after <= BOUND
    assert max(report.norm_after for report in reports) >= BOUND * (1 - 3e-3)


def test_padding_that_repeats_pixels_is_counted():
    conv = Conv("OIHW", padding=1, padding_mode="reflect")
    (report,) = report_of(Layer("a", weights(4, 4, 3, 3), conv, (8, 8), "", Stored("a", "float32")))
    assert float(norm_bounds(report.kernel, Conv("OIHW")).upper) == pytest.approx(BOUND / 2, rel=2e-3)
    assert float(norm_bounds(report.kernel, conv, input_shape=(8, 8)).upper) <= report.norm_after <= BOUND
    (report,) = report_of(Layer("a", weights(4, 4, 3, 3), conv, None, "", Stored("a", "float32")))
    assert report.failed
    assert "needs the layer's extents" in report.note


def test_what_cannot_be_projected_has_failed_and_says_why():
    kernel = weights(4, 4, 3, 3)
    computed, damaged, unknown, small = report_of(
        Layer("a", kernel, Conv("OIHW"), None),
        Layer("b", np.full_like(kernel, np.nan), Conv("OIHW"), None, "", Stored("b", "float32")),
        Layer("c", None, None, None, "no weights"),
        Layer("d", kernel / 100, Conv("OIHW"), None),
    )
    assert [report.failed for report in (computed, damaged, unknown, small)] == [True, True, True, False]
    assert "computed from others" in computed.note
    assert "NaN" in damaged.note
    assert unknown.note == "no weights"
    assert computed.norm_after == computed.norm_before == pytest.approx(3, rel=2e-3)


def test_layers_that_are_not_selected_stay_and_say_whose_weights_they_have():
    kernel = weights(4, 4, 3, 3)
    first, second, third = report_of(
        Layer("a", kernel, Conv("OIHW"), None, "", Stored("w", "float32")),
        Layer("b", kernel, Conv("OIHW"), None, "", Stored("w", "float32")),
        Layer("c", kernel, Conv("OIHW"), None, "", Stored("v", "float32")),
        selected=lambda name: name == "a",
    )
    assert first.kernel is not None
    assert (second.kernel, second.failed, third.failed) == (None, False, False)
    assert second.note == "not selected: its weights are those of a, which was"
    assert third.note == "not selected"


def test_a_bound_of_zero():
    (report,) = report_of(Layer("a", weights(2, 2, 3, 3), Conv("OIHW"), None, "", Stored("a", "float16")), bound=0.0)
    assert (np.count_nonzero(report.kernel), report.norm_after, report.failed) == (0, 0, False)


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
    assert "computed from others" in " ".join(result.stdout.split())
    assert "was not written: no norm of at most 0.7 for weight;" in " ".join(result.stderr.split())
    assert os.listdir(tmp_path) == ["m.pt"]
    project(tmp_path / "m.pt", tmp_path / "out.pt", "--only", "plain.*")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert [name for name in state if not torch.equal(found[name], state[name])] == ["plain.weight"]


# ---- ONNX ----------------------------------------------------------------------------------------------------------


def value(name, shape=None, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def conv(source, weight, target, **attributes):
    return helper.make_node("Conv", [source, weight], [target], name=target, **attributes)


def save(path, nodes, initializers, *, channels=4, opset=17, functions=(), kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes, "net", [value("x", [1, channels, 8, 8], kind)], [value("y", None, kind)], initializers
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)
    model.metadata_props.add(key="author", value="nobody")
    onnx.save(model, path)
    return path


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


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    np.savez(tmp_path / "m.npz", a=weights(4, 4, 3, 3), b=weights(4, 4, 3, 3, norm=0.1))
    return tmp_path / "m.npz"


def test_the_network_that_ships(tmp_path):
    result = run("project", "--bound", 3, "-o", tmp_path / "digits.onnx", "--method", "rescale")
    assert (result.exit_code, result.stderr) == (0, "")
    for word in ("before", "after", "distance", "block1.pointwise", "6 of 7 convolutions changed", "by rescale"):
        assert word in " ".join(result.stdout.split())
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("block1.pointwise")]
    assert row[-2:] == ["0", "yes"]
    assert row[-5] == row[-4]
    layers = json.loads(run("norm", tmp_path / "digits.onnx", "--json", "-").stdout)["layers"]
    after = {layer["name"]: layer["upper"] for layer in layers}
    document = run("project", tmp_path / "digits.onnx", "--bound", 3, "-o", tmp_path / "b.onnx", "--json", "-").stdout
    document = json.loads(document)
    assert list(document) == ["model", "backend", "output", "bound", "method", "layers"]
    assert (document["bound"], document["method"]) == (3, "dykstra")
    assert list(document["layers"][0])[-6:] == [
        "norm_before",
        "norm_after",
        "distance",
        "iterations",
        "converged",
        "note",
    ]
    for layer in document["layers"]:
        assert layer["distance"] == 0
        assert layer["norm_before"] == layer["norm_after"] == after[layer["name"]] <= 3
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "digits.onnx").read_bytes()


def test_dykstra_moves_a_kernel_less_than_rescaling(model, tmp_path):
    near = run("project", model, "--bound", BOUND, "-o", tmp_path / "near.npz", "--json", "-")
    far = project(model, tmp_path / "far.npz")
    assert within(tmp_path / "near.npz")
    near = {layer["name"]: layer for layer in json.loads(near.stdout)["layers"]}
    assert near["a"]["distance"] < 0.95 * far["a"]["distance"]


def test_an_existing_file_is_replaced_with_force_alone(model):
    before = model.read_bytes()
    result = run("project", model, "--bound", BOUND, "-o", model)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert model.read_bytes() == before
    model.chmod(0o640)
    project(model, model, "--force")
    assert stat.S_IMODE(model.stat().st_mode) == 0o640
    assert within(model)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions and links")
def test_permissions_and_links(model, tmp_path):
    model.chmod(0o600)
    project(model, tmp_path / "new.npz")
    assert stat.S_IMODE((tmp_path / "new.npz").stat().st_mode) == 0o600
    (tmp_path / "other.npz").write_bytes(b"")
    (tmp_path / "other.npz").chmod(0o644)
    (tmp_path / "link.npz").symlink_to(tmp_path / "other.npz")
    project(model, tmp_path / "link.npz", "--force")
    assert (tmp_path / "link.npz").is_symlink()
    assert within(tmp_path / "other.npz")
    assert stat.S_IMODE((tmp_path / "other.npz").stat().st_mode) == 0o644


@pytest.mark.parametrize("stage", ["write", "disk", "check"])
def test_a_failure_midway_leaves_the_old_file_and_nothing_else(model, monkeypatch, stage):
    before = model.read_bytes()

    def half(path, kernels, target):
        Path(target).write_bytes(before[:100])
        raise OSError(28, "No space left on device", str(target))

    def full(path):
        raise OSError(28, "No space left on device")

    def other(path, kernels, target):
        shutil.copyfile(path, target)

    if stage == "disk":
        monkeypatch.setattr(files, "_to_disk", full)
    else:
        monkeypatch.setattr(request, "write_model", half if stage == "write" else other)
    message = project(model, model, "--force", status=1)
    assert ("would change" if stage == "check" else "No space left on device") in " ".join(message.split())
    assert model.read_bytes() == before
    assert os.listdir(model.parent) == ["m.npz"]


def test_a_crash_midway_leaves_the_old_file(model, monkeypatch):
    before = model.read_bytes()

    def interrupted(path, kernels, target):
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(request, "write_model", interrupted)
    assert run("project", model, "--bound", BOUND, "-o", model, "--force").exit_code != 0
    assert model.read_bytes() == before
    assert os.listdir(model.parent) == ["m.npz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.npz"], "--bound"),
        (["--bound", "1"], "--output"),
        (["--bound", "nan", "-o", "out.npz"], "wanted a number that is not negative"),
        (["--bound", "-1", "-o", "out.npz"], "wanted a number that is not negative"),
        (["--bound", "inf", "-o", "out.npz"], "wanted a number that is not negative"),
        (["--bound", "1", "-o", "no/such/folder/out.npz"], "there is no directory"),
        (["--bound", "1", "-o", "."], "is a directory"),
        (["--bound", "1", "-o", os.devnull, "--force"], "is no file"),
        (["--bound", "1", "-o", "out.npz", "--method", "guess"], "'guess' is not one of"),
        (["--bound", "1", "-o", "out.npz", "--only", "c*"], "no convolution is called 'c*'"),
    ],
)
def test_a_wrong_call_is_status_2(model, arguments, message, monkeypatch):
    monkeypatch.chdir(model.parent)
    result = run("project", model, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())
    assert os.listdir(model.parent) == ["m.npz"]


def test_a_format_that_nothing_writes(tmp_path):
    (tmp_path / "m").write_bytes(b"junk")
    with pytest.raises(ModelError, match="in no format that can be written here"):
        write_model(tmp_path / "m", {"a": weights(1, 1, 3, 3)}, tmp_path / "out")
