"""The leaderboard page in a real browser: on a phone, and by keyboard alone."""

import pytest
from browser import CHROMIUM, Browser
from test_leaderboard import result

from tasks.engine.comparison import compare
from tasks.engine.leaderboard import summarise
from tasks.engine.leaderboard_page import page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    results = [
        result(a, s, v + s / 100, task)
        for task in ("vit", "traffic")
        for a, v in (("softmax", 0.7), ("mala", 0.9), ("linear", 0.8))
        for s in range(3)
    ]
    for r in results:
        r["baselines"] = {"majority": {"accuracy": 0.1}}
    failures = [
        {"task": "traffic", "attention": "gdn", "seed": s, "kind": "E", "reason": "why " * 60} for s in (0, 1)
    ]
    rows = summarise(results)
    path = tmp_path_factory.mktemp("board") / "leaderboard.html"
    path.write_text(page(rows, failures, results, compare(rows, results, failures), None))
    return path


@pytest.mark.parametrize("width", [390, 1280])
def test_only_tables_scroll_sideways(browser, board, width):
    browser.open(board, width)
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    outside = "[...document.querySelectorAll('h1,h2,h3,p,li,form,input,select')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    assert browser.ask(f"{outside}.length") == 0
    first = "document.querySelector('section[data-task] td[data-value]').getBoundingClientRect().right <= innerWidth"
    assert browser.ask(first), "the metric that decides the order is not in sight"


def test_sorting_and_filtering_by_keyboard(browser, board):
    browser.open(board, 1280)
    column = (
        "[...document.querySelector('section[data-task=vit] tbody').rows].map(r => r.cells[0].textContent)"
    )
    ordered = ["mala", "linear", "softmax", "majority (baseline)"]
    assert browser.ask(column) == ordered

    def tab_to(condition):
        for _ in range(80):
            browser.press("Tab")
            if browser.ask(f"(e => {condition})(document.activeElement)"):
                return
        raise AssertionError(f"Tab never reaches {condition}")

    tab_to("e.name === 'words'")
    browser.press("mala lin")
    shown = (
        "[...document.querySelectorAll('section[data-task=vit] tbody tr')].filter(r => r.offsetHeight).length"
    )
    assert browser.ask(shown) == 2
    browser.ask("document.forms[0].words.value = ''")
    tab_to("e.name === 'baselines'")
    browser.press(" ")
    assert browser.ask(shown) == 3
    browser.press(" ")
    assert browser.ask(shown) == 4
    tab_to("e.textContent === 'accuracy' && e.closest('section').dataset.task === 'vit'")
    assert browser.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid", (
        "focus is not seen"
    )
    browser.press("Enter")
    assert browser.ask(column) == ordered[::-1]
    assert browser.ask("document.activeElement.closest('th').ariaSort") == "ascending"
    browser.press("Enter")
    assert browser.ask(column) == ordered
    tab_to("e.textContent === 'reason'")  # tables of failures as well
