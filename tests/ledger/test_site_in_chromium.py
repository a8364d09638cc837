"""The page of the ledger in a browser: charts are drawn, nothing goes wrong, and it fits a phone."""

from __future__ import annotations

import pytest

from tests.ledger.page_cases import add_rung, browser, small_ledger, with_packages  # noqa: F401 - browser is a fixture
from tests.ledger.record_helpers import NAME, TRACK, run

pytestmark = [pytest.mark.slow, with_packages]

READY = "document.documentElement?.dataset.ready"
BASE = f"{TRACK}/{NAME}"
NEXT = f"{TRACK}/2026-11-24_Next"
PAPER = "getComputedStyle(document.body).backgroundColor"
LIGHT = "rgb(252, 251, 248)"
DARK = "rgb(23, 24, 27)"


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    root = small_ledger(tmp_path_factory.mktemp("site") / "repo")
    add_rung(root)
    assert run(root, "site", "--out", root / "page", "--no-verify") == 0
    return (root / "page" / "index.html").as_uri()


@pytest.fixture
def page(browser, address):  # noqa: F811
    """The page, just loaded in a wide window of a light system, that nothing has gone wrong on."""
    browser.size(1280, 900)
    browser.prefer("light")
    browser.go("about:blank")
    browser.go(address)
    browser.wait_for(READY)
    browser.run("localStorage.clear()")
    yield browser
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:", "about:"))] == []


def points(page, within: str) -> list[int]:
    """Return how many points each trace of the charts inside an element has."""
    return page.run(
        f"[...document.querySelectorAll('{within} .plot')]"
        ".flatMap((node) => node.data.map((trace) => trace.x.length))"
    )


def pixels_of_lines(page, within: str) -> int:
    """Return how many lines of the charts inside an element have a length on the screen."""
    return page.run(
        f"[...document.querySelectorAll('{within} .plot .js-line')]"
        ".filter((line) => line.getTotalLength() > 20).length"
    )


def open_result(page, key: str) -> str:
    """Go to a result as a link does, wait for its curves, and return its selector."""
    anchor = key.replace("/", "-")
    page.run(f"location.hash = '{anchor}'")
    selector = f'[id="{anchor}"]'
    page.wait_for(f"document.querySelector('{selector} .plot')?.data")
    return selector


def choose(page, *keys: str) -> None:
    """Choose just these results for the comparison, in this order."""
    page.run("document.querySelectorAll('#choices input:checked').forEach((input) => input.click())")
    for key in keys:
        page.run(f"document.querySelector('#choices input[value=\"{key}\"]').click()")


def test_charts_are_drawn(page):
    assert points(page, "#histories") == [4, 1, 2, 1, 1, 0]  # stairs, without and with a spread; twice
    assert pixels_of_lines(page, "#histories") >= 1
    assert pixels_of_lines(page, "#comparison") == 12  # two records, three seeds, loss and bpb
    page.run("document.querySelector('#sweeps').scrollIntoView()")
    page.wait_for("document.querySelector('.effects .plot')?.data")
    assert points(page, ".effects")[:2] == [0, 4]
    page.wait_for("document.querySelector('#sweeps .curves .plot')?.data")
    assert pixels_of_lines(page, "#sweeps .curves") >= 5
    assert pixels_of_lines(page, "#ladder") == 4
    pictures = page.run("[...document.images].map((image) => image.naturalWidth)")
    assert len(pictures) == 3 and min(pictures) > 100


def test_a_result_is_opened_by_its_address(page):
    selector = open_result(page, NEXT)
    assert page.run(f"document.querySelector('{selector}').open")
    page.wait_for(f"Math.abs(document.querySelector('{selector}').getBoundingClientRect().top) < 40")
    assert pixels_of_lines(page, selector) == 6
    loss = page.run(f"document.querySelector('{selector} .plot').getAttribute('aria-label')")
    assert loss.startswith("Training loss, nats per token: seed 42 from 4.4164 at step 50 to ")


def test_curves_against_time_and_the_end_of_a_run(page):
    selector = open_result(page, NEXT)
    axis = f"document.querySelector('{selector} .plot').layout.xaxis"
    assert page.run(f"{axis}.title.text") == "step"
    page.run(f"document.querySelector('{selector} input[value=time]').click()")
    assert page.run(f"{axis}.title.text") == "training time (s)"
    low, high = page.run(f"{axis}.range")
    assert 15 < low < 27 and 270 < high < 280  # the last 90 % of 270 s
    page.run(f"document.querySelector('{selector} input[value=\"0.9\"]').click()")
    low, high = page.run(f"{axis}.range")
    assert 240 < low < 245 and 270 < high < 275


def test_dragging_zooms_and_a_double_click_goes_back(page):
    page.run("document.querySelector('#comparison .plot').scrollIntoView({block: 'center'})")
    box = "document.querySelector('#comparison .plot .nsewdrag').getBoundingClientRect()"
    left, top, width, height = page.run(f"[{box}.left, {box}.top, {box}.width, {box}.height]")
    before = page.run("document.querySelector('#comparison .plot').layout.xaxis.range")

    def mouse(kind: str, share: float, count: int = 1) -> None:
        spot = {"x": left + share * width, "y": top + (0.3 + share / 3) * height}
        buttons = {"button": "left", "buttons": 1, "clickCount": count}
        page.call("Input.dispatchMouseEvent", type=kind, **spot, **buttons)

    mouse("mousePressed", 0.3)
    mouse("mouseMoved", 0.5)
    mouse("mouseMoved", 0.7)
    mouse("mouseReleased", 0.7)
    span = "(([low, high]) => high - low)(document.querySelector('#comparison .plot').layout.xaxis.range)"
    page.wait_for(f"{span} < {0.6 * (before[1] - before[0])}")
    mouse("mouseMoved", 0.5)
    page.wait_for("document.querySelector('#comparison .hoverlayer').textContent.includes('Next')")


def test_two_results_are_compared(page):
    assert page.run(
        "[...document.querySelectorAll('#choices input:checked')].map((input) => input.value)"
    ) == [
        NEXT,
        BASE,
    ]
    table = "document.querySelector('#comparison table').innerText"
    assert "to Base" in page.run(table)
    choose(page, NEXT)
    assert page.run("document.querySelector('#comparison').innerText") == "Choose at least two."
    choose(page, NEXT, BASE)
    row = page.run("document.querySelector('#comparison tbody tr:nth-child(2)').innerText").split("\t")
    assert row[0] == "Base" and float(row[3]) > 0.01 and " to +" in row[4] and float(row[5]) < 0.001
    assert pixels_of_lines(page, "#comparison") == 12
    settings = page.run("document.querySelectorAll('#comparison table')[1].innerText")
    assert "matrix_lr\t0.04\t0.03" in settings and "run_id" not in settings
    choose(page, NEXT, "track_optimizer_race/2026-11-26_Race")
    assert "scored in different ways" in page.run("document.querySelector('#comparison').innerText")


def test_the_theme_follows_the_system_and_the_switch(page):
    ink = "document.querySelector('#comparison .plot').layout.hoverlabel.font.color"
    assert page.run(PAPER) == LIGHT and page.run(ink) == "rgb(29, 28, 26)"
    page.prefer("dark")
    assert page.run(PAPER) == DARK
    page.wait_for(f"{ink} === 'rgb(228, 226, 220)'")
    page.run("document.querySelector('#theme input[value=light]').click()")
    assert page.run(PAPER) == LIGHT and page.run(ink) == "rgb(29, 28, 26)"
    page.run("document.querySelector('#theme input[value=auto]').click()")
    assert page.run(PAPER) == DARK


def test_the_keyboard_reaches_everything(page):
    names = []
    for _ in range(9):
        page.press("Tab", 9)
        names.append(page.run("document.activeElement.value ?? document.activeElement.textContent"))
    assert names[:4] == ["To the content", "auto", "Best scores", "Boards"]
    page.run("document.querySelector('#theme input').focus()")
    page.press("ArrowRight", 39)
    assert page.run("document.documentElement.dataset.theme") == "light"
    unnamed = page.run(
        "[...document.querySelectorAll('input, summary, [role=img], [role=region], img')].filter((node) =>"
        " !(node.labels?.[0]?.innerText || node.innerText || node.getAttribute('aria-label') || node.alt)"
        " && node.checkVisibility()).length"
    )
    assert unnamed == 0


def test_source_diffs_are_unpacked_when_they_are_opened(page):
    selector = open_result(page, NEXT)
    page.run(f"document.querySelector('{selector} .diff').open = true")
    page.run(f"document.querySelector('{selector} .section').open = true")
    page.wait_for(f"document.querySelector('{selector} pre.lines')")
    lines = page.run(
        f"[...document.querySelectorAll('{selector} .lines .add')].map((line) => line.textContent)"
    )
    assert lines == ["+    return lzma.compress(b'' + source.encode())"]


def test_a_phone_has_no_horizontal_scroll(page, address):
    page.size(375, 812, is_phone=True)
    page.go("about:blank")
    page.go(address)
    page.wait_for(READY)
    page.run("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    open_result(page, NEXT)
    page.run("document.querySelectorAll('.curves[data-entries], [data-sweep]').forEach(drawBlock)")
    assert page.run("document.documentElement.scrollWidth") == 375
    wide = page.run(
        "[...document.querySelectorAll('.plot, figure, p, h2, summary, caption')].filter((node) =>"
        " node.getBoundingClientRect().right > 376).length"
    )
    assert wide == 0


def test_paper_has_every_result_open_and_drawn(page):
    widest = "Math.max(...[...document.querySelectorAll('.plot .main-svg')].map((svg) => svg.clientWidth))"
    assert page.run(widest) > 1000
    # At once, as a browser prints: what a chart does later is not on the paper.
    assert 500 < page.run(f"dispatchEvent(new Event('beforeprint')), {widest}") <= 704
    assert page.run("document.querySelectorAll('details.entry:not([open])').length") == 0
    assert page.run("document.querySelectorAll('.curves:not(:has(svg))').length") == 0
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run(PAPER) == "rgb(255, 255, 255)"
    assert page.run("document.querySelector('nav').checkVisibility()") is False
    page.call("Emulation.setEmulatedMedia", media="")
    page.run("dispatchEvent(new Event('afterprint'))")
    page.wait_for(f"{widest} > 1000")
