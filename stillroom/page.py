"""What a report's page is made of: escaped elements, tables that sort, two kinds of charts, and the frame.

    page("title", element("h1", "a & b"), table(header, rows, "caption"))

A page is one file that asks no network for anything: its Content-Security-Policy forbids it all, and lets only its own
style (page.css) and script (page.js) in, by their hashes. Text is HTML throughout, so that it keeps its size on a
phone; charts are SVG strips that stretch. Colours follow the reader's theme. Without JavaScript only sorting is lost.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillroom.figures.style import BACKGROUNDS, COLOURS, INKS

_VOID = ("meta", "img", "source", "br", "line", "circle", "polyline", "rect")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # no text, and refused by parsers
_NUMBER = re.compile(r"[-+−]?\d[\d,]*(\.\d+)?")

_HERE = Path(__file__).parent
STYLE = (
    f":root {{ --paper: {BACKGROUNDS[False]}; --ink: {INKS[False]}; }}\n@media screen and (prefers-color-scheme: dark) "
    f"{{ :root {{ --paper: {BACKGROUNDS[True]}; --ink: {INKS[True]}; }} }}\n"
    + "".join(f".curve .c{number} {{ stroke: {colour}; }}\n" for number, colour in enumerate(COLOURS))
    + (_HERE / "page.css").read_text("utf-8")
)
SCRIPT = (_HERE / "page.js").read_text("utf-8")


class Html(str):
    """Text that is HTML already; every other text is escaped where it is put into an element."""


def element(name: str, /, *inside: str, **attributes: object) -> Html:
    """Return an element; what is not Html is escaped. In attributes' names `_` stands for `-`, a last one for nothing.

    One that is None is left out.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID and not inside:
        return Html(f"<{name}{said}/>")
    return Html(f"<{name}{said}>{join(*inside)}</{name}>")


def join(*parts: str) -> Html:
    """Return parts one after another, those that are not Html escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def escape(text: str) -> Html:
    """Return text as HTML that shows it, in elements and in attributes; what is no character becomes U+FFFD."""
    return Html(html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text), quote=True))


def section(title: str, place: str, *inside: str, level: int = 2) -> Html:
    """Return a section with a heading of this level, which links reach as #place."""
    return element("section", element(f"h{level}", title, id=place), *inside, aria_labelledby=place)


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Return names and what they are, one below another."""
    return element("dl", *(join(element("dt", name), element("dd", value)) for name, value in pairs))


def code(text: str, label: str) -> Html:
    """Return lines of code, which the keyboard can scroll."""
    return element("pre", element("code", text), tabindex=0, role="region", aria_label=label)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, own: Sequence[bool] = (), *, place: str
) -> Html:
    """Return a table that sorts by the button in any of its heads, by keyboard too; it scrolls where it is too wide.

    A column after the first counts as numbers where half of its cells begin with one; those without sort last.
    own: which rows stand out. place: a name of its own on the page.
    """
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    found = [sum(_NUMBER.match(cell) is not None for cell in column) for column in columns]
    filled = [sum(cell not in ("", "-") for cell in column) for column in columns]
    numeric = [number > 0 and 2 * found[number] >= max(filled[number], 1) for number in range(len(header))]
    heads = [
        element("th", name, scope="col", class_=None if each else "text")
        for name, each in zip(header, numeric, strict=True)
    ]
    lines = []
    for number, row in enumerate(rows):
        cells = [element("th", row[0], scope="row")]
        for text, each in zip(row[1:], numeric[1:], strict=True):
            first = _NUMBER.match(text) if each else None
            value = None if first is None else first[0].replace(",", "").replace("−", "-").lstrip("+")
            cells.append(element("td", text, data_value=value, class_=None if each else "text"))
        lines.append(element("tr", *cells, class_="own" if own and own[number] else None))
    return element(
        "figure",
        element("figcaption", caption, id=place),
        element(
            "div",
            element(
                "table",
                element("thead", element("tr", *heads)),
                element("tbody", *lines),
                class_="sortable",
                aria_labelledby=place,
            ),
            class_="scroll", tabindex=0, role="region", aria_labelledby=place,
        ),
        element("p", "", role="status", class_="soft"),
    )  # fmt: skip


@dataclass(frozen=True)
class Strip:
    """One line of a chart of accuracies in %: a name, the value of each seed, and whether it is the chart's own."""

    name: str
    values: tuple[float, ...]
    mean: float
    deviation: float | None
    spelt: str
    own: bool = False


def strips(lines: Sequence[Strip], low: float, high: float) -> Html:
    """Return a chart: a strip per line from `low` to `high`, seeds hollow, the mean full, its deviation as a bar."""

    def at(value: float) -> str:
        return f"{100 * (min(max(value, low), high) - low) / (high - low):.2f}%"

    ticks = round_ticks(low, high)
    grid = [element("line", x1=at(tick), x2=at(tick), y1="0", y2="100%") for tick in ticks]
    drawn = []
    for line in lines:
        marks = list(grid)
        if line.deviation is not None:
            ends = at(line.mean - line.deviation), at(line.mean + line.deviation)
            marks.append(element("line", x1=ends[0], x2=ends[1], y1="50%", y2="50%", class_="bar"))
        marks += [element("circle", cx=at(value), cy="50%", r=3, class_="seed") for value in line.values]
        marks.append(element("circle", cx=at(line.mean), cy="50%", r=4.5, class_="mean"))
        drawn.append(
            element(
                "li",
                element("span", line.name),
                element("svg", *marks, aria_hidden="true"),  # the text beside it says it all
                element("span", line.spelt, class_="value"),
                class_="own" if line.own else None,
            )
        )
    named = [
        element("text", f"{tick:g}", x=at(tick), y="80%", text_anchor="middle")
        for tick in ticks
        if 0.02 < (tick - low) / (high - low) < 0.98 or tick in (ticks[0], ticks[-1])
    ]
    axis = element("li", element("span"), element("svg", *named, aria_hidden="true"), element("span"), class_="axis")
    return element("ul", *drawn, axis, class_="strips")


def curve(title: str, lines: Sequence[Sequence[tuple[float, float]]], said: str, colour: int = 0) -> Html:
    """Return one small chart of lines of points (x, y), y logarithmic where it spans more than 30 times its least.

    said: the alternative text, which stands in place of the picture for who does not see it.
    """
    xs, ys = ([point[axis] for line in lines for point in line] for axis in (0, 1))
    logarithmic = min(ys) > 0 and max(ys) > 30 * min(ys)
    values = [math.log(y) for y in ys] if logarithmic else ys
    low, high, left, right = min(values), max(values), min(xs), max(xs)
    high, right = (high if high > low else low + 1), (right if right > left else left + 1)

    def place(x: float, y: float) -> str:
        value = math.log(y) if logarithmic else y
        return f"{100 * (x - left) / (right - left):.1f},{100 - 100 * (value - low) / (high - low):.1f}"

    drawn = [
        element("polyline", points=" ".join(place(*point) for point in line), class_=f"c{colour}") for line in lines
    ]
    plot = element("svg", *drawn, x="22%", y="4%", width="76%", height="80%", viewBox="0 0 100 100",
                   preserveAspectRatio="none")  # fmt: skip
    texts = [
        element("text", f"{max(ys):.2g}", x="20%", y="9%", text_anchor="end"),
        element("text", f"{min(ys):.2g}", x="20%", y="85%", text_anchor="end"),
        element("text", f"{left:g}", x="22%", y="97%"),
        element("text", f"{right:g}", x="98%", y="97%", text_anchor="end"),
        element("text", "log" if logarithmic else "", x="20%", y="47%", text_anchor="end"),
    ]
    axes = [
        element("line", x1="22%", x2="22%", y1="4%", y2="84%"),
        element("line", x1="22%", x2="98%", y1="84%", y2="84%"),
    ]
    return element(
        "figure",
        element("svg", *axes, plot, *texts, role="img", aria_label=said),
        element("figcaption", title),
        class_="curve",
    )


def picture(light: bytes, dark: bytes | None, said: str, caption: str, kind: str) -> Html:
    """Return a picture within the page, alternative text `said`; `dark` on dark screens. kind: png, jpeg, svg+xml."""

    def data(content: bytes) -> str:
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

    shown: Html = element("img", src=data(light), alt=said)
    if dark is not None:
        media = "screen and (prefers-color-scheme: dark)"
        shown = element("picture", element("source", srcset=data(dark), media=media), shown)
    scrolled = element("div", shown, class_="scroll", tabindex=0, role="region", aria_label=caption)
    return element("figure", scrolled, element("figcaption", caption))


def round_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from `low` to `high`."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw)
    first = math.ceil(round(low / step, 9))
    return [round((first + number) * step, 9) for number in range(math.floor(round(high / step, 9)) - first + 1)]


def page(title: str, *inside: str) -> str:
    """Return a whole page in UTF-8 that lets nothing in but itself."""
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content="stillroom"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    body = element("body", *inside, element("script", Html(SCRIPT)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
