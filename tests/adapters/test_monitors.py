"""Tests of the monitors: what they measure, that they change nothing, and where they write."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convsv_adapters.torch import SpectrumMonitor, analyze, conv_layers
from torch import nn
from torch.nn.utils import parametrizations
from torch_models import images, network, train

import convsv_core as convsv

FIGURES = ("certified_norm", "reshaped_norm", "stable_rank", "smallest_singular_value")
EPS = float(np.finfo("float32").eps)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Writer:
    """Keeps what TensorBoard's SummaryWriter would write."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.histograms: dict[tuple[str, int], Any] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars[tag, global_step] = scalar_value

    def add_histogram(self, tag: str, values: Any, global_step: int) -> None:
        self.histograms[tag, global_step] = values


def test_the_figures_are_those_of_the_layers() -> None:
    model, batch = network(), images()
    monitor = SpectrumMonitor(model, batch)
    monitor.measure()
    (measurement,) = monitor.measurements
    assert measurement.step == 0
    for found, report, layer in zip(measurement.layers, analyze(model, batch), conv_layers(model, batch), strict=True):
        assert report.operator_norm is not None
        assert found.name == report.name
        assert found.sampled_shape == report.input_shape
        exact = float(convsv.operator_norm(layer.weight.detach(), layer.input_shape, layer.conv))
        assert found.certified_norm * (1 + 20 * EPS) >= exact
        assert found.reshaped_norm == pytest.approx(report.reshaped_norm, rel=20 * EPS)
        tolerance = 20 * EPS * report.operator_norm
        assert found.smallest_singular_value == pytest.approx(report.smallest_singular_value, abs=tolerance)
        assert found.stable_rank == pytest.approx(report.stable_rank, rel=60 * EPS)
        assert found.singular_values is None


def test_large_extents_are_sampled() -> None:
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    monitor = SpectrumMonitor(layer, torch.zeros(1, 2, 40, 10), points=7)
    monitor.measure()
    (found,) = monitor.measurements[0].layers
    assert found.sampled_shape == (8, 8)
    conv = convsv.Conv("OIHW", stride=2)
    values = convsv.singular_values(layer.weight.detach(), (8, 8), conv)
    assert found.smallest_singular_value == pytest.approx(float(values[-1]))
    frobenius = float(convsv.frobenius_norm(layer.weight.detach(), (40, 10), conv))
    assert found.stable_rank == pytest.approx((frobenius / found.certified_norm) ** 2)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_every_dtype_is_measured(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1).to(dtype)
    numbers = SpectrumMonitor(layer).measure()
    assert set(numbers) == {f"{name}/" for name in FIGURES if name != "stable_rank"}
    wide = layer.weight.detach().to(torch.complex128 if dtype.is_complex else torch.float64)
    bounds = convsv.norm_bounds(wide, convsv.Conv("OIHW", padding=1, padding_mode="zeros"))
    assert float(bounds.lower) <= numbers["certified_norm/"] <= 1.011 * float(bounds.upper)


def test_nothing_is_changed() -> None:
    model = network().train()
    parametrizations.spectral_norm(model[0])
    model(images())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    numbers = SpectrumMonitor(model, images(), histograms=True).measure()
    torch.random.set_rng_state(random)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    model.eval()  # then the parametrization gives the weight that was measured
    matrix = model[0].weight.detach().flatten(1)
    expected = float(torch.linalg.matrix_norm(matrix, 2))
    assert numbers["reshaped_norm/0"] == pytest.approx(expected, rel=20 * EPS)


def test_steps_are_counted_and_written(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    writer, dicts, path = Writer(), [], tmp_path / "spectra.csv"
    monitor = SpectrumMonitor(model, images(), every=2, log=[writer, dicts.append, path], histograms=True)
    monitor.attach(optimizer)
    train(model, optimizer, 5)
    monitor.remove()
    train(model, optimizer, 1)
    assert monitor.steps == 5
    assert [one.step for one in monitor.measurements] == [entry["step"] for entry in dicts] == [2, 4]
    monitor.finish()
    assert [one.step for one in monitor.measurements] == [2, 4, 5]
    names = [layer.name for layer in monitor.layers]
    tags = {f"{figure}/{name}" for figure in FIGURES for name in names}
    assert set(writer.scalars) == {(tag, step) for tag in tags for step in (2, 4, 5)}
    rows = list(csv.DictReader(path.open()))
    assert [(int(row["step"]), row["layer"]) for row in rows] == [(step, name) for step in (2, 4, 5) for name in names]
    for measurement, entry in zip(monitor.measurements, dicts, strict=True):
        for one in measurement.layers:
            values = entry[f"singular_values/{one.name}"]
            assert values is writer.histograms[f"singular_values/{one.name}", measurement.step]
            assert values[-1] == pytest.approx(one.smallest_singular_value)
            assert np.all(np.diff(values) <= 0)
            for figure in FIGURES:
                tag = f"{figure}/{one.name}"
                assert entry[tag] == getattr(one, figure) == writer.scalars[tag, measurement.step]
    assert float(rows[-1]["certified_norm"]) == monitor.measurements[-1].layers[-1].certified_norm
    resumed = SpectrumMonitor(model, images(), log=path)
    resumed.measure()
    assert len(list(csv.DictReader(path.open()))) == 4 * len(names)


def test_a_training_that_diverged_goes_on() -> None:
    layer = nn.Conv2d(2, 3, 3)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = math.inf
    numbers = SpectrumMonitor(layer, torch.zeros(1, 2, 8, 8)).measure()
    assert len(numbers) == 4
    assert all(math.isnan(number) for number in numbers.values())


def test_layers_without_figures_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    with pytest.raises(ValueError, match="no convolution that can be measured: its weight is computed"):
        SpectrumMonitor(model)
    monitor = SpectrumMonitor(model, torch.zeros(1, 2, 8, 8))
    assert list(monitor.left_out) == ["0"]
    assert {name.partition("/")[2] for name in monitor.measure()} == {"1"}


def test_errors(tmp_path: Path) -> None:
    layer = nn.Conv2d(2, 2, 3)
    with pytest.raises(TypeError, match=r"log is a builtins\.int: wanted a SummaryWriter"):
        SpectrumMonitor(layer, log=[3])
    path = tmp_path / "other.csv"
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="the file has the columns a,b"):
        SpectrumMonitor(layer, log=path)
    with pytest.raises(ValueError, match="every=0"):
        SpectrumMonitor(layer, every=0)
    with pytest.raises(TypeError, match="optimizer is a Conv2d"):
        SpectrumMonitor(layer).attach(layer)
    with pytest.raises(ValueError, match="model has no convolution that can be measured: it has none"):
        SpectrumMonitor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing was measured yet"):
        SpectrumMonitor(layer).plot()


@pytest.mark.parametrize("layers", [3, 12])
def test_the_plot_has_a_line_for_each_layer(layers: int) -> None:
    pytest.importorskip("matplotlib")
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(layers)))
    monitor = SpectrumMonitor(model, torch.zeros(1, 2, 8, 8), every=1)
    monitor.step()
    monitor.step()
    figure = monitor.plot()
    panels = figure.axes[:4]
    assert [len(panel.lines) for panel in panels] == [layers] * 4
    for panel, name in zip(panels, FIGURES, strict=True):
        for line, one in zip(panel.lines, monitor.measurements[1].layers, strict=True):
            assert list(line.get_xdata()) == [1, 2]
            assert line.get_ydata()[1] == getattr(one, name)
    assert bool(figure.legends) == (layers <= 10)
    assert len(figure.axes) == (4 if layers <= 10 else 5)


def test_keras_measures_every_so_many_batches(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    from convsv_adapters.keras import SpectrumMonitor

    keras.utils.set_random_seed(0)
    layers = [keras.layers.SeparableConv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((8, 8, 2)), *layers])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    monitor = SpectrumMonitor((1, 8, 8, 2), every=2, log=tmp_path / "spectra.csv")
    inputs, labels = np.random.default_rng(0).normal(size=(20, 8, 8, 2)), np.zeros(20)
    history = model.fit(inputs, labels, batch_size=4, epochs=1, verbose=0, callbacks=[monitor])
    assert [one.step for one in monitor.measurements] == [2, 4, 5]
    rows = list(csv.DictReader((tmp_path / "spectra.csv").open()))
    assert len(rows) == 6
    last = {one.name: one for one in monitor.measurements[-1].layers}
    for report in analyze(model, (1, 8, 8, 2)):
        assert last[report.name].certified_norm * (1 + 20 * EPS) >= report.operator_norm
        assert last[report.name].smallest_singular_value == pytest.approx(report.smallest_singular_value, rel=1e-4)
    assert history.history["certified_norm"] == [max(one.certified_norm for one in monitor.measurements[-2].layers)]


def test_a_class_that_does_not_convolve_with_its_weight_is_left_out() -> None:
    class Scaled(nn.Conv2d):
        def _conv_forward(self, images: Any, weight: Any, bias: Any) -> Any:
            return super()._conv_forward(images, 3 * weight, bias)

    monitor = SpectrumMonitor(nn.Sequential(nn.Conv2d(1, 4, 3), Scaled(4, 4, 3)), torch.zeros(1, 1, 8, 8))
    assert [layer.name for layer in monitor.layers] == ["0"]
    assert "forward pass of its own" in monitor.left_out["1"]


def test_swapped_arguments_and_a_folder_that_is_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="swapped"):
        SpectrumMonitor(torch.zeros(1, 1, 8, 8), nn.Conv2d(1, 4, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no directory"):
        SpectrumMonitor(nn.Conv2d(1, 4, 3), log=tmp_path / "missing" / "spectra.csv")
