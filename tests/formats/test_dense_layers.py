"""Dense layers and the normalisation behind a layer, in files of every format: the true norms, or no figure."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from convsv_conformance.dense import dense_matrix
from onnx import helper, numpy_helper
from onnx_models import save, value
from safetensors.torch import save_file
from torch import nn

from convsv_core.layers import ReadOptions
from convsv_core.plugins import get_backend
from convsv_core.reports import bounds_reports, project_layers, read_model, write_model

LINEAR = ReadOptions(linear=True)
rng = np.random.default_rng(0)


def bounds_of(path, options=LINEAR):
    return {row.name: row for row in bounds_reports(read_model(path, options), get_backend("numpy"), rtol=1e-4)}


def trained(model):
    """Give every normalisation statistics of its own, and return the model in evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_var.uniform_(0.1, 2)
                module.running_mean.normal_()
                module.weight.normal_()
    return model.eval()


def true_norm(model, shape):
    """Return the norm of an affine map, applied to the identity in float64."""
    model, size = model.double(), int(np.prod(shape))
    with torch.no_grad():
        matrix = model(torch.eye(size, dtype=torch.float64).reshape(size, *shape)) - model(
            torch.zeros(1, *shape).double()
        )
    return float(torch.linalg.matrix_norm(matrix.reshape(size, -1), 2))


def close_above(bound, norm):
    assert norm * (1 - 1e-6) <= bound <= norm * (1 + 1e-3)


# ---- state dicts -------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(1)  # The power iteration of spectral_norm converges slowly from some weights.
    return nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 6, bias=False),
        nn.BatchNorm1d(6),
    )


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npz"])
def test_state_dicts(tmp_path, suffix):
    model = network()
    for _ in range(20):
        model(torch.randn(4, 3, 1, 1))  # the power iteration of spectral_norm
    trained(model)
    state = model.state_dict()
    path = tmp_path / f"m.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    elif suffix == "safetensors":
        save_file({name: one.contiguous() for name, one in state.items()}, path)
    else:
        np.savez(path, **{name: one.numpy() for name, one in state.items()})
    found = bounds_of(path)
    assert list(found) == ["0.weight", "2.weight", "5.weight", "6.weight", "7.weight", "8.weight"]
    assert list(bounds_of(path, ReadOptions())) == ["0.weight", "2.weight"]
    for name in ("5", "6", "7", "8"):
        row = found[f"{name}.weight"]
        assert row.linear
        close_above(row.upper, float(torch.linalg.matrix_norm(model[int(name)].weight.detach(), 2)))
    # Epsilon is not in the file: the bound is that of epsilon 0, which is larger.
    close_above(found["0.weight"].folded_upper / true_norm(model[0:2], (3, 1, 1)), 1)
    close_above(found["8.weight"].folded_upper / true_norm(model[8:10], (4,)), 1)
    assert found["2.weight"].folded_upper is None  # with a bias, something may stand between
    assert found["0.weight"].normalisation == "1"


def test_only_what_is_surely_dense_is_listed(tmp_path):
    state = {
        "embed.weight": torch.ones(9, 4),
        "token_embedding.weight": torch.ones(9, 4),
        "attn.in_proj_weight": torch.ones(12, 4),
        "attn.in_proj_bias": torch.ones(12),
        "norm.weight": torch.ones(3, 4),
        "norm.bias": torch.ones(3, 4),
        "table": torch.ones(3, 4),
        "mystery.weight": torch.ones(3, 4),
        "rnn.weight_ih_l0": torch.ones(3, 4),
        "head.weight": torch.ones(3, 4),
        "h.mlp.c.weight": torch.ones(4, 3),
        "h.mlp.c.bias": torch.ones(3),
        "quantised.fc.weight": torch.ones(3, 4, dtype=torch.int8),
        "scaled.fc.weight": torch.ones(3, 4),
        "scaled.fc.weight_scale": torch.ones(3),
    }
    torch.save(state, tmp_path / "m.pt")
    found = bounds_of(tmp_path / "m.pt")
    with_figures = {name for name, row in found.items() if row.upper is not None}
    assert with_figures == {"head.weight", "h.mlp.c.weight"}
    assert "integers" in found["quantised.fc.weight"].note
    assert "changes this weight" in found["scaled.fc.weight"].note
    assert set(found) == with_figures | {"quantised.fc.weight", "scaled.fc.weight"}


def test_a_normalisation_that_is_not_sure_gives_no_figure(tmp_path):
    conv, norm = nn.Conv2d(3, 4, 1, bias=False), trained(nn.BatchNorm2d(4))
    other = trained(nn.BatchNorm2d(5))
    cases = {
        "named": {"conv1": conv, "bn1": norm},
        "apart": {"0": conv, "2": norm},
        "of other channels": {"0": conv, "1": other},
        "before": {"1": conv, "0": norm},
        "elsewhere": {"a.0": conv, "b.1": norm},
    }
    for name, modules in cases.items():
        state = {f"{key}.{part}": one for key, module in modules.items() for part, one in module.state_dict().items()}
        torch.save(state, tmp_path / "m.pt")
        rows = [row for row in bounds_of(tmp_path / "m.pt").values() if row.upper is not None]
        assert [row.folded_upper for row in rows] == [None], name
    zero = dict(norm.state_dict(), running_var=torch.zeros(4))
    state = {"0.weight": conv.weight, **{f"1.{part}": one for part, one in zero.items()}}
    torch.save(state, tmp_path / "m.pt")
    (row,) = bounds_of(tmp_path / "m.pt").values()
    assert row.folded_upper is None


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npz"])
def test_dense_layers_are_projected_and_written(tmp_path, suffix):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.mul_(5)
    path, target = tmp_path / f"m.{suffix}", tmp_path / f"out.{suffix}"
    state = model.state_dict()
    if suffix == "pt":
        torch.save(state, path)
    elif suffix == "safetensors":
        save_file(state, path)
    else:
        np.savez(path, **{name: one.numpy() for name, one in state.items()})
    projected(path, target)
    if suffix == "pt":
        written = torch.load(target)
    elif suffix == "safetensors":
        from safetensors.torch import load_file

        written = load_file(target)
    else:
        with np.load(target) as archive:
            written = {name: torch.from_numpy(archive[name]) for name in archive.files}
    model.load_state_dict(written)
    assert float(torch.linalg.matrix_norm(model[0].weight.double(), 2)) <= 0.5
    assert torch.equal(model[2].bias, state["2.bias"])


def projected(path, target, bound=0.5):
    layers = read_model(path, LINEAR)
    rows = list(project_layers(layers, get_backend("numpy"), bound))
    assert not any(row.failed for row in rows)
    kernels = {layer.stored.key: row.kernel for layer, row in zip(layers, rows, strict=True) if row.kernel is not None}
    write_model(path, kernels, target)
    return kernels


def test_a_matrix_that_is_an_embedding_too_is_not_written(tmp_path):
    weight = torch.randn(9, 4)
    torch.save({"embed.weight": weight, "lm_head.weight": weight}, tmp_path / "m.pt")
    (layer,) = read_model(tmp_path / "m.pt", LINEAR)
    assert layer.stored is None
    assert "embed.weight too" in layer.note


# ---- ONNX --------------------------------------------------------------------------------------------------


def onnx_layer(tmp_path, node, matrix, shape, **options):
    path = save(tmp_path / "m.onnx", [node], weights={"w": matrix}, inputs=[value("x", shape)], **options)
    return read_model(path, LINEAR)


@pytest.mark.parametrize(
    ("kind", "swapped", "attributes"),
    [
        ("MatMul", False, {}),
        ("MatMul", True, {}),
        ("Gemm", False, {}),
        ("Gemm", False, {"transB": 1}),
        ("Gemm", False, {"transA": 1, "alpha": 2.5}),
        ("Gemm", True, {}),
        ("Gemm", True, {"transA": 1, "alpha": -0.5}),
    ],
)
def test_products_with_a_constant(tmp_path, kind, swapped, attributes):
    matrix = rng.normal(size=(4, 4)).astype(np.float32)
    names = ["w", "x"] if swapped else ["x", "w"]
    (layer,) = onnx_layer(tmp_path, helper.make_node(kind, names, ["y"], **attributes), matrix, [4, 4])
    import onnx.reference

    session = onnx.reference.ReferenceEvaluator(str(tmp_path / "m.onnx"))
    inputs = np.eye(16, dtype=np.float32).reshape(16, 4, 4)
    images = np.stack([session.run(None, {"x": one})[0].reshape(-1) for one in inputs])
    (row,) = bounds_reports([layer], get_backend("numpy"), rtol=1e-4)
    close_above(row.upper, float(np.linalg.norm(images.astype(float), 2)))
    assert (layer.stored is None) == (attributes.get("alpha", 1) != 1)
    transposed = bool(attributes.get("transA" if swapped else "transB", 0))
    assert layer.conv.layout == ("OIW" if swapped != transposed else "IOW")


def test_products_that_are_no_dense_layers(tmp_path):
    def read(node, matrix, shape=(2, 4), **options):
        return onnx_layer(tmp_path, node, matrix, list(shape), **options)

    matrix = np.ones((4, 3), np.float32)
    assert read(helper.make_node("MatMul", ["w", "w"], ["y"]), np.ones((4, 4), np.float32)) == []
    assert read(helper.make_node("MatMul", ["x", "x"], ["y"]), matrix, (4, 4)) == []
    assert (
        read(helper.make_node("MatMul", ["x", "w"], ["y"]), np.ones((4, 3), np.int64), kind=onnx.TensorProto.INT64)
        == []
    )
    (batch,) = read(helper.make_node("MatMul", ["x", "w"], ["y"]), np.ones((2, 4, 3), np.float32), (2, 5, 4))
    assert batch.kernel is None
    assert "batch of matrices" in batch.note
    (other,) = read(helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", alpha=2.0), matrix)
    assert other.kernel is None
    assert "com.microsoft.FusedMatMul is not read" in other.note
    (vector,) = read(helper.make_node("MatMul", ["x", "w"], ["y"]), np.ones(4, np.float32))
    assert vector.kernel.shape == (4, 1, 1)


def test_onnx_dense_layers_stand_in_order_and_are_written(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"], name="conv"),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "w", "bias"], ["y"], name="fc", transB=1),
    ]
    weights = {
        "k": rng.normal(size=(4, 4, 3, 3)).astype(np.float32),
        "w": rng.normal(size=(5, 4)).astype(np.float32),
        "bias": np.zeros(5, np.float32),
    }
    path = save(tmp_path / "m.onnx", nodes, weights=weights)
    assert [layer.name for layer in read_model(path, LINEAR)] == ["conv", "fc"]
    assert [layer.name for layer in read_model(path)] == ["conv"]
    projected(path, tmp_path / "out.onnx")
    written = {one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert written["w"].shape == (5, 4)
    assert np.linalg.norm(written["w"].astype(float), 2) <= 0.5


def test_weights_that_other_operators_use_are_not_written(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Add", ["a", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, weights={"w": np.ones((4, 4), np.float32)}, inputs=[value("x", [4, 4])])
    (layer,) = read_model(path, LINEAR)
    assert layer.stored is None
    assert "other operators" in layer.note


def batch_norm(source="a", target="y", **attributes):
    return helper.make_node("BatchNormalization", [source, "g", "b", "m", "v"], [target], name="bn", **attributes)


def normalised(tmp_path, nodes, **options):
    statistics = {
        "k": rng.normal(size=(3, 4, 3, 3)).astype(np.float32),
        "g": np.asarray([1.0, -2.0, 0.5], np.float32),
        "b": np.ones(3, np.float32),
        "m": np.ones(3, np.float32),
        "v": np.asarray([0.25, 0.5, 4.0], np.float32),
    }
    path = save(tmp_path / "m.onnx", nodes, weights=statistics, inputs=[value("x", [1, 4, 5, 5])], **options)
    return statistics, read_model(path)


def test_a_normalisation_behind_a_convolution(tmp_path):
    conv = helper.make_node("Conv", ["x", "k"], ["a"], name="conv", pads=[1, 1, 1, 1])
    statistics, (layer,) = normalised(tmp_path, [conv, batch_norm(epsilon=0.01)])
    (row,) = bounds_reports([layer], get_backend("numpy"), rtol=1e-4)
    scale = statistics["g"].astype(float) / np.sqrt(statistics["v"].astype(float) + 0.01)
    kernel = statistics["k"] * scale[:, None, None, None]
    matrix = dense_matrix(kernel, (24, 24), "OIHW", stride=(1, 1), dilation=(1, 1), padding_mode="circular")
    on_grid = np.linalg.norm(matrix, 2)
    assert on_grid <= row.folded_upper <= on_grid * 1.05
    assert row.normalisation == "bn"
    assert row.upper != row.folded_upper


def test_normalisations_that_are_not_folded(tmp_path):
    conv = helper.make_node("Conv", ["x", "k"], ["a"], name="conv")
    relu = helper.make_node("Relu", ["a"], ["r"])
    cases = {
        "read twice": [conv, batch_norm(target="z"), helper.make_node("Add", ["a", "z"], ["y"])],
        "behind a relu": [conv, relu, batch_norm("r")],
        "training": [conv, batch_norm(training_mode=1)],
        "an output too": [conv, batch_norm(target="z"), helper.make_node("Identity", ["a"], ["y"])],
    }
    for name, nodes in cases.items():
        _, (layer,) = normalised(tmp_path, nodes)
        assert layer.normalisation is None, name


# ---- Keras -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_keras_files(tmp_path, suffix):
    keras = pytest.importorskip("keras")
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(5, name="fc")]
    )
    model.save(tmp_path / f"m.{suffix}")
    found = bounds_of(tmp_path / f"m.{suffix}")
    assert list(found)[-1] == "fc"
    close_above(found["fc"].upper, float(np.linalg.norm(np.asarray(model.get_layer("fc").kernel.numpy()), 2)))
    assert len(bounds_of(tmp_path / f"m.{suffix}", ReadOptions())) == 1
