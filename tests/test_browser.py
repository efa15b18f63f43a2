"""The report in a real browser: Debian's Chromium, driven by Playwright; skipped where either is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished
from test_report import EVIL, poison

from stillroom.report import build_report, open_run
from stillroom.report_command import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: uv sync")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

# Of every element with text of its own: the contrast of its colour with the nearest background behind it (WCAG 2).
CONTRASTS = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const node of document.body.querySelectorAll("*:not(script)")) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim())) continue;
    const style = getComputedStyle(node);
    const ink = parse(node.tagName.toLowerCase() === "text" ? style.fill : style.color);
    let behind = node;
    while ((parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const [a, b] = [light(ink), light(parse(getComputedStyle(behind).backgroundColor))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.tagName + ": " + node.textContent]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(finished: Finished, compared: Finished, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    made = {"run": [finished], "comparison": [compared], "both": [finished, compared]}
    for name, runs in made.items():
        write_report([run.directory for run in runs], folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


class Opened:
    """A page opened from disk, and everything that it said or asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, theme: str = "light", **options: Any) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion="reduce", **options
        )
        self.page = self.context.new_page()
        self.heard: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.heard.append(message.text))
        self.page.on("pageerror", lambda error: self.heard.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.heard.append("a dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exception: object) -> None:
        self.context.close()


@pytest.mark.parametrize(
    ("name", "width", "theme"),
    [
        *(("comparison", width, theme) for width in (360, 768, 1280) for theme in ("light", "dark")),
        ("run", 360, "dark"),
        ("run", 1280, "light"),
        ("both", 768, "dark"),
    ],
)
def test_it_renders_at_every_width_in_both_themes(
    name: str, width: int, theme: str, browser: Any, reports: dict[str, Path]
) -> None:
    with Opened(browser, reports[name], width, theme) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # only tables and pictures scroll
        for image in page.locator("img").all():
            assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
        dark = page.evaluate("[...document.querySelectorAll('source')].map(s => s.srcset === s.nextSibling.currentSrc)")
        assert dark
        assert set(dark) == {theme == "dark"}
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(21, 24, 28)" if theme == "dark" else "rgb(255, 255, 255)")
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 100
        assert [text for contrast, text in contrasts if contrast < 4.5] == []
        assert opened.heard == []
        assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []


def value(text: str) -> float:
    return float(text.split()[0])


class Sorted:
    """The table that has a column of this name, and that column."""

    def __init__(self, page: Any, name: str) -> None:
        self.table = page.locator("figure", has=page.locator("th", has_text=name))
        self.heads = self.table.locator("thead th")
        self.number = self.heads.all_text_contents().index(name) + 1
        self.head = self.heads.nth(self.number - 1)

    @property
    def texts(self) -> list[str]:
        return list(self.table.locator(f"tbody tr > :nth-child({self.number})").all_text_contents())

    @property
    def way(self) -> str:
        return str(self.head.get_attribute("aria-sort"))


def test_a_table_sorts_by_click_and_by_keyboard(browser: Any, reports: dict[str, Path]) -> None:
    with Opened(browser, reports["comparison"]) as opened:
        page = opened.page
        top1 = Sorted(page, "top-1")
        before = top1.texts
        top1.head.locator("button").click()
        assert top1.way == "descending"
        assert [value(text) for text in top1.texts] == sorted(map(value, before), reverse=True)
        assert top1.table.locator("[role=status]").text_content() == "sorted by top-1, descending"
        page.keyboard.press("Enter")
        assert top1.way == "ascending"
        assert [value(text) for text in top1.texts] == sorted(map(value, before))
        page.keyboard.press("Shift+Tab")  # back to the head before it
        assert top1.head.evaluate("head => head.previousSibling.contains(document.activeElement)")
        page.keyboard.press("Space")
        assert top1.way == "none"

        naturals = Sorted(page, "vs naturals, equal epochs")  # which some rows do not have
        naturals.head.locator("button").click()
        known = [value(text) for text in naturals.texts if text != "-"]
        assert 0 < len(known) < len(naturals.texts)
        assert known == sorted(known, reverse=True)
        assert naturals.texts[len(known) :] == ["-"] * (len(naturals.texts) - len(known))

        methods = Sorted(page, "vs naturals, equal epochs")
        methods.number = 1
        methods.heads.first.locator("button").click()
        assert methods.heads.first.get_attribute("aria-sort") == "ascending"
        assert methods.texts == sorted(methods.texts)
        assert opened.heard == []


def test_the_keyboard_reaches_everything(browser: Any, reports: dict[str, Path]) -> None:
    with Opened(browser, reports["run"], 360) as opened:
        page = opened.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "To the results"
        wide = "[...document.querySelectorAll('.scroll, pre')].filter(n => n.scrollWidth > n.clientWidth + 1)"
        assert page.evaluate(f"{wide}.length") > 2
        assert page.evaluate(f"{wide}.every(n => n.tabIndex === 0)")
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.querySelector('details').open")


def test_it_prints_on_light_paper_with_everything_unfolded(browser: Any, reports: dict[str, Path]) -> None:
    with Opened(browser, reports["comparison"], theme="dark") as opened:
        page = opened.page
        look = "window.unfolded = !document.querySelector('details:not([open])')"
        page.evaluate(f"addEventListener('beforeprint', () => {{ {look} }})")
        assert page.pdf().startswith(b"%PDF")
        assert page.evaluate("window.unfolded")
        assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_without_scripts_all_is_there_but_the_sorting(browser: Any, reports: dict[str, Path]) -> None:
    with Opened(browser, reports["comparison"], java_script_enabled=False) as opened:
        assert opened.page.locator("table button").count() == 0
        assert opened.page.locator("tbody tr").count() > 6
        assert "the highest of 3 sets" in str(opened.page.locator(".claim").text_content())


def test_nothing_on_the_page_can_reach_a_network(browser: Any, reports: dict[str, Path]) -> None:
    with Opened(browser, reports["run"]) as opened:
        said = opened.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'reached', error => String(error))")
        assert "Failed to fetch" in said
        assert any("violates" in text and "Content Security Policy" in text for text in opened.heard)


def test_hostile_names_do_nothing(browser: Any, compared: Finished, tmp_path: Path) -> None:
    run = open_run(compared.directory)
    evil = replace(run, results=poison(run.results), sets={EVIL: next(iter(run.sets.values()))})
    path = tmp_path / "evil.html"
    path.write_bytes(build_report([evil], {}).encode("utf-8", "replace"))
    with Opened(browser, path) as opened:
        assert "<script>alert(1)</script>" in str(opened.page.locator("table").first.text_content())
        assert opened.heard == []
