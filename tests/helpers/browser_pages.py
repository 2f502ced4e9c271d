"""A page that is open in a real browser, and the browser for it: Chromium without a window, through its driver."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["CONTRAST", "Page", "open_browser", "why_no_browser"]

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
CONTRAST = 4.5
"""The least contrast of text that people can read, of the Web Content Accessibility Guidelines."""

PATIENCE = 10.0
"""Seconds to wait for what a page shows some frames later; a machine may be busy."""


def why_no_browser() -> str:
    """Return why no page can be opened, or "" if one can."""
    try:
        import selenium  # noqa: F401
    except ModuleNotFoundError as error:
        return str(error)
    return "" if BROWSER and DRIVER else "no Chromium with chromedriver is installed"


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Any]:
    """Yield a browser, which keeps its files in a folder."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield browser
    finally:
        browser.quit()


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

    def over(self, selector: str, across: float = 0.5, down: float = 0.5) -> tuple[float, float]:
        """Return a place in an element, in the window, as shares of its width and height."""
        x, y = self.run(
            """
            const one = document.querySelector(arguments[0]);
            one.scrollIntoView({ block: "center" });
            const { left, top, width, height } = one.getBoundingClientRect();
            return [left + arguments[1] * width, top + arguments[2] * height];
            """,
            selector,
            across,
            down,
        )
        return float(x), float(y)

    def told(self) -> str:
        """Wait for the box beside the pointer, and return its text."""
        box = "document.querySelector('#vg-tooltip-element')"
        self.until(lambda: "visible" in self.run(f"return {box}?.className || ''"))
        return str(self.run(f"return {box}.innerText"))

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
              ".strip figcaption", ".plain td", "footer", "#growth svg text", "#blocks svg text", "#shares svg text",
              "#differences svg text"];
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
