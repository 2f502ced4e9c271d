"""Tests of the formats that hold named arrays: PyTorch checkpoints, safetensors and npz."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from convsv_adapters.parameters import is_kernel, layers_from_arrays, put_together

from convsv_core.layers import ModelError, ReadOptions
from convsv_core.reports import read_model

rng = np.random.default_rng(0)


def network():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 2),
    )


def assume(arrays, *shape, layout=None, ordered=True, **named):
    options = ReadOptions(({"": shape} if shape else {}) | named, layout)
    return layers_from_arrays(arrays.items(), options, "file", ordered=ordered)


# ---- what is assumed ------------------------------------------------------------------------------------


def test_kernels_are_floating_arrays_of_rank_3_to_5_by_name():
    kernel = np.ones((2, 3, 3, 3), np.float32)
    for name in ("conv.weight", "params/Conv_0/kernel", "patch_embed.proj.weight", "arr_0", "upscale"):
        assert is_kernel(name, kernel), name
    for name in ("pos_embed", "cls_token", "relative_position_bias_table", "attn_mask", "block.gamma", "bn.mean"):
        assert not is_kernel(name, kernel), name
    assert not is_kernel("fc.weight", kernel[0, 0])
    assert not is_kernel("index", kernel.astype(np.int64))
    assert not is_kernel("conv.weight", kernel[:0])
    assert is_kernel("conv.weight", kernel.astype(np.complex64))


def test_the_note_says_what_was_assumed():
    (layer,) = assume({"w": np.ones((2, 3, 3, 3))})
    assert layer.input_shape == (32, 32)
    assert layer.note == "assumed stride 1, dilation 1, groups 1, padding same, layout OIHW, extents 32x32"
    (layer,) = assume({"conv.w": np.ones((2, 3, 3))}, 3, 100)
    assert layer.input_shape == (100,)
    assert layer.note.endswith("layout OIW, the given extents at every layer")


@pytest.mark.parametrize("shape", [(3, 20, 12), (20, 12), (1, 3, 20, 12), (20, 12, 3), (1, 20, 12, 3)])
def test_the_input_shape_ends_in_the_extents(shape):
    (layer,) = assume({"w": np.ones((2, 3, 3, 3))}, *shape)
    assert layer.input_shape == (20, 12)


def test_one_extent_stands_for_every_axis_and_too_few_are_refused():
    (layer,) = assume({"w": np.ones((2, 3, 3, 3, 3))}, 7)
    assert layer.input_shape == (7, 7, 7)
    with pytest.raises(ModelError, match="has no 3 spatial extents"):
        assume({"w": np.ones((2, 3, 3, 3, 3))}, 7, 7)


def test_an_input_shape_for_one_layer():
    arrays = {"a": np.ones((2, 3, 3, 3)), "b": np.ones((2, 2, 3, 3))}
    first, second = assume(arrays, 3, 20, 12, b=(10, 6))
    assert (first.input_shape, second.input_shape) == ((20, 12), (10, 6))
    with pytest.raises(ModelError, match="no kernel is called 'c'"):
        assume(arrays, c=(10, 6))


def test_depthwise_unless_it_is_the_networks_first():
    arrays = {"stem": np.ones((8, 1, 3, 3)), "depthwise": np.ones((8, 1, 3, 3)), "head": np.ones((1, 8, 1, 1))}
    stem, depthwise, head = assume(arrays)
    assert (stem.conv.groups, depthwise.conv.groups, head.conv.groups) == (1, 8, 1)
    assert "depthwise" not in stem.note
    assert "depthwise for its one input channel" in depthwise.note
    stem, *_ = assume(arrays, 3, 32, 32)  # three input channels: the first array is not the stem
    assert stem.conv.groups == 8


def test_layout():
    arrays = {"a": np.ones((5, 5, 3, 8)), "conv": np.ones((5, 3, 8))}
    first, second = assume(arrays, layout="HWIO")
    assert (first.conv.layout, second.conv.layout) == ("HWIO", "WIO")
    assert "layout" not in first.note
    first, second = assume(arrays, layout="WIO")
    assert (first.conv.layout, second.conv.layout) == ("HWIO", "WIO")


def test_arrays_without_order_are_sorted_by_name_and_number():
    arrays = {f"convs.{index}.weight": np.ones((2, 2, 3)) for index in (10, 9, 1)}
    layers = assume(arrays, ordered=False)
    assert [layer.name for layer in layers] == ["convs.1.weight", "convs.9.weight", "convs.10.weight"]
    assert "order by name" in layers[0].note


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "normalise",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.spectral_norm,
        torch.nn.utils.parametrizations.spectral_norm,
    ],
    ids=["old weight_norm", "weight_norm", "old spectral_norm", "spectral_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_normalised_weights_are_put_together(normalise, transposed):
    torch.manual_seed(0)
    layer = (torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d)(3, 5, 3)
    model = torch.nn.Sequential(normalise(layer), torch.nn.Conv2d(5, 5, 1)).eval()
    model(torch.ones(1, 3, 8, 8))
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    layers = assume(arrays)
    assert [layer.name for layer in layers] == ["0.weight", "1.weight"]
    np.testing.assert_allclose(layers[0].kernel, model[0].weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_names_that_only_look_like_parts_stay():
    arrays = {"a.weight_v": np.ones((2, 2, 3)), "b.weight_orig": np.ones((2, 2, 3))}
    assert put_together(arrays) == arrays


# ---- PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"optimizer": {"state": {0: {"exp_avg": torch.ones(9, 9, 9, 9)}}}, "model": state},
        lambda state: {"model": {"state_dict": {f"module.{name}": t for name, t in state.items()}}},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    ],
    ids=["plain", "state_dict", "beside an optimiser", "DataParallel", "compiled"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict(tmp_path, wrap, zipped):
    state = network().state_dict()
    torch.save(wrap(state), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    first, second = read_model(tmp_path / "m.pt", ReadOptions())
    assert (first.name, second.name) == ("0.weight", "2.weight")
    assert second.conv.groups == 8
    np.testing.assert_array_equal(first.kernel, state["0.weight"].numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file], ids=["torch", "safetensors"])
def test_dtypes(tmp_path, dtype, save):
    kernel = torch.randn(4, 3, 3, 3).to(getattr(torch, dtype))
    save({"w": kernel}, tmp_path / "m")  # known by its content
    (layer,) = read_model(tmp_path / "m", ReadOptions())
    assert layer.kernel.dtype == ("float32" if dtype == "bfloat16" else dtype)
    np.testing.assert_array_equal(layer.kernel, kernel.to(torch.float64).numpy())


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_half_precision_complex_numbers_keep_their_imaginary_parts(tmp_path):
    kernel = torch.randn(4, 3, 3, 3, dtype=torch.complex64).to(torch.complex32)
    torch.save({"w": kernel}, tmp_path / "m.pt")
    (layer,) = read_model(tmp_path / "m.pt", ReadOptions())
    np.testing.assert_array_equal(layer.kernel, kernel.to(torch.complex64).numpy())
    assert layer.stored is None


class Payload:
    """An object whose pickle is a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_code_in_a_pickle_is_not_run(tmp_path, save, suffix):
    trace = tmp_path / "trace"
    save({"weight": torch.ones(2, 2, 3, 3), "other": Payload(trace)}, tmp_path / f"m{suffix}")
    with pytest.raises(ModelError, match="never loaded") as caught:
        read_model(tmp_path / f"m{suffix}", ReadOptions())
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(network(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"holds torch\.nn\.modules\.container\.Sequential"):
        read_model(tmp_path / "m.pt", ReadOptions())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(network().eval(), torch.ones(1, 3, 5, 5)[..., :5, :5]), tmp_path / "m.pt")
    with pytest.raises(ModelError, match="TorchScript"):
        read_model(tmp_path / "m.pt", ReadOptions())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.99, 0.5, 0.1])
def test_truncated_checkpoint(tmp_path, keep, zipped):
    path = tmp_path / "m.pt"
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ModelError) as caught:
        read_model(path, ReadOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checkpoint", [[1, 2], {"epoch": 3}, {}])
def test_a_checkpoint_without_tensors(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "m.pt")
    with pytest.raises(ModelError, match="no state dict"):
        read_model(tmp_path / "m.pt", ReadOptions())


# ---- safetensors ------------------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    state = network().state_dict()
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    first, second = read_model(tmp_path / "m.safetensors", ReadOptions())
    assert (first.name, second.name) == ("0.weight", "2.weight")
    np.testing.assert_array_equal(second.kernel, state["2.weight"].numpy())


def test_safetensors_of_a_type_that_is_not_read(tmp_path):
    state = {"w": torch.ones(2, 2, 3, 3).to(torch.float8_e4m3fn), "v": torch.ones(2, 2, 3, 3)}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    good, bad = read_model(tmp_path / "m.safetensors", ReadOptions())
    assert good.kernel is not None
    assert (bad.name, bad.kernel) == ("w", None)
    assert "F8_E4M3" in bad.note


@pytest.mark.parametrize("keep", [4, 20, -4])
def test_truncated_safetensors(tmp_path, keep):
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors.numpy.save({"w": np.ones((2, 2, 3, 3))})[:keep])
    with pytest.raises(ModelError, match="not a safetensors file, or a damaged one"):
        read_model(path, ReadOptions())


# ---- npz --------------------------------------------------------------------------------------------------


def test_npz(tmp_path):
    np.savez(tmp_path / "m.npz", z=np.ones((2, 3, 3, 3)), cnn=np.ones((2, 2, 5), np.float32), b=np.ones(3))
    first, second = read_model(tmp_path / "m.npz", ReadOptions())
    assert (first.name, second.name) == ("z", "cnn")
    assert (first.conv.layout, second.conv.layout) == ("OIHW", "OIW")


def test_npz_with_pickled_objects(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.ones((2, 3, 3, 3)), code=np.asarray([Payload(tmp_path / "trace")], object))
    with pytest.raises(ModelError, match="never loaded"):
        read_model(tmp_path / "m.npz", ReadOptions())
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04"])
def test_not_an_npz(tmp_path, content):
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(ModelError):
        read_model(tmp_path / "m.npz", ReadOptions())


def test_damaged_npz(tmp_path):
    path = tmp_path / "m.npz"
    np.savez_compressed(path, w=rng.normal(size=(4, 4, 3, 3)))
    content = bytearray(path.read_bytes())
    content[200:230] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        read_model(path, ReadOptions())


# ---- any format ---------------------------------------------------------------------------------------------


def test_a_file_that_no_reader_knows(tmp_path):
    (tmp_path / "m.txt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    for name in ("m.txt", "m.zip"):
        with pytest.raises(
            ModelError,
            match=r"in no format that is known here \(keras_file, npz, onnx, safetensors, sharded, state_dict\)",
        ):
            read_model(tmp_path / name, ReadOptions())


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        read_model(tmp_path / "m.onnx", ReadOptions())


@pytest.mark.parametrize(
    ("library", "file", "extra"),
    [("torch", "m.pt", "torch"), ("onnx", "m.onnx", "cli"), ("safetensors", "m.safetensors", "cli")],
)
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, library, file, extra):
    (tmp_path / file).write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModelError) as caught:
        read_model(tmp_path / file, ReadOptions())
    assert str(caught.value).endswith(f"reading it needs {library}: pip install 'convsv[{extra}]'")


def test_importing_the_readers_imports_no_library():
    code = """
import sys
import convsv_core.reports.analysis
import convsv_adapters.formats.onnx.reader, convsv_adapters.formats.state_dict
import convsv_adapters.formats.safetensors, convsv_adapters.formats.npz
loaded = {"onnx", "onnxruntime", "torch", "safetensors", "jax", "matplotlib"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_of_nothing_but_three_axes_holds_kernels(tmp_path):
    kernel = np.hanning(9)[None, None].astype("float32")
    np.savez(tmp_path / "alone.npz", **{"fc.weight": kernel})
    np.savez(tmp_path / "beside.npz", **{"fc.weight": kernel, "head": np.ones((2, 2), "float32")})
    (alone,), (beside,) = (read_model(tmp_path / name, ReadOptions()) for name in ("alone.npz", "beside.npz"))
    assert alone.kernel is not None
    assert beside.kernel is None
    assert "its three axes may be" in beside.note
