"""The pages on a network's Lipschitz constant and on two networks, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser_pages import CONTRAST, Page, open_browser, why_no_browser

from convsv_core import Conv, lipschitz
from convsv_core.layers import Layer
from convsv_core.networks import Convolution, Elementwise, Graph, Input, Node, Sum
from convsv_core.plugins import get_backend
from convsv_core.reports import Comparison, difference_reports, match_layers

for library in ("vl_convert", "itables"):
    pytest.importorskip(library)
if reason := why_no_browser():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield Page(browser)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return pages on a network's constant and on two networks."""
    rng = np.random.default_rng(0)
    shape = (1, 4, 6, 6)

    def conv(name: str, source: str, size: float) -> Node:
        layer = Conv("OIHW", padding=1, padding_mode="zeros")
        return Node(name, Convolution(size * rng.normal(size=(4, 4, 3, 3)), layer), (source,), shape)

    nodes = [Node("image", Input(), (), shape), conv("first", "image", 1.0)]
    for number, size in enumerate((0.02, 1.0)):
        start = nodes[-1].name
        inner = conv(f"branch{number}", start, size)
        act = Node(f"act{number}", Elementwise("relu"), (inner.name,), shape)
        nodes += [inner, act, Node(f"sum{number}", Sum(), (start, act.name), shape)]
    folder = tmp_path_factory.mktemp("others")
    constant = lipschitz(Graph(tuple(nodes), (nodes[-1].name,)))
    constant.to_html(folder / "constant.html", title="a network")
    geometry = Conv("OIHW", padding=1, padding_mode="zeros")
    weights = [rng.normal(size=(4, 3, 3, 3)) for _ in range(3)]
    models = [
        [Layer(f"conv{place}", kernel * (1 + size * place), geometry, (8, 8)) for place, kernel in enumerate(weights)]
        for size in (0.0, 0.01)
    ]
    matching = match_layers(*models)
    rows = difference_reports(matching.pairs, get_backend("numpy"))
    facts = {"model": "one", "other": "two"}
    Comparison(rows, title="one and two", about=facts, lipschitz=[constant, constant]).ordered("share").to_html(
        folder / "comparison.html"
    )
    return {name: folder / f"{name}.html" for name in ("constant", "comparison")}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize(
    ("kind", "charts"), [("constant", ("growth", "blocks")), ("comparison", ("shares", "differences"))]
)
def test_pages_on_networks_can_be_read(
    page: Page, others: dict[str, Path], kind: str, charts: tuple[str, ...], theme: str, width: int
) -> None:
    page.open(others[kind], theme=theme, width=width)
    page.picture(f"{kind}-{theme}-{width}")
    assert page.messages() == []
    assert page.run("return document.documentElement.scrollWidth") <= width
    contrasts = page.contrasts()
    assert {f"#{chart} svg text" for chart in charts} <= set(contrasts)
    assert min(contrasts.values()) >= CONTRAST, contrasts


def test_hovering_over_the_bound_names_the_node(page: Page, others: dict[str, Path]) -> None:
    page.open(others["constant"])
    # The pointer finds the second node anywhere above its place.
    rect = "#growth .mark-rect.role-mark path:nth-of-type(2)"
    page.pointer(*page.over(rect, down=0.3))
    shown = page.told()
    assert "2 first" in shown
    assert "factor, at most" in shown
    page.pointer(*page.over(rect, down=0.3), "mousePressed", "mouseReleased")
    assert set(page.picked()) == {"2"}
    assert "Node 2: first" in page.browser.find_element("id", "picked").text
    page.pointer(*page.over("#blocks .mark-rect.role-mark path"))
    page.until(lambda: "constant of the branch" in page.told())
    page.run('document.querySelector(\'[data-chart="blocks"][aria-pressed="false"]\').click()')
    page.browser.execute_async_script("const done = arguments[0]; setTimeout(done, 300)")
    assert page.messages() == []


def test_hovering_over_a_share_names_the_layer(page: Page, others: dict[str, Path]) -> None:
    page.open(others["comparison"])
    page.pointer(*page.over("#shares .mark-rect.role-mark path", across=0.3))
    shown = page.told()
    assert "1 conv2" in shown
    assert "share, at most" in shown
    page.run('document.querySelector(\'[data-chart="shares"][aria-pressed="false"]\').click()')
    page.browser.execute_async_script("const done = arguments[0]; setTimeout(done, 300)")
    assert page.messages() == []
