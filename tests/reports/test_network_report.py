"""`Report`: a list of layers' figures that prints, displays and converts itself."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import convsv_core as convsv
from convsv_core.reports import LayerReport, Report, network_report, spectrum_view


@pytest.fixture
def report() -> Report[LayerReport]:
    rows = [
        LayerReport("first", (4, 3, 3, 3), "OIHW", (2, 1), (1, 1), 1, reshaped_norm=2.0, operator_norm=3.0),
        LayerReport("<second>", (2, 4, 3), "OIW", (1,), (1,), 2, note="odd & even"),
        LayerReport("third", operator_norm=5.0, smallest_singular_value=0.0, condition_number=math.inf),
    ]
    return Report(rows, view=spectrum_view("none"), title="net, with numpy", about={"model": "net"})


def test_a_report_is_a_list(report: Report[LayerReport]) -> None:
    assert report == list(report)
    assert report[1] is list(report)[1]
    assert report[-1].name == "third"
    for part in (report[:2], report.of(report[:2]), copy.copy(report)[:2]):
        assert type(part) is Report
        assert part == list(report)[:2]
        assert (part.title, part.about, part.view) == (report.title, report.about, report.view)
    assert [row.name for row in report.ordered("norm")] == ["third", "first", "<second>"]
    with pytest.raises(ValueError, match="wanted one of depth, name, norm"):
        report.ordered("colour")


def test_a_report_can_be_pickled(report: Report[LayerReport]) -> None:
    again = pickle.loads(pickle.dumps(report))
    assert type(again) is Report
    assert str(again) == str(report)
    assert again.to_json() == report.to_json()


def test_a_report_prints_as_the_table(report: Report[LayerReport]) -> None:
    lines = str(report).splitlines()
    assert lines[0] == "net, with numpy"
    (first,) = (line for line in lines if line.startswith("first"))
    assert first.split() == ["first", "4x3x3x3", "s2,1", "-", "3", "-", "-", "-", "2", "1.50x"]
    assert "<second> (1)  2x4x3 g2" in str(report)
    assert lines[-1] == "(1) odd & even"
    assert repr(report) == "<Report of 3 convolutions: net, with numpy; print it for the table>"
    assert max(map(len, lines)) < 100


def test_a_notebook_shows_the_cells_of_the_table_and_runs_nothing(report: Report[LayerReport]) -> None:
    shown = report._repr_html_()
    for cell in ("&lt;second&gt; (1)", "4x3x3x3 s2,1", "1.50x", "inf", "(1) odd &amp; even", "net, with numpy"):
        assert cell in shown
    assert "<script" not in shown
    assert shown.count("<tr>") == 4


def test_json_has_the_fields_of_the_view_and_no_infinity(report: Report[LayerReport]) -> None:
    document = json.loads(report.to_json())
    assert list(document) == ["model", "layers"]
    assert [list(layer) for layer in document["layers"]] == [list(report.view.fields)] * 3
    assert [layer["operator_norm"] for layer in document["layers"]] == [3.0, None, 5.0]
    assert document["layers"][2]["condition_number"] is None


def test_pandas_has_figures_as_floats(report: Report[LayerReport]) -> None:
    pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert list(frame.columns) == [*report.view.fields, "factor"]
    assert frame["kernel_shape"][0] == (4, 3, 3, 3)
    np.testing.assert_array_equal(frame["operator_norm"], [3.0, np.nan, 5.0])
    np.testing.assert_array_equal(frame["factor"], [1.5, np.nan, np.nan])
    assert frame["condition_number"][2] == math.inf
    assert frame["stable_rank"].dtype == float


def test_a_missing_library_is_named_with_its_extra(
    report: Report[LayerReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"to_pandas\(\) needs pandas: pip install 'convsv\[pandas\]'"):
        report.to_pandas()
    assert network_report.import_for("math", "it", "none") is math


def test_analyze_returns_a_report_that_prints_without_other_libraries() -> None:
    code = """
import sys
import numpy as np
from convsv_core import Conv
from convsv_core.layers import Layer
from convsv_core.plugins import get_backend
from convsv_core.reports import Report, layer_reports, spectrum_view
layer = Layer("conv", np.ones((2, 1, 3)), Conv("OIW"), (8,))
report = Report(layer_reports([layer], get_backend("numpy")), view=spectrum_view("none"))
print(report, report.to_json(), report._repr_html_())
unwanted = {"matplotlib", "altair", "vl_convert", "pandas", "rich", "click", "itables"} & set(sys.modules)
assert not unwanted, unwanted
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_analyze_prints_as_the_command_line_does(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1))
    report = convsv.analyze(model, torch.zeros(1, 1, 8, 8))
    assert isinstance(report, convsv.Report)
    assert isinstance(report, list)
    assert report.title == "Sequential, with numpy"
    assert "8x8" in str(report)
