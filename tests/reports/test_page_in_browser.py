"""The page as a reader sees it: in Chromium, at two widths, light and dark. One browser for all tests.

What needs no browser (escaping, no external request) is checked in test_report.py in any case.
"""

from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: the package chromium)")

VIEWS = [(width, dark) for width in (1280, 400) for dark in (False, True)]

# Every piece of text against the first opaque ground below it: [contrast, text] of the worst (WCAG 2.2, 1.4.3).
# Text of figures counts too; large text may have 3, all of it is held to 4.5 here.
CONTRAST = """
(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => rgb.slice(0, 3)
    .map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = channels(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || element.closest("script, style") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const color = channels(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [luminance(color), luminance(ground(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), text.slice(0, 40), color.join()]);
  }
  found.sort((a, b) => a[0] - b[0]);
  return { count: found.length, worst: found.slice(0, 3) };
})()
"""


@pytest.fixture(scope="module")
def page(report_folder) -> Path:
    return report_folder / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def opened(chromium: Browser, page: Path) -> Browser:
    chromium.open(page, width=1280)
    return chromium


@pytest.mark.parametrize(("width", "dark"), VIEWS)
def test_it_is_quiet_asks_for_nothing_fits_and_can_be_read(chromium, page, width, dark):
    chromium.open(page, width=width, dark=dark)
    chromium.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert chromium.complaints == []
    assert chromium.requests == [page.resolve().as_uri()]
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    contrast = chromium.evaluate(CONTRAST)
    assert contrast["count"] > 500
    assert contrast["worst"][0][0] >= 4.5, contrast["worst"]
    paper = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")


def test_the_verdict_and_the_key_figure_are_on_the_first_screen(opened):
    bottoms = opened.evaluate(
        "[...document.querySelectorAll('#verdict .judged, #verdict .panels svg')]"
        ".map((one) => one.getBoundingClientRect().bottom)"
    )
    assert len(bottoms) == 2 + 2
    assert max(bottoms) <= 800


def test_a_heading_sorts_its_table_both_ways(opened):
    cells = "[...document.querySelectorAll('#comparison-1 tbody tr')].map((row) => row.cells[2].textContent.trim())"
    press = "document.querySelectorAll('#comparison-1 thead button')[2].click()"
    before = opened.evaluate(cells)
    opened.evaluate(press)
    rising = opened.evaluate(cells)
    opened.evaluate(press)
    falling = opened.evaluate(cells)
    assert opened.evaluate("document.querySelectorAll('#comparison-1 th')[2].getAttribute('aria-sort')") == "descending"
    numbers = [float(cell.split()[0]) for cell in rising]
    assert numbers == sorted(numbers) != [float(cell.split()[0]) for cell in before]
    assert [float(cell.split()[0]) for cell in falling] == sorted(numbers, reverse=True)


def test_what_has_no_number_sorts_last(opened):
    cells = "[...document.querySelectorAll('#comparison-1 tbody tr')].map((row) => row.cells[3].textContent.trim())"
    for _ in range(2):
        opened.evaluate("document.querySelectorAll('#comparison-1 thead button')[3].click()")
        changes = opened.evaluate(cells)
        assert changes[-1] == "-"
        assert "-" not in changes[: len(changes) - changes.count("-")]


def test_examples_are_filtered_by_run_and_outcome(opened):
    shown = "[...document.querySelectorAll('.example')].filter((one) => !one.hidden).map((one) => one.dataset.outcomes)"
    choose = """(run, outcome) => {
      const boxes = document.querySelectorAll('.filter-examples select');
      [run, outcome].forEach((value, i) => { boxes[i].value = value; boxes[i].dispatchEvent(new Event('change')); });
    }"""
    everything = opened.evaluate(shown)
    opened.evaluate(f"({choose})('', 'lure')")
    assert opened.evaluate(shown) == [one for one in everything if ":lure" in one] != everything
    opened.evaluate(f"({choose})('2', 'lure')")
    of_lora = opened.evaluate(shown)
    assert of_lora == [one for one in everything if "2:lure" in one] != [one for one in everything if ":lure" in one]
    said = opened.evaluate("document.querySelector('.filter-examples output').textContent")
    assert said == f"{len(of_lora)} of {len(everything)} examples"
    opened.evaluate(f"({choose})('', '')")
    assert opened.evaluate(shown) == everything


def test_rows_of_a_long_table_are_filtered_by_words(opened):
    rows = "[...document.querySelectorAll('#comparison-1 tbody tr')].filter((row) => !row.hidden).length"
    type_in = """(text) => {
      const box = document.querySelector('input[data-filters="comparison-1"]');
      box.value = text; box.dispatchEvent(new Event('input'));
    }"""
    everything = opened.evaluate(rows)
    opened.evaluate(f"({type_in})('malora flip')")
    assert 0 < opened.evaluate(rows) < everything
    opened.evaluate(f"({type_in})('no such thing')")
    assert opened.evaluate(rows) == 0


def test_the_keyboard_reaches_and_works_the_controls(opened):
    """Tab leads to the skip link first, and Enter on a heading's button sorts."""

    def press(key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            opened.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    press("Tab")
    assert opened.evaluate("document.activeElement.className") == "skip"
    opened.evaluate("document.querySelector('#table-runs thead button').focus()")
    press("Enter")
    assert opened.evaluate("document.querySelector('#table-runs th').getAttribute('aria-sort')") == "ascending"
    unnamed = "[...document.querySelectorAll('input, select')].filter((one) => !one.labels.length).length"
    assert opened.evaluate(unnamed) == 0
    assert opened.evaluate("[...document.querySelectorAll('svg')].every((one) => one.getAttribute('aria-label'))")


def test_the_policy_of_the_page_stops_what_it_must(opened):
    """A script that came in through a hole in the escaping would not run, and a request would not leave."""
    opened.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.bad = 1'}))")
    opened.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://192.0.2.1/x.png'}))")
    assert opened.evaluate("window.bad === undefined")
    assert len([one for one in opened.complaints if "Content Security Policy" in one]) == 2


def test_it_prints_with_everything_open(opened):
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.evaluate("[...document.querySelectorAll('details')].every((one) => one.open)")
    opened.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert opened.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    finally:
        opened.call("Emulation.setEmulatedMedia", media="")
