"""The page of a report in a real browser: nothing fails, the pointer works, and every theme can be read.

Without Chromium, its driver and selenium these tests are skipped. If the environment variable CONVSV_SCREENSHOTS names
a folder, pictures of the page are left there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_pages import CONTRAST, Page, open_browser, why_no_browser

from convsv_core import Conv
from convsv_core.layers import Layer
from convsv_core.plugins import get_backend
from convsv_core.reports import NORM, LayerReport, Report, bounds_reports, layer_reports, spectrum_view

for library in ("vl_convert", "itables"):
    pytest.importorskip(library)
if reason := why_no_browser():
    pytest.skip(reason, allow_module_level=True)

NAMES = ("conv1", "<script>document.title = 'lost'</script>", "block.deep", "block.up")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield Page(browser)


@pytest.fixture(scope="module")
def report() -> Report[LayerReport]:
    rng = np.random.default_rng(0)
    convs = (Conv("OIHW"), Conv("OIHW", stride=2), Conv("OIW"), Conv("IOHW", stride=2, transposed=True))
    shapes = ((8, 3, 3, 3), (4, 8, 3, 3), (3, 2, 5), (4, 2, 2, 2))
    extents = ((12, 12), (12, 12), (16,), (6, 6))
    parts = zip(NAMES, shapes, convs, extents, strict=True)
    found = [Layer(name, rng.normal(size=shape), conv, sizes) for name, shape, conv, sizes in parts]
    rows = layer_reports(found, get_backend("numpy"), bounds="upper", images=True)
    return Report(rows, view=spectrum_view("upper"), title="a network, with numpy")


@pytest.fixture(scope="module")
def path(report: Report[LayerReport], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("page") / "report.html"
    report.to_html(target)
    return target


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_fails_and_everything_can_be_read(page: Page, path: Path, theme: str, width: int) -> None:
    page.open(path, theme=theme, width=width)
    page.picture(f"report-{theme}-{width}")
    assert page.messages() == []
    assert page.browser.title == "a network, with numpy"
    assert page.names() == list(NAMES)
    fetched = page.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert all(name.startswith(("data:", "blob:")) for name in fetched), fetched
    assert page.run("return document.documentElement.scrollWidth") <= width
    contrasts = page.contrasts()
    assert len(contrasts) == 16
    assert min(contrasts.values()) >= CONTRAST, contrasts
    dark = page.run("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (theme == "dark")


def test_a_page_that_is_open_follows_the_theme(page: Page, path: Path) -> None:
    page.open(path, theme="light")
    page.emulate("dark")
    page.browser.execute_async_script("const done = arguments[0]; setTimeout(done, 300)")
    assert min(page.contrasts().values()) >= CONTRAST
    assert page.messages() == []


def test_paper_is_white_and_has_every_column(page: Page, path: Path) -> None:
    page.open(path, theme="dark", width=720)
    page.emulate("dark", "print")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("return getComputedStyle(document.querySelector('.choice')).display") == "none"
    assert page.contrasts()["#curves svg text"] >= CONTRAST
    assert page.run("const one = document.querySelector('.wide'); return one.scrollWidth <= one.clientWidth")


def test_hovering_over_a_curve_names_the_layer(page: Page, path: Path, report: Report[LayerReport]) -> None:
    page.open(path)
    page.pointer(*page.on_curve(3))
    shown = page.told()
    assert "block.deep" in shown
    assert f"{report[2].operator_norm:.4g}" in shown
    lines = "[...document.querySelectorAll('#curves path[opacity]')].filter((p) => p.__data__?.datum?.depth"
    opacities = (
        f"return {lines} && p.getAttribute('stroke-width') !== '9')"
        ".map((p) => [p.__data__.datum.depth, Number(p.getAttribute('opacity'))])"
    )
    page.until(lambda: {depth for depth, opacity in page.run(opacities) if opacity > 0.9} == {3})
    assert page.messages() == []


def test_a_click_picks_a_layer_everywhere(page: Page, path: Path) -> None:
    page.open(path)
    page.pointer(*page.on_curve(1), "mouseMoved", "mousePressed", "mouseReleased")
    assert set(page.picked()) == {"1"}
    assert len(page.picked()) == 3  # its name, its row of the table, and its images
    bar = page.browser.find_element("id", "picked")
    assert bar.is_displayed()
    assert "Layer 1: conv1" in bar.text
    page.picture("report-picked")
    page.run("document.querySelector('.chip[data-depth=\"4\"]').click()")
    assert set(page.picked()) == {"4"}
    page.run("document.querySelector('#layers-table tr[data-depth=\"2\"] td').click()")
    assert set(page.picked()) == {"2"}
    page.browser.find_element("tag name", "body").send_keys("\ue00c")
    assert page.picked() == []
    assert not bar.is_displayed()
    assert page.messages() == []


def test_the_axis_can_be_chosen(page: Page, path: Path) -> None:
    page.open(path)

    def ticks() -> list[str]:
        return list(
            page.run("return [...document.querySelectorAll('#curves .role-axis-label text')].map(t => t.textContent)")
        )

    before = ticks()
    page.run('document.querySelector(\'[data-chart="curves"][aria-pressed="false"]\').click()')
    page.browser.execute_async_script("const done = arguments[0]; setTimeout(done, 300)")
    assert ticks() != before
    assert page.messages() == []


def test_the_table_sorts_by_value_and_filters(page: Page, path: Path, report: Report[LayerReport]) -> None:
    page.open(path)
    heading = page.browser.find_element("xpath", "//table[@id='layers-table']//th[normalize-space()='stable rank']")
    heading.click()
    in_order = [row.name for row in sorted(report, key=lambda row: row.stable_rank or 0.0)]
    page.until(lambda: page.names() == in_order)
    page.browser.find_element("css selector", ".dt-search input").send_keys("block")
    page.until(lambda: sorted(page.names()) == ["block.deep", "block.up"])
    assert page.messages() == []


def test_a_report_of_bounds_has_a_chart_of_norms(page: Page, tmp_path: Path) -> None:
    layer = Layer("conv1", np.random.default_rng(1).normal(size=(4, 3, 3, 3)), Conv("OIHW"), None)
    Report(bounds_reports([layer], get_backend("numpy")), view=NORM, title="net").to_html(tmp_path / "norm.html")
    page.open(tmp_path / "norm.html")
    assert page.messages() == []
    assert page.run("return document.querySelectorAll('#norms .mark-symbol path').length") >= 2
    assert page.run("return document.querySelector('#curves')") is None


def test_hovering_over_a_frequency_tells_its_angles_and_its_value(page: Page, path: Path, report: Any) -> None:
    page.open(path)
    picture = "#layer-1 .frequency"
    before = page.run(f"return document.querySelector('{picture} svg').getBoundingClientRect().height")
    page.pointer(*page.over(picture))
    page.until(
        lambda: page.run(f"return document.querySelectorAll('{picture} .mark-rect.role-mark path').length") == 13 * 13
    )
    after = page.run(f"return document.querySelector('{picture} svg').getBoundingClientRect().height")
    assert abs(before - after) <= 4  # the page does not jump where the chart takes the picture's place
    # The rectangle in the middle is that of frequency 0, and its neighbour has one step of 2 pi / 12.
    for place, (row, column) in ((84, (6, 6)), (85, (6, 7))):
        x, y = page.run(
            f"""
            const one = document.querySelectorAll("{picture} .mark-rect.role-mark path")[arguments[0]];
            const {{ x, y, width, height }} = one.getBoundingClientRect();
            return [x + width / 2, y + height / 2];
            """,
            place,
        )
        page.pointer(x, y)
        page.until(lambda: ("0.524 rad (0.167π)" in page.told()) == (column == 7))  # noqa: B023
        assert f"{report[0].by_frequency[row, column]:.4g}" in page.told()
    assert page.messages() == []
