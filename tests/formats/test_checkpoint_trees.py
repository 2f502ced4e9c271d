"""Tests of what a checkpoint holds: every network is read, and nothing that is none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from projected_files import run
from torch import nn

from convsv_core.layers import Geometry, ModelError, ReadOptions
from convsv_core.reports import read_model


def network(seed=0, scale=1.0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    model[0].weight.data *= scale
    return model


def truth(model, index=0, **options):
    """Return the norm of the circular convolution on 8 x 8 pixels, from its matrix in float64."""
    weight = model[index].weight.detach().double()
    return truth_of(weight, (8, 8), **options)


def truth_of(weight, extents, **options):
    shape = (weight.shape[1] * options.get("groups", 1), *extents)
    images = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    pads = [side for taps in reversed(weight.shape[2:]) for side in (taps // 2, (taps - 1) // 2)]
    function = nn.functional.conv2d if len(extents) == 2 else nn.functional.conv1d
    outputs = function(nn.functional.pad(images, pads, mode="circular"), weight, **options)
    return float(torch.linalg.matrix_norm(outputs.reshape(len(images), -1), 2))


def figures(path, *options):
    """Return the norm of each layer by name, and what is said on stderr."""
    result = run("spectrum", path, "--input-shape", "8,8", *options, "--json", "-")
    assert result.exit_code == 0, result.output
    return {layer["name"]: layer["operator_norm"] for layer in json.loads(result.stdout)["layers"]}, result.stderr


def adam(model):
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    return optimizer.state_dict()


# ---- networks in a tree ------------------------------------------------------------------------------------


def test_a_metric_kept_as_a_tensor_hides_no_network(tmp_path):
    model = network()
    state = {"module.conv.weight": model[0].weight.detach()}
    torch.save({"epoch": 1, "state_dict": state, "best_acc1": torch.tensor(76.1)}, tmp_path / "m.pth.tar")
    norms, said = figures(tmp_path / "m.pth.tar")
    assert norms == {"conv.weight": pytest.approx(truth(model), rel=1e-5)}
    assert said == ""


@pytest.mark.parametrize("number", [np.float64(76.1), np.float32(3), np.int64(3), np.bool_(True)])
def test_a_metric_kept_as_a_numpy_number_is_no_obstacle(tmp_path, number):
    torch.save({"state_dict": network().state_dict(), "best": number}, tmp_path / "m.pt")
    assert [layer.name for layer in read_model(tmp_path / "m.pt")] == ["0.weight"]
    result = run("project", tmp_path / "m.pt", "--bound", 1, "-o", tmp_path / "out.pt", "--method", "rescale")
    assert result.exit_code == 0
    assert (tmp_path / "out.pt").exists()


def test_the_state_of_an_optimizer_is_named_and_never_read(tmp_path):
    model = network()
    state = adam(model)
    torch.save({"epoch": 1, "optimizer": state, "netG": model.state_dict()}, tmp_path / "m.pth")
    norms, said = figures(tmp_path / "m.pth")
    assert norms == {"0.weight": pytest.approx(truth(model), rel=1e-5)}
    assert said == "m.pth: left out optimizer: the state of an optimizer\n"
    result = run("project", tmp_path / "m.pth", "--bound", 0.5, "-o", tmp_path / "out.pth", "--method", "rescale")
    assert result.exit_code == 0
    assert "left out optimizer" in result.stderr
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    for before, after in zip(state["state"].values(), found["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(after[key], before[key]) for key in before)
    model.load_state_dict(found["netG"])
    assert truth(model) <= 0.5


@pytest.mark.parametrize("key", ["trainer", "opt_g", "optimizer_states"])
def test_optimizers_are_known_by_their_form_or_their_key(tmp_path, key):
    model = network()
    state = adam(model)
    kept = state["state"] if key == "opt_g" else [state] if key == "optimizer_states" else state
    torch.save({key: kept, "state_dict": model.state_dict()}, tmp_path / "m.pt")
    layers = read_model(tmp_path / "m.pt")
    assert [layer.name for layer in layers] == ["0.weight"]
    assert {part.path.partition("/")[0] for part in layers.left_out} == {key}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_the_state_of_an_optimizer_in_a_flat_list_of_arrays(tmp_path, suffix):
    kernel = np.ones((4, 4, 3, 3), np.float32)
    names = ["opt_state/0/mu/conv/kernel", "opt_state/0/nu/conv/kernel", "optimizer.state.0.exp_avg", "conv/kernel"]
    path = tmp_path / f"m{suffix}"
    if suffix == ".npz":
        np.savez(path, **dict.fromkeys(names, kernel))
    else:
        save = torch.save if suffix == ".pt" else safetensors.torch.save_file
        save({name: torch.from_numpy(kernel.copy()) for name in names}, path)
    layers = read_model(path)
    assert [layer.name for layer in layers] == ["conv/kernel"]
    assert {part.path for part in layers.left_out} == {"opt_state", "optimizer"}


def test_every_network_is_listed_by_its_path_and_one_can_be_chosen(tmp_path):
    models = {"g": network(0), "d": network(1, 5), "g_ema": network(2, 9)}
    wanted = {name: pytest.approx(truth(model), rel=1e-5) for name, model in models.items()}
    torch.save({name: model.state_dict() for name, model in models.items()}, tmp_path / "m.pt")
    norms, _ = figures(tmp_path / "m.pt")
    assert norms == {f"{name}/0.weight": norm for name, norm in wanted.items()}
    norms, said = figures(tmp_path / "m.pt", "--network", "d")
    assert norms == {"0.weight": wanted["d"]}
    assert said == "m.pt: left out g: another network\nm.pt: left out g_ema: another network\n"
    with pytest.raises(ModelError, match="no network is called 'q'; its networks are g, d, g_ema"):
        read_model(tmp_path / "m.pt", ReadOptions(network="q"))
    arguments = ["--bound", 1, "--method", "rescale", "-o", tmp_path / "out.pt"]
    result = run("project", tmp_path / "m.pt", *arguments, "--network", "g_ema")
    assert (result.exit_code, "left out g: another network" in result.stderr) == (0, True)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, model in models.items():
        assert torch.equal(found[name]["0.weight"], model[0].weight) == (name != "g_ema")
    run("project", tmp_path / "m.pt", *arguments, "--force")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, model in models.items():
        model.load_state_dict(found[name])
        assert truth(model) <= 1


def test_tensors_beside_networks_are_no_kernels(tmp_path):
    torch.save({"net": network().state_dict(), "fixed_noise": torch.randn(64, 100, 1, 1)}, tmp_path / "m.pt")
    layers = read_model(tmp_path / "m.pt")
    assert [layer.name for layer in layers] == ["0.weight"]
    assert [part.reason for part in layers.left_out] == ["tensors beside the networks of the file"]


def test_a_network_of_nested_mappings_is_one_network(tmp_path):
    layers = {f"conv{index}": {"kernel": torch.randn(8, 1, 3, 3), "bias": torch.ones(8)} for index in range(3)}
    torch.save({"params": layers}, tmp_path / "m.pt")
    found = read_model(tmp_path / "m.pt")
    assert [layer.name for layer in found] == [f"conv{index}.kernel" for index in range(3)]
    assert [layer.conv.groups for layer in found] == [1, 8, 8]


def test_wrappers_are_left_out_of_names_unless_two_would_be_alike(tmp_path):
    state = {f"net.{part}.weight": torch.randn(4, 4, 3, 3) for part in ("_orig_mod.a", "module.b", "module.c", "c")}
    torch.save(state, tmp_path / "m.pt")
    names = [layer.name for layer in read_model(tmp_path / "m.pt")]
    assert names == ["net.a.weight", "net.b.weight", "net.module.c.weight", "net.c.weight"]


# ---- what is no kernel, and what cannot be read ------------------------------------------------------------


def test_the_weight_of_a_layer_normalisation_is_no_kernel(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 8, 8]))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    norms, _ = figures(tmp_path / "m.pt")
    assert norms == {"0.weight": pytest.approx(truth(model), rel=1e-5)}
    result = run("project", tmp_path / "m.pt", "--bound", 0.5, "-o", tmp_path / "out.pt", "--method", "rescale")
    assert result.exit_code == 0
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(found["1.weight"], torch.ones(8, 8, 8))


def test_three_axes_alone_make_no_kernel_and_project_refuses_it_by_name(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 8, 8], bias=False))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    norms, said = figures(tmp_path / "m.pt")
    assert norms["1.weight"] is None
    assert "1 of 2 convolutions have no figures" in said
    result = run("project", tmp_path / "m.pt", "--bound", 0.5, "-o", tmp_path / "out.pt", "--method", "rescale")
    assert result.exit_code == 1
    assert "1.weight" in result.stderr
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    "beside",
    [
        {"x.weight": torch.ones(6, 4, 3), "x.bias": torch.ones(6)},
        {"conv.weight": torch.ones(6, 4, 3)},
        {"x.weight": torch.ones(6, 4, 3), "y.weight": torch.ones(6), "y.running_mean": torch.ones(6)},
    ],
    ids=["bias", "name", "batch normalisation"],
)
def test_companions_tell_a_kernel_of_three_axes(tmp_path, beside):
    torch.save(beside, tmp_path / "m.pt")
    (layer,) = read_model(tmp_path / "m.pt")
    assert layer.kernel is not None


def test_experts_and_modulated_kernels_have_the_reason(tmp_path):
    state = {
        "bilinear.weight": torch.ones(4, 5, 6),
        "bilinear.bias": torch.ones(4),
        "attention.query.kernel": torch.ones(8, 2, 4),
        "attention.query.bias": torch.ones(2, 4),
        "attention.out.kernel": torch.ones(2, 4, 8),
        "attention.out.bias": torch.ones(8),
        "heads.kernel": torch.ones(2, 4, 8),
        "heads.bias": torch.ones(8),
        "experts.w.weight": torch.ones(4, 5, 6),
        "experts.w.bias": torch.ones(4, 6),
        "style.weight": torch.ones(1, 8, 8, 3, 3),
        "style.modulation.weight": torch.ones(8, 16),
    }
    torch.save(state, tmp_path / "m.pt")
    layers = read_model(tmp_path / "m.pt")
    assert len(layers) == 6
    assert not [layer.name for layer in layers if layer.kernel is not None]
    layers = read_model(tmp_path / "m.pt", ReadOptions(layers={"heads.kernel": Geometry(stride=1)}))
    assert [layer.name for layer in layers if layer.kernel is not None] == ["heads.kernel"]


def test_a_bias_tells_the_axis_of_the_outputs(tmp_path):
    state = {
        "up.weight": torch.randn(6, 4, 3, 3),
        "up.bias": torch.ones(4),
        "keras.kernel": torch.randn(3, 3, 4, 5),
        "keras.bias": torch.ones(5),
        "odd.weight": torch.randn(3, 3, 4, 5),
        "odd.bias": torch.ones(7),
    }
    torch.save(state, tmp_path / "m.pt")
    up, keras, odd = read_model(tmp_path / "m.pt")
    assert (up.conv.layout, up.conv.transposed) == ("IOHW", True)
    assert (keras.conv.layout, keras.conv.transposed) == ("HWIO", False)
    assert (odd.kernel, "its bias has 7 entries" in odd.note) == (None, True)


@pytest.mark.filterwarnings("ignore")
def test_numbers_that_cannot_be_read_have_a_row_with_the_reason(tmp_path):
    state = {
        "first.weight": torch.randn(8, 3, 3, 3),
        "conv.weight": torch.quantize_per_tensor(torch.randn(8, 8, 3, 3), 0.01, 0, torch.qint8),
        "int.weight": torch.ones(8, 8, 3, 3, dtype=torch.int8),
        "scaled.weight": torch.ones(8, 8, 3, 3).to(torch.float8_e4m3fn),
        "scaled.weight_scale": torch.ones(1),
    }
    torch.save(state, tmp_path / "m.pt")
    first, quantised, integers, scaled = read_model(tmp_path / "m.pt")
    assert first.kernel is not None
    assert (quantised.kernel, "qint8" in quantised.note) == (None, True)
    assert (integers.kernel, "int8" in integers.note) == (None, True)
    assert (scaled.kernel, "scaled.weight_scale" in scaled.note) == (None, True)
    safetensors.torch.save_file({"conv.weight": state["int.weight"]}, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz", **{"conv.weight": np.ones((8, 8, 3, 3), np.int8)})
    for name in ("m.safetensors", "m.npz"):
        (layer,) = read_model(tmp_path / name)
        assert (layer.kernel, "int8" in layer.note) == (None, True)


def test_a_file_of_the_meta_device_has_rows_with_the_reason(tmp_path):
    torch.save({"c.weight": torch.empty(8, 3, 3, 3, device="meta")}, tmp_path / "m.pt")
    (layer,) = read_model(tmp_path / "m.pt")
    assert (layer.kernel, "meta device" in layer.note) == (None, True)
    result = run("project", tmp_path / "m.pt", "--bound", 1, "-o", tmp_path / "out.pt")
    assert (result.exit_code, "c.weight" in result.stderr) == (1, True)


@pytest.mark.parametrize(("ending", "save"), [("safetensors", safetensors.torch.save_file), ("bin", torch.save)])
def test_shards_are_read_as_one_model(tmp_path, ending, save):
    kernels = {f"conv{index}.weight": torch.randn(8, 8, 3, 3) for index in (10, 2, 1)}
    index = {}
    for number, (name, kernel) in enumerate(kernels.items()):
        index[name] = f"model-{number}.{ending}"
        save({name: kernel}, tmp_path / index[name])
    path = tmp_path / f"model.{ending}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    layers = read_model(path)
    assert [layer.name for layer in layers] == ["conv1.weight", "conv2.weight", "conv10.weight"]
    for layer in layers:
        np.testing.assert_array_equal(layer.kernel, kernels[layer.name])
    (tmp_path / index["conv2.weight"]).unlink()
    with pytest.raises(ModelError, match="is missing"):
        read_model(path)
    path.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="no file beside it"):
        read_model(path)


def test_an_alphabetical_archive_is_put_in_natural_order(tmp_path):
    np.savez(tmp_path / "m.npz", **{f"conv{index}": np.ones((4, 4, 3, 3)) for index in (1, 10, 2)})
    assert [layer.name for layer in read_model(tmp_path / "m.npz")] == ["conv1", "conv2", "conv10"]
    np.savez(tmp_path / "m.npz", **{name: np.ones((4, 4, 3, 3)) for name in ("stem", "conv10", "conv2")})
    assert [layer.name for layer in read_model(tmp_path / "m.npz")] == ["stem", "conv10", "conv2"]


# ---- geometry that the user states ---------------------------------------------------------------------------


def test_groups_are_assumed_and_can_be_stated(tmp_path):
    torch.manual_seed(0)
    conv = nn.Conv1d(32, 32, 8, groups=4, padding=4, bias=False)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(conv, dim=2))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    (layer,) = read_model(tmp_path / "m.pt")
    assert "groups 1" in layer.note
    result = run("spectrum", tmp_path / "m.pt", "--layer", "0.w*:groups=4,padding=4", "--json", "-")
    (row,) = json.loads(result.stdout)["layers"]
    wanted = truth_of(model[0].weight.detach().double(), (32,), groups=4)
    assert (row["groups"], row["operator_norm"]) == (4, pytest.approx(wanted, rel=1e-5))
    assert "groups" not in row["note"]


def test_the_stated_geometry_of_a_layer(tmp_path):
    np.savez(tmp_path / "m.npz", a=np.ones((4, 2, 3, 3)), b=np.ones((4, 2, 3, 3)), c=np.ones((4, 4, 3)))
    stated = Geometry(groups=2, stride=(2, 1), dilation=2, padding=1, transposed=True)
    a, b, c = read_model(tmp_path / "m.npz", ReadOptions(layers={"[bc]": Geometry(stride=3), "b": stated}))
    assert (a.conv.strides, a.conv.transposed) == ((1, 1), False)
    assert (b.conv.strides, b.conv.dilations, b.conv.groups, b.conv.transposed) == ((2, 1), (2, 2), 2, True)
    assert (b.conv.layout, b.conv.padding) == ("IOHW", ((1, 1), (1, 1)))
    assert (c.conv.layout, c.conv.strides) == ("OIW", (3,))
    for layers, message in [
        ({"d": Geometry()}, "no kernel is called 'd'"),
        ({"a": Geometry(groups=3)}, "'a' has 4 channels, which 3 groups do not divide"),
        ({"a": Geometry(stride=(1, 2, 3))}, "the geometry stated for 'a'"),
    ]:
        with pytest.raises(ModelError, match=message):
            read_model(tmp_path / "m.npz", ReadOptions(layers=layers))


@pytest.mark.parametrize("value", ["a:group=2", "a:groups=x", "a:groups=0", "a", "a:stride=1,stride=2", ":groups=2"])
def test_a_wrong_layer_option_is_refused_before_the_work(tmp_path, value):
    np.savez(tmp_path / "m.npz", a=np.ones((4, 2, 3, 3)))
    assert run("norm", tmp_path / "m.npz", "--layer", value).exit_code == 2


def test_formats_with_geometry_refuse_the_options():
    for options in (("--layer", "a:groups=2"), ("--network", "g")):
        result = run("norm", *options)
        assert result.exit_code == 1
        assert result.stderr.count("\n") <= 2
