"""The page in a real browser: what a reader sees. MOEQ_PAGE_SHOTS=folder keeps the screenshots."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moeq.fidelity.page import render
from tests.fidelity.browser import Browser, Page
from tests.fidelity.sample import degenerate, hostile, linears_only, make_result, summary_numbers

pytestmark = pytest.mark.browser

RESULTS = {
    "small": make_result(),
    "large": make_result(layers=64, experts=512),
    "linears": linears_only(),
    "hostile": hostile(),
    "degenerate": degenerate(),
}
VIEWS: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {"dark": True},
    "narrow": {"width": 390},
    "narrow-dark": {"width": 390, "dark": True},
    "print": {"width": 1016, "media": "print"},  # A4 less its margins
}

# Boxes that the page cuts off or lets out; tables and what is in them may scroll
OVERFLOWING = """
[...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect(), wide = e.closest(".wide");
  return (!wide || wide === e) && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.outerHTML.slice(0, 200))
"""
CUT = """
[...document.querySelectorAll("svg text")].filter(e => e.checkVisibility()).filter(e => {
  const box = e.getBoundingClientRect(), frame = e.closest("svg").getBoundingClientRect();
  return box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
}).map(e => e.textContent)
"""
OVERLAPPING = """
[...document.querySelectorAll("svg")].flatMap(svg => {
  const texts = [...svg.querySelectorAll("text")].filter(e => e.checkVisibility())
    .map(e => [e, e.getBoundingClientRect()]);
  return texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([b, q]) =>
    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1
    // Boxes are taller than letters
    && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4
  ).map(([b]) => a.textContent + " | " + b.textContent));
})
"""
# Contrast of the text's colour with the page's, as WCAG defines it
FAINT = """
(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("p, li, th, td, small, dt, dd, code, summary, svg text")]
    .filter(e => {
      const style = getComputedStyle(e);
      const ink = light(e.closest("svg") ? style.fill : style.color);
      return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05) < 4.5;
    }).map(e => e.textContent.slice(0, 80));
})()
"""
EMPTY = """
[...document.querySelectorAll("svg[role=img]")].filter(e => {
  const box = e.getBoundingClientRect();
  return !(box.width > 0 && box.height > 0);
}).length
"""
NUMBERS = """
[...document.querySelectorAll("#summary tbody tr")].map(row =>
  [...row.querySelectorAll("td[data-value]")].flatMap(cell =>
    ["value", "low", "high"].filter(k => k in cell.dataset).map(k => Number(cell.dataset[k]))))
"""


@pytest.fixture(params=RESULTS)
def name(request: pytest.FixtureRequest) -> str:
    param: str = request.param
    return param


@pytest.fixture(params=VIEWS)
def page(name: str, browser: Browser, tmp_path: Path, request: pytest.FixtureRequest) -> Page:
    file = tmp_path / "report.html"
    file.write_text(render(RESULTS[name]), encoding="utf-8")
    page = browser.open(file, **VIEWS[request.param])
    shots = Path(os.environ.get("MOEQ_PAGE_SHOTS", tmp_path))
    page.screenshot(shots / f"{name}-{request.param}.png")
    return page


def test_page_is_whole_legible_and_true(page: Page, name: str) -> None:
    assert page.complaints() == []
    assert len(page.requests()) == 1, "the page asked for more than itself"
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(EMPTY) == 0
    assert page.evaluate(CUT) == []
    assert page.evaluate(OVERLAPPING) == []
    assert page.evaluate(FAINT) == []
    assert page.evaluate(NUMBERS) == summary_numbers(RESULTS[name])
    embedded = page.evaluate("JSON.stringify(JSON.parse(document.all.result.textContent))")
    assert json.loads(embedded) == RESULTS[name]
    # Names made nothing: one block of data, no handlers, no links, no frames
    assert page.evaluate("document.scripts.length") == 1
    assert (
        page.evaluate("document.querySelectorAll('a, iframe, img, link, object, form').length") == 0
    )


def test_dark_is_dark_and_print_is_not(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(RESULTS["small"]), encoding="utf-8")
    paper = {
        (dark, media): browser.open(file, dark=dark, media=media).evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        for dark in (False, True)
        for media in ("screen", "print")
    }
    white = "rgb(255, 255, 255)"
    assert [case for case, colour in paper.items() if colour != white] == [(True, "screen")]


def test_what_stays_unquantized_opens_without_a_script(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(RESULTS["small"]), encoding="utf-8")
    page = browser.open(file)
    height = "document.querySelector('details').getBoundingClientRect().height"
    closed = page.evaluate(height)
    page.evaluate("document.querySelector('summary').click()")
    assert page.evaluate(height) > closed
