"""The pages, tables and figures of a network's Lipschitz constant and of a comparison of two networks."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convsv_core import Lipschitz, lipschitz
from convsv_core.networks import Elementwise, Graph, Input, Matmul, Node, Product, Sum
from convsv_core.reports import Comparison, DifferenceReport, Unmatched, texts
from convsv_core.reports.constant_views import nodes_table, sentences_of


def residual(size: float) -> Graph:
    half = Node("f", Matmul(size * np.eye(4)), ("x",), (1, 4))
    act = Node("g", Elementwise("tanh"), ("f",), (1, 4))
    return Graph((Node("x", Input(), (), (1, 4)), half, act, Node("y", Sum(), ("x", "g"), (1, 4))), ("y",))


@pytest.fixture(scope="module")
def found() -> Lipschitz:
    return lipschitz(residual(0.5))


@pytest.fixture(scope="module")
def missing() -> Lipschitz:
    nodes = (Node("<x>", Input(), (), (1, 4)), Node("y", Product(), ("<x>", "<x>"), (1, 4)))
    return lipschitz(Graph(nodes, ("y",)))


def rows(*shares: float | None) -> list[DifferenceReport]:
    return [
        DifferenceReport(
            f"conv{place}",
            (4, 3, 3, 3),
            "OIHW",
            difference_upper=share if share is None else min(2 * share, 2.0),
            norm_upper=2.0,
            share=share,
            place=place,
        )
        for place, share in enumerate(shares)
    ]


# ---- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log10", [0.0, 1e-12, -0.30103, 0.5, 3.99999, 5.999, -3.2])
def test_a_power_is_an_upper_bound_of_four_digits(log10: float) -> None:
    exact = 10**log10
    shown = float(texts.power_up(log10))
    assert exact <= shown * (1 + 4e-16)
    assert shown <= exact * 1.0011
    assert log10 <= float(texts.logarithm_up(log10)) <= log10 + 1e-4


# ---- the constant of a network ------------------------------------------------------------------------------------


def test_the_sentences_of_a_constant(found: Lipschitz, missing: Lipschitz) -> None:
    bound, lower, blocks = sentences_of(found)
    assert bound.startswith("The Lipschitz constant of the network is certified to be at most 1.501.")
    assert lower.startswith(f"At one input the network stretches a small change by {texts.rounded_down(found.lower)}")
    assert float(re.findall(r"by (\S+),", lower)[0]) <= (found.lower or 0.0) <= found.upper
    assert blocks.startswith("The residual block is proved to have full rank at every input")
    _, factors, blocks = sentences_of(lipschitz(residual(2.0), lower=False))
    assert factors.startswith("The largest factor is that of f (")
    assert blocks.startswith("1 of 1 residual block is not shown to be invertible")
    assert "y." in blocks
    first, *_ = sentences_of(missing)
    assert first.startswith("The network has no certified constant: 1 node has no bound. The first is y (")


def test_a_notebook_shows_every_node(found: Lipschitz, missing: Lipschitz) -> None:
    shown = found._repr_html_()
    assert shown.count("<tr>") == 1 + len(found.nodes)
    assert "at most 1.501" in shown
    assert "<script" not in shown
    assert "&lt;x&gt;" in missing._repr_html_()
    assert [column.heading for column in nodes_table(missing).columns][-1] == "note"


def test_json_pandas_and_figure_of_a_constant(found: Lipschitz, missing: Lipschitz) -> None:
    assert json.loads(found.to_json()) == found.to_dict()
    pytest.importorskip("pandas")
    frame = missing.to_pandas()
    assert list(frame["name"]) == ["<x>", "y"]
    assert frame["log10_upper"][1] == math.inf
    figure = pytest.importorskip("matplotlib.figure").Figure
    _, axes = found.plot(figure(), title="net")
    assert axes.get_title().startswith("net\n")
    (line,) = (line for line in axes.lines if len(line.get_xdata()) == len(found.nodes))
    assert list(line.get_ydata()) == [node.log10_upper for node in found.nodes]
    missing.plot(figure())


def test_the_page_of_a_constant(found: Lipschitz, missing: Lipschitz, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    found.to_html(tmp_path / "constant.html", title="<net>")
    page = (tmp_path / "constant.html").read_text(encoding="utf-8")
    assert "&lt;net&gt;" in page
    charts = json.loads(re.findall(r'id="charts-data">(.*?)</script>', page)[0])
    assert set(charts) == {"growth", "blocks"}
    data = charts["growth"]["linear"]["data"]["values"]
    assert [point["bound"] for point in data] == pytest.approx([node.log10_upper for node in found.nodes], abs=1e-4)
    (block,) = charts["blocks"]["log"]["data"]["values"]
    assert (block["low"], block["high"], block["full rank"]) == (pytest.approx(0.5), pytest.approx(1.5), "yes")
    assert float(block["at least"]) <= found.blocks[0].smallest_singular_value
    unknown = dataclasses.replace(found, blocks=(dataclasses.replace(found.blocks[0], smallest_singular_value=None),))
    assert "is not shown to be invertible" in unknown.page()
    page = missing.page()
    (chart,) = json.loads(re.findall(r'id="charts-data">(.*?)</script>', page)[0]).values()
    assert [point["no bound"] is None for point in chart["linear"]["data"]["values"]] == [True, False]
    assert "Nodes without a bound" in page


# ---- two networks -------------------------------------------------------------------------------------------------


def charts_of(report: Comparison) -> dict[str, Any]:
    return dict(json.loads(re.findall(r'id="charts-data">(.*?)</script>', report.page())[0]))


def test_the_page_of_a_comparison(found: Lipschitz) -> None:
    pytest.importorskip("vl_convert")
    lacking = [Unmatched("<head>", "b", "the other network has no such layer")]
    report = Comparison(rows(0.0, 0.02, 0.5, None), unmatched=lacking, lipschitz=[found, found]).ordered("share")
    page, charts = report.page(), charts_of(report)
    for words in (
        "4 convolutions compared, of which 1 has equal weights.",
        "The largest relative difference is that of conv2: its norm is at most 50% of the layer&#x27;s norm.",
        "The Lipschitz constants of the networks are at most 1.501 and 1.501.",
        "&lt;head&gt;",
    ):
        assert words in page, words
    shares = charts["shares"]["linear"]["data"]["values"]
    assert [(point["layer"], point["percent"]) for point in shares] == [("1  conv2", 50.0), ("2  conv1", 2.0)]
    # The chart along the network has the network's numbers, whatever the order of the table.
    places = {point["layer"]: point["place"] for point in charts["differences"]["linear"]["data"]["values"]}
    assert places == {"1  conv2": 3, "2  conv1": 2, "3  conv0": 1}


def test_a_comparison_of_many_layers_or_of_none() -> None:
    pytest.importorskip("vl_convert")
    report = Comparison(rows(*np.linspace(0.01, 0.5, 40))).ordered("share")
    assert len(charts_of(report)["shares"]["linear"]["data"]["values"]) == 30
    assert "10 layers with smaller shares are in the table" in report.page()
    assert charts_of(Comparison()) == {}
    assert set(charts_of(Comparison(rows(0.0, 0.0)))) == {"differences"}
    assert set(charts_of(Comparison(rows(math.inf)))) == {"differences"}


def test_the_figure_of_a_comparison_has_the_largest_shares() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    _, axes = Comparison(rows(0.0, 0.02, 0.5, None)).plot(figure())
    assert [bar.get_width() for bar in axes.patches] == [50.0, 2.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3  conv2", "2  conv1"]
    _, axes = Comparison().plot(figure(), scale="log")
    assert "other weights" in axes.texts[0].get_text()
    with pytest.raises(ValueError, match="scale"):
        Comparison().plot(figure(), scale="square")  # type: ignore[arg-type]
