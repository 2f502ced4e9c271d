"""The page of a report: its size, its sentences, and what it says of each figure."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from convsv_core import Conv
from convsv_core.layers import Layer
from convsv_core.plugins import get_backend
from convsv_core.reports import NORM, BoundsReport, LayerReport, Report, bounds_reports, layer_reports, spectrum_view
from convsv_core.reports.images import PATCH, PIXELS, TopVectors

pytest.importorskip("vl_convert")
pytest.importorskip("itables")

from convsv_core.reports import charts, pictures

MEGABYTES = 2**20


def layers(*kernels: tuple[str, tuple[int, ...], Conv, tuple[int, ...]]) -> list[Layer]:
    rng = np.random.default_rng(0)
    return [Layer(name, rng.normal(size=shape), conv, extents) for name, shape, conv, extents in kernels]


LAYERS = layers(
    ("plain", (4, 3, 3, 3), Conv("OIHW"), (8, 7)),
    ("</script><b>&", (4, 4, 1, 1), Conv("OIHW"), (6, 6)),
    ("strided", (2, 4, 3), Conv("OIW", stride=2), (12,)),
    ("deep", (2, 2, 2, 2, 3), Conv("OIDHW"), (4, 4, 3)),
    ("up", (2, 3, 2, 2), Conv("IOHW", stride=2, transposed=True), (3, 3)),
)


@pytest.fixture(scope="module")
def report() -> Report[LayerReport]:
    rows = layer_reports(LAYERS, get_backend("numpy"), bounds="upper", images=True)
    return Report(rows, view=spectrum_view("upper"), title="net, with numpy")


class Elements(HTMLParser):
    """Collects the tags of a page, and refuses an element that is closed without being open."""

    void = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def elements(page: str) -> Elements:
    found = Elements()
    found.feed(page)
    assert not found.open
    return found


def test_the_page_is_whole_and_reaches_for_no_file(report: Report[LayerReport]) -> None:
    page = report.page()
    assert "{{" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    tags = elements(page).tags
    for tag, attributes in tags:
        address = attributes.get("src") or attributes.get("href") or attributes.get("xlink:href") or "data:"
        assert address.startswith(("data:", "#")), (tag, address)
    rows = [attributes["data-depth"] for tag, attributes in tags if tag == "tr" and "data-depth" in attributes]
    cards = [attributes["id"] for tag, attributes in tags if tag == "article"]
    assert rows == list("12345")
    assert cards == [f"layer-{depth}" for depth in rows]
    assert "&lt;/script&gt;&lt;b&gt;&amp;" in page
    for heading in ("by frequency", "top singular vectors", "certified: proved, rounding included"):
        assert heading in page


def test_the_charts_hold_the_figures(report: Report[LayerReport]) -> None:
    chart = charts.curves_chart(report)
    assert chart is not None
    for spec in (chart.linear, chart.log):
        for row, data in zip(report, spec["data"]["values"], strict=True):
            assert data["layer"].endswith(row.name)
            assert data["value"][0] == pytest.approx(row.operator_norm, rel=1e-4)
            assert len(data["value"]) == len(data["share"])
    norms = charts.norms_chart(report)
    assert norms is not None
    assert [data["norm"] for data in norms.linear["data"]["values"]] == pytest.approx(
        [row.norm for row in report], rel=1e-4
    )


def test_a_logarithmic_axis_shows_no_rounding_errors() -> None:
    curve = np.asarray([1.0, 1e-3, 1e-17, 0.0])
    chart = charts.curves_chart([LayerReport("layer", curve=curve)])
    assert chart is not None
    (log,), (linear,) = (spec["data"]["values"] for spec in (chart.log, chart.linear))
    assert (max(log["value"]), min(log["value"]), max(log["share"])) == (1.0, 1e-3, pytest.approx(1 / 3, rel=1e-4))
    assert (max(linear["value"]), min(linear["value"]), max(linear["share"])) == (1.0, 0.0, 1.0)


def test_points_between_few_values_lie_on_the_lines_that_are_drawn() -> None:
    curve = np.asarray([100.0, 1.0])
    chart = charts.curves_chart([LayerReport("layer", curve=curve)])
    assert chart is not None
    for spec, scaled in ((chart.linear, np.asarray), (chart.log, np.log)):
        (data,) = spec["data"]["values"]
        line = scaled(100.0) + (scaled(1.0) - scaled(100.0)) * np.asarray(data["share"])
        np.testing.assert_allclose(scaled(data["value"]), line, rtol=0, atol=2e-3)
        assert len(data["value"]) >= 256


def test_colours_of_layers_differ() -> None:
    for count in (1, 7, 64):
        assert len(set(charts.colours(count))) == count


def test_an_image_has_the_colours_of_its_values() -> None:
    image = pytest.importorskip("PIL.Image")
    address = pictures.png(np.asarray([[0.0, 1.0], [0.5, 2.0]]), "gray", 0.0, 1.0)
    picture = image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("L")
    assert np.asarray(picture).tolist() == [[0, 255], [128, 255]]


def test_the_sentences_of_a_spectrum() -> None:
    rows = [
        LayerReport("wide", operator_norm=3.0, reshaped_norm=3.0, smallest_singular_value=1.0, condition_number=3.0),
        LayerReport(
            "off", operator_norm=2.0, reshaped_norm=8.0, smallest_singular_value=0.0, condition_number=math.inf
        ),
        LayerReport("lost", note="no figures"),
    ]
    first, second, third, fourth = spectrum_view("none").sentences(rows)  # type: ignore[misc]
    assert first.startswith("The largest norm is 3, of wide:")
    assert "misleads most at off: it is 8, and the norm is 2, 0.25 times as much." in second
    assert third.startswith("1 layer is near singular")
    assert "off, with a smallest singular value of 0." in third
    assert fourth == "1 layer has no figures; the notes below the table say why."
    first, second, third = spectrum_view("none").sentences(rows[:1])  # type: ignore[misc]
    assert "within 1 % of the norm of every layer" in second
    assert third == "No layer is near singular: the largest condition number is 3, of wide."


def test_the_sentences_of_bounds_hold_for_the_bounds() -> None:
    reports = list(bounds_reports(LAYERS[:2], get_backend("numpy")))
    first, _, third = NORM.sentences(reports)  # type: ignore[misc]
    lower, upper = re.findall(r"\d+\.\d+", first)
    largest = max(reports, key=lambda row: row.upper or 0.0)
    assert float(lower) <= largest.lower <= largest.upper <= float(upper)  # type: ignore[operator]
    assert third == "The bounds of every layer are as near to each other as requested."
    far = [BoundsReport("far", lower=1.0, upper=2.0, converged=False, reshaped_norm=1.0)]
    assert "further apart than requested, as those of far" in NORM.sentences(far)[-1]  # type: ignore[misc]


def test_a_report_without_figures_has_a_page() -> None:
    for rows in ([], [LayerReport("lost", note="no figures")]):
        page = Report(rows, title="net").page()
        elements(page)
        assert json.loads(re.findall(r'id="charts-data">(.*?)</script>', page)[0]) == {}


def test_64_layers_are_less_than_8_megabytes() -> None:
    rng = np.random.default_rng(0)
    wave = rng.normal(size=(4, PATCH, PATCH))
    rows = [
        LayerReport(
            f"backbone.stage{depth}.conv",
            (64, 64, 3, 3),
            "OIHW",
            (1, 1),
            (1, 1),
            1,
            input_shape=(PIXELS, PIXELS),
            operator_norm=5.0,
            reshaped_norm=4.0,
            curve=np.sort(rng.random(512))[::-1],
            by_frequency=rng.random((PIXELS, PIXELS)),  # Noise is what compresses worst.
            top_vectors=TopVectors((0.5, 1.0), 5.0, wave, wave, (0, 1, 2, 3), (4, 5, 6, 7)),
        )
        for depth in range(64)
    ]
    assert len(Report(rows, title="net").page().encode()) < 8 * MEGABYTES


def test_the_page_is_written_as_utf8(report: Report[LayerReport], tmp_path: Any) -> None:
    report.to_html(tmp_path / "report.html")
    assert "π" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_missing_library_names_the_extra(report: Report[LayerReport], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    for module in ("page", "page_parts", "comparison_page", "layer_cards", "pictures"):
        monkeypatch.delitem(sys.modules, f"convsv_core.reports.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"to_html\(\) needs vl_convert: pip install 'convsv\[html\]'"):
        report.page()
