"""Dense layers and folded normalisations of live models in `analyze`, against the layer applied to the identity."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import convsv_core as convsv


def trained(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_var.uniform_(0.1, 2)
                module.running_mean.normal_()
                if module.affine:
                    module.weight.normal_()
    return model


def true_norm(function, shape):
    """Return the norm of an affine map of images, applied to the identity in float64."""
    size = int(np.prod(shape))
    with torch.no_grad():
        zero = function(torch.zeros(1, *shape, dtype=torch.float64))
        matrix = function(torch.eye(size, dtype=torch.float64).reshape(size, *shape)) - zero
    return float(torch.linalg.matrix_norm(matrix.reshape(size, -1), 2))


class Network(nn.Module):
    """A network whose modules are called in another order than they were made."""

    def __init__(self):
        super().__init__()
        self.norm2 = nn.BatchNorm2d(4)
        self.norm1 = nn.BatchNorm2d(6, affine=False)
        self.first = nn.Conv2d(3, 6, 3, padding=1, groups=3)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
        self.after_relu = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 5)
        self.norm3 = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 2, bias=False)

    def forward(self, x):
        x = torch.relu(self.norm1(self.first(x)))
        x = self.norm2(self.up(x))
        x = self.after_relu(torch.relu(self.last(x)))
        return self.head(self.norm3(self.fc(x.mean((2, 3)))))


def test_the_forward_pass_tells_which_normalisation_follows():
    model = trained(Network())
    report = convsv.analyze(model, torch.zeros(2, 3, 6, 6), linear=True)
    rows = {row.name: row for row in report}
    assert list(rows) == ["first", "up", "last", "fc", "head"]
    assert {name: row.normalisation for name, row in rows.items()} == {
        "first": "norm1",
        "up": "norm2",
        "last": None,
        "fc": "norm3",
        "head": None,
    }
    assert model.training
    model = copy.deepcopy(model).eval().double()
    first = true_norm(lambda x: model.norm1(model.first(x)), (3, 6, 6))
    up = true_norm(lambda x: model.norm2(model.up(x)), (6, 5, 5))
    fc = true_norm(lambda x: model.norm3(model.fc(x)), (4,))
    assert first <= rows["first"].folded_upper <= 1.5 * first
    assert up <= rows["up"].folded_upper <= 1.5 * up
    assert fc <= rows["fc"].folded_upper <= fc * 1.01
    for name in ("fc", "head"):
        norm = float(torch.linalg.matrix_norm(getattr(model, name).weight.detach(), 2))
        assert rows[name].operator_norm == pytest.approx(norm, rel=1e-5)
        assert rows[name].linear
    text = str(report)
    assert "5x4 dense" in text
    assert "with norm.: a certified bound" in " ".join(text.split())


def test_without_a_call_only_sequences_count():
    def block():
        return nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))

    shared = nn.Conv2d(3, 3, 1)
    hooked = block()
    hooked[0].register_forward_hook(lambda module, args, output: output.relu())

    class Own(nn.Sequential):
        def forward(self, x):
            return self[1](torch.relu(self[0](x)))

    model = trained(
        nn.ModuleDict(
            {
                "plain": block(),
                "own": Own(*block()),
                "list": nn.ModuleList(block()),
                "twice": nn.Sequential(shared, nn.BatchNorm2d(3), shared),
                "hooked": hooked,
                "no statistics": nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
            }
        )
    )
    rows = {row.name: row for row in convsv.analyze(model)}
    assert [name for name, row in rows.items() if row.folded_upper is not None] == ["plain.0"]
    norm = true_norm(copy.deepcopy(model["plain"]).eval().double(), (3, 8, 8))
    assert norm <= rows["plain.0"].folded_upper <= 1.3 * norm


def test_an_output_that_is_used_twice_or_changed_has_no_normalisation():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return y + self.norm(y)

    class InPlace(Skips):
        def forward(self, x):
            return self.norm(self.conv(x).relu_())

    for kind in (Skips, InPlace):
        (row,) = convsv.analyze(trained(kind()), torch.zeros(1, 3, 4, 4))
        assert row.normalisation is None
        assert row.folded_upper is None


def test_reports_without_such_layers_have_no_such_columns():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    report = convsv.analyze(model, torch.zeros(1, 3, 3, 3))
    assert [row.name for row in report] == ["0"]
    assert "with norm." not in str(report)
    assert not {"linear", "normalisation", "folded_upper"} & set(report.document()["layers"][0])
    report = convsv.analyze(model, torch.zeros(1, 3, 3, 3), linear=True)
    assert [layer["linear"] for layer in report.document()["layers"]] == [False, True]


def test_keras_dense_layers():
    keras = pytest.importorskip("keras")
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(5)]
    )
    conv, dense = convsv.analyze(model, linear=True)
    assert (conv.linear, dense.linear) == (False, True)
    kernel = np.asarray(model.layers[-1].kernel.numpy())
    assert dense.operator_norm == pytest.approx(np.linalg.norm(kernel, 2), rel=1e-5)
    assert dense.name == model.layers[-1].kernel.path
    assert len(convsv.analyze(model)) == 1
    model.layers[-1].enable_lora(2)
    model.layers[-1].lora_kernel_b.assign(np.ones((2, 5)))
    _, dense = convsv.analyze(model, linear=True)
    merged = np.asarray(keras.ops.convert_to_numpy(model.layers[-1].kernel))
    assert dense.operator_norm == pytest.approx(np.linalg.norm(merged, 2), rel=1e-5)
