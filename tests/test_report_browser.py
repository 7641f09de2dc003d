"""The report in headless Chromium: drawn, hovered, clicked, on a phone, in the dark and on paper.

Without Chromium these tests skip; where the environment variable CI is set, that is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
import report_runs
from browser import CHROMIUM, Browser
from report_page import HOSTILE

from pyarith.reporting import SavedRun
from pyarith.reporting.report import write_report


@pytest.fixture(scope="module", autouse=True)
def chromium():
    if CHROMIUM is None:
        reason = "Chromium is not installed: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def browser(chromium, tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    run = report_runs.write_all(tmp_path_factory.mktemp("report") / "run", prompt=HOSTILE, foreign=HOSTILE)
    return write_report(SavedRun.open(run)).path


@pytest.fixture(scope="module")
def opened(browser, path):
    return browser.open(path)


@pytest.fixture
def page(opened):
    """One page for the tests that leave it as it was; a tab behind another draws nothing."""
    opened.send("Page.bringToFront")
    return opened


def box(page, selector):
    """left, top, width, height in the window, scrolled into view."""
    return page.evaluate(
        f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
        "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
    )


def hover_cell(page, section, row, column, rows, columns):
    """Move the mouse to the middle of a heat map's cell; returns what the label says."""
    chart = f"section[aria-labelledby={section}] .panel:not([hidden]) .chart:has(.heatmaplayer image)"
    left, top, width, height = box(page, f"{chart} .heatmaplayer")
    label = f"document.querySelector({chart + ' .hoverlayer'!r}).textContent"
    page.move(1, 1)
    page.until(f"{label} === ''")
    page.move(left + width * (column + 0.5) / columns, top + height * (row + 0.5) / rows)
    page.until(f"{label} !== ''")
    return page.evaluate(label)


def middle(page, selector):
    left, top, width, height = box(page, selector)
    return left + width / 2, top + height / 2


DRAWN = "[...document.querySelectorAll('.chart')].filter(c => c.offsetParent).map(c => !!c.querySelector('.main-svg'))"


def test_everything_is_drawn_and_nothing_is_asked_for(page, path):
    drawn = page.evaluate(DRAWN)
    assert len(drawn) == 12 and all(drawn)
    others = [address for address in page.requests if not address.startswith("data:")]
    assert others == [path.resolve().as_uri()]
    assert page.errors == []


def test_hover_says_the_head_and_its_numbers(page, path):
    key = report_runs.KEY["+"]
    text = hover_cell(page, "heads", *key, report_runs.LAYERS, report_runs.HEADS)
    rows = (path.parent / "add" / "heads.csv").read_text().splitlines()
    first = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert (first["layer"], first["head"]) == tuple(str(one) for one in key)
    assert f"head {key}, addition +" in text and f"effect {100 * float(first['effect']):+.1f}%" in text
    assert f"{float(first['logit_change']):+.2f} logits" in text and "adjusted p" in text
    other = hover_cell(page, "heads", 0, 0, report_runs.LAYERS, report_runs.HEADS)
    assert other.startswith("head 0.0")


def test_tabs_change_the_map_by_click_and_by_key(page):
    def tab(number):
        return f"#heads-tab-{number}"

    chosen = "[...document.querySelectorAll('[id^=heads-tab-]')].map(t => t.getAttribute('aria-selected'))"
    assert page.evaluate(chosen) == ["true", "false"]
    page.click(*middle(page, tab(2)))
    assert page.evaluate(chosen) == ["false", "true"]
    assert page.evaluate("document.getElementById('heads-1').hidden && !document.getElementById('heads-2').hidden")
    key = report_runs.KEY["*"]
    text = hover_cell(page, "heads", *key, report_runs.LAYERS, report_runs.HEADS)
    assert f"head {key}, multiplication *" in text
    page.evaluate(f"document.querySelector('{tab(2)}').focus()")
    page.key("ArrowRight")
    assert page.evaluate(chosen) == ["true", "false"] and page.evaluate("document.activeElement.id") == "heads-tab-1"


@pytest.mark.parametrize("policy", [True, False])
def test_foreign_text_does_not_run(browser, page, path, policy):
    """Also with the page's own content policy taken away, so that the escaping is what holds."""
    if not policy:
        bare = path.with_name("bare.html")
        text = path.read_text(encoding="utf-8")
        bare.write_text(text.replace("http-equiv", "data-none", 1), encoding="utf-8")
        page = browser.open(bare)
    assert page.evaluate("window.bad === undefined && document.images.length === 0")
    shown = page.evaluate("document.querySelector('main').textContent")
    assert HOSTILE in shown
    text = hover_cell(page, "attention", 0, 0, 2, report_runs.TOKENS)
    assert HOSTILE[:40] in text and "<b>&lt;i&gt;</b>" in text  # as it is, no tag taken for one
    assert page.evaluate("window.bad === undefined && document.querySelectorAll('svg a, svg img').length === 0")
    assert page.errors == []


def test_no_sideways_scrolling_on_a_phone(browser, path):
    page = browser.open(path, width=360, height=740)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => e.offsetParent && !e.closest('.scroll') &&"
        "e.getBoundingClientRect().right > 361).map(e => e.tagName + e.className)"
    )
    assert wide == []
    assert page.evaluate("[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)")
    assert all(page.evaluate(DRAWN)) and page.errors == []
    widths = page.evaluate("[...document.querySelectorAll('.main-svg')].map(e => e.getBoundingClientRect().width)")
    assert max(widths) <= 328


def contrast(first: str, second: str) -> float:
    """WCAG's ratio of two colours as ``rgb(r, g, b)``."""

    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, bright = sorted((light(first), light(second)))
    return (bright + 0.05) / (dark + 0.05)


def test_dark_and_light_can_be_read(page):
    """The scheme is switched while the page is open: charts follow."""
    colours = (
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        "getComputedStyle(document.querySelector('.xtick text')).fill]"
    )
    ink = "getComputedStyle(document.body).color"  # the ticks' colour once the chart is drawn again
    seen = []
    for scheme in ("dark", "light"):
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.until(f"getComputedStyle(document.querySelector('.xtick text')).fill === ({ink})")
        background, text, ticks = page.evaluate(colours)
        assert contrast(background, text) > 7 and contrast(background, ticks) > 7, (scheme, background, text, ticks)
        seen.append(background)
    assert contrast(*seen) > 10


def test_paper_has_every_panel_table_and_number(browser, path, tmp_path):
    page = browser.open(path)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    assert all(page.evaluate(DRAWN)) and len(page.evaluate(DRAWN)) == 20
    assert page.evaluate("document.querySelector('main').getBoundingClientRect().width") == 680
    wide = page.evaluate(
        "[...document.querySelectorAll('table, .main-svg')].filter(e => e.getBoundingClientRect().width > 681).length"
    )
    assert wide == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0 and len(page.evaluate(DRAWN)) == 12
    page.print(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-") and page.errors == []
    if shutil.which("pdftotext") is None:
        return  # what the page looked like for printing was checked above
    command = ["pdftotext", "-layout", str(tmp_path / "report.pdf"), "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for sign in ("add", "mul"):
        header, *rows = (path.parent / sign / "heads.csv").read_text().splitlines()
        for row in (dict(zip(header.split(","), line.split(","), strict=True)) for line in rows):
            assert f"{100 * float(row['effect']):+.1f}%" in text
            assert f"{100 * float(row['effect_low']):+.1f}% .. {100 * float(row['effect_high']):+.1f}%" in text
    for words in ("multiplication *", "worst .. best", "p against it", "sha256:"):
        assert words in text
