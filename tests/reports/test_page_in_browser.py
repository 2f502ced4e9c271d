"""The page of a report in a real browser: nothing fails, the pointer works, and every theme can be read.

Without Chromium, its driver and selenium these tests are skipped. If the environment variable CONVSV_SCREENSHOTS names
a folder, pictures of the page are left there.
"""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convsv_core import Conv
from convsv_core.layers import Layer
from convsv_core.plugins import get_backend
from convsv_core.reports import NORM, LayerReport, Report, bounds_reports, layer_reports, spectrum_view

for library in ("vl_convert", "itables"):
    pytest.importorskip(library)
webdriver = pytest.importorskip("selenium.webdriver")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("no Chromium with chromedriver is installed", allow_module_level=True)

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
CONTRAST = 4.5
"""The least contrast of text that people can read, of the Web Content Accessibility Guidelines."""

PATIENCE = 10.0
"""Seconds to wait for what a page shows some frames later; a machine may be busy."""

NAMES = ("conv1", "<script>document.title = 'lost'</script>", "block.deep", "block.up")


class Page:
    """A page that is open in a browser."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def open(self, path: Path, *, width: int = 1200, theme: str = "light", media: str = "screen") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.emulate(theme, media)
        self.browser.get(path.as_uri())
        failure = self.browser.execute_async_script(
            "const done = arguments[0]; window.ready.then(() => done(null), (error) => done(String(error)))"
        )
        assert failure is None

    def emulate(self, theme: str, media: str = "screen") -> None:
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def messages(self) -> list[dict[str, Any]]:
        return list(self.browser.get_log("browser"))

    def on_curve(self, depth: int) -> tuple[float, float]:
        """Return the place of a point of a layer's curve in the window."""
        x, y = self.run(
            """
            document.querySelector("#curves").scrollIntoView({ block: "center" });
            const wide = [...document.querySelectorAll("#curves path")].filter(
              (path) => path.__data__ && path.__data__.datum && path.getAttribute("stroke-width") === "9");
            const path = wide.find((path) => path.__data__.datum.depth === arguments[0]);
            const point = path.getPointAtLength(path.getTotalLength() * 0.6).matrixTransform(path.getScreenCTM());
            return [point.x, point.y];
            """,
            depth,
        )
        return float(x), float(y)

    def pointer(self, x: float, y: float, *events: str) -> None:
        for event in events or ("mouseMoved",):
            button = {} if event == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": event, "x": x, "y": y, **button})
        self.browser.execute_async_script("const done = arguments[0]; setTimeout(done, 150)")

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, which a page may need some frames for."""
        end = time.monotonic() + PATIENCE
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)
        assert condition()

    def picked(self) -> list[str]:
        return list(self.run("return [...document.querySelectorAll('.on')].map((one) => one.dataset.depth)"))

    def names(self) -> list[str]:
        return list(
            self.run("return [...document.querySelectorAll('#layers-table tbody tr')].map(r => r.cells[1].innerText)")
        )

    def contrasts(self) -> dict[str, float]:
        """Return the contrast of every kind of text with what is behind it."""
        return dict(
            self.run(
                """
            const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
            const light = ([r, g, b]) => {
              const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
              return 0.2126 * x + 0.7152 * y + 0.0722 * z;
            };
            const behind = (element) => {
              for (let one = element; one; one = one.parentElement) {
                const colour = parse(getComputedStyle(one).backgroundColor);
                if (colour.length === 3 || colour[3] === 1) return colour;
              }
              return [255, 255, 255];
            };
            const found = {};
            const kinds = ["h1", "header p", ".summary p", ".choice button", "#curves svg text", "#norms svg text",
              ".chip", ".hint", "#layers-table th", "#layers-table td", ".facts", ".facts b", ".frequency svg text",
              ".strip figcaption", ".plain td", "footer"];
            for (const kind of kinds) for (const element of document.querySelectorAll(kind)) {
              const style = getComputedStyle(element);
              const colour = parse(element.namespaceURI.endsWith("svg") ? style.fill : style.color);
              const [a, b] = [light(colour), light(behind(element))].sort((one, two) => two - one);
              found[kind] = Math.min(found[kind] || 99, (a + 0.05) / (b + 0.05));
            }
            return found;
            """
            )
        )

    def picture(self, name: str, height: int = 2600) -> None:
        """Leave a picture of the page where the environment asks for it."""
        folder = os.environ.get("CONVSV_SCREENSHOTS")
        if not folder:
            return
        width, whole = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, whole), "scale": 1}
        taken = self.browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Page(browser)
    browser.quit()


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
    page.until(lambda: "visible" in page.run("return document.querySelector('#vg-tooltip-element')?.className || ''"))
    shown = page.browser.find_element("id", "vg-tooltip-element")
    assert "block.deep" in shown.text
    assert f"{report[2].operator_norm:.4g}" in shown.text
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
    page.browser.find_element("tag name", "body").send_keys(webdriver.Keys.ESCAPE)
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
