"""The report: one page of finished runs and comparisons, from their files alone, to be opened from disk.

    runs = [open_run(Path("runs/demo"))]
    Path("report.html").write_text(build_report(runs, {}))

It reads what runs left and imports no stage; whoever wants the gallery's figures in it hands them over (see
report_command.py). What a run lacks is named on the page; what is damaged is refused.
"""

from __future__ import annotations

import contextlib
import io
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image

from stillroom.card import budget_of, spell_loading
from stillroom.claims import (
    Claim,
    Verdict,
    claims_of,
    count_seeds,
    describe_set,
    headline,
    spell_grain,
    spell_spread,
    spread_of,
)
from stillroom.errors import StillroomError
from stillroom.events import (
    Training,
    event_files,
    read_config,
    read_events,
    read_lines,
    require_run,
    seconds_within,
    trainings_of,
)
from stillroom.figures.style import COLOURS, colours_of, listed
from stillroom.files import read_bytes, read_json
from stillroom.manifest import Manifest, read_manifest
from stillroom.page import (
    Html,
    Strip,
    code,
    curve,
    element,
    facts,
    join,
    page,
    picture,
    section,
    strips,
    table,
)
from stillroom.render import FIRST, PARTS, caption_of, failures_of, parts_of

SHEET_BYTES = 150_000  # of a contact sheet on the page; a larger one is shown smaller
SHEET_SIDE = 400
PANELS = 24  # of curves, at most
DIFFERING, LONGEST = 3, 80  # settings, and characters, by which runs of one title are told apart, at most

MARKS: dict[Verdict, tuple[str, str]] = {  # a sign and a class of style; the words beside it say the same
    "beaten": ("✓", "beaten"),
    "too close to call": ("≈", "too-close"),
    "not beaten": ("✗", "not-beaten"),
    "one seed": ("?", "too-close"),
}


@dataclass(frozen=True)
class Figure:
    """A picture of the gallery for light pages and for dark ones: PNG or SVG, its alternative text and its caption."""

    light: bytes
    dark: bytes
    said: str
    caption: str
    kind: Literal["png", "svg+xml"]


@dataclass(frozen=True)
class Opened:
    """What lies in a run's directory, read whole."""

    directory: Path
    settings: dict[str, Any]
    results: dict[str, Any] | None  # None: not finished
    sets: dict[str, tuple[Path, Manifest]]  # by name: the folder and what it holds
    events: tuple[dict[str, Any], ...]

    @property
    def kind(self) -> Literal["run", "comparison", "evaluation", "unfinished"]:
        if self.results is None:
            return "unfinished"
        return "comparison" if "rows" in self.results else "evaluation" if "evaluation" in self.results else "run"

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        results = self.results or {}
        if self.kind == "comparison":
            methods = {row.get("asked", row["method"]) for row in results["rows"]}
            return f"{len(methods)} methods on {results['dataset']['name']}" if methods else "a comparison without rows"
        if self.kind == "evaluation":
            by, its = f"students by {results['evaluation']['labels']} labels", results.get("set")  # older ones lack it
            return by if its is None else f"{describe_set(its, results['dataset']['name'])}: {by}"
        manifest = next((manifest for _, manifest in self.sets.values()), None)
        if manifest is not None:
            return f"{manifest.method} on {manifest.dataset.name}, {manifest.ipc} images per class"
        return f"{self.settings.get('method', 'a run')} that has no set yet"


def open_run(directory: Path) -> Opened:
    """Return what `directory` holds, of `stillroom run`, `demo`, `distill`, `evaluate --out` or `compare`.

    Raises StillroomError where it is no run, and where a file in it is damaged.
    """
    require_run(directory)
    settings = read_config(directory)["settings"]
    names = [name for name in ("comparison.json", "results.json") if (directory / name).exists()]
    results = read_json(directory / names[0]) if names else None
    sets = {}
    for folder in [directory, *sorted((directory / "sets").glob("*"))]:
        if (folder / "distilled" / "manifest.json").exists():
            sets[folder.name] = (folder / "distilled", read_manifest(folder / "distilled"))
    with as_written(directory):
        sets |= _evaluated(results, settings)
    for row in (results or {}).get("rows", ()):  # of sets that were there before
        if (place := row.get("folder")) and (Path(place) / "manifest.json").exists():
            sets[row["method"]] = (Path(place), read_manifest(Path(place)))
    opened = Opened(directory, settings, results, sets, tuple(read_events(directory)))
    with as_written(directory):
        if results is not None:
            claims_of(results)
    return opened


def _evaluated(results: Any, settings: dict[str, Any]) -> dict[str, tuple[Path, Manifest]]:
    """Return the set of an evaluation by its folder, where it lies there as it was: with the same files."""
    if not isinstance(results, dict) or "set" not in results or "evaluation" not in results:
        return {}
    given = Path(results["set"]["folder"])
    for folder in (given / "distilled", given):
        if (folder / "manifest.json").exists():
            manifest = read_manifest(folder)
            same = {role: held.sha256 for role, held in manifest.files.items()} == settings.get("distilled")
            return {str(given): (folder, manifest)} if same else {}
    return {}


def build_report(
    runs: Sequence[Opened], figures: Mapping[Path, Mapping[str, Figure]], notes: Sequence[str] = ()
) -> str:
    """Return the whole page: one run, or several beside each other, with their charts on one scale.

    figures: the gallery's, by directory and name. notes: what the page lacks and how to get it. Raises StillroomError
    where the results are not such as stillroom writes.
    """
    if not runs:
        raise StillroomError("runs is empty; give the directory of a run or of a comparison, such as runs/demo")
    scale = _scale_of(runs)
    titles, bodies = _titles(runs), []
    for number, run in enumerate(runs):
        with as_written(run.directory):
            place = f"run{number}-" if len(runs) > 1 else ""
            bodies.append(list(_sections(run, figures.get(run.directory, {}), scale, place)))
    title = titles[0] if len(runs) == 1 else f"{len(runs)} runs"
    said = [element("p", note, class_="note") for note in notes]
    if len(runs) == 1:
        (parts,) = bodies
        links = [(name, place) for name, place, _ in parts]
        inside = [_claim(runs[0]), *said, _contents(links), *(part for _, _, part in parts)]
    else:
        links = [("beside each other", "overview"), *((name, f"run{n}") for n, name in enumerate(titles))]
        inside = [*said, _contents(links), _overview(runs, titles, scale)]
        for number, (run, name, parts) in enumerate(zip(runs, titles, bodies, strict=True)):
            inside.append(section(name, f"run{number}", _claim(run), *(part for _, _, part in parts)))
    made = time.strftime("%Y-%m-%d", time.localtime(max((_last_time(run) for run in runs), default=0.0)))
    return page(
        f"{title}: stillroom report",
        element("a", "To the results", href="#content", class_="skip"),
        element("header", element("p", "stillroom report", class_="soft"), element("h1", title)),
        element("main", *inside, id="content"),
        element("footer", element("p", f"Last event {made}. Top-1 is that of the last epoch on the real test split.")),
    )


@contextlib.contextmanager
def as_written(directory: Path) -> Iterator[None]:
    """Within this context a result file that lacks something, or has it otherwise, is a damaged one."""
    try:
        yield
    except StillroomError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ArithmeticError) as error:
        raise StillroomError(
            f"the results in {directory} are not such as stillroom writes ({type(error).__name__}: {error}); they were "
            "edited, or another version made them: the command that made them writes them anew"
        ) from error


# -- the claim -----------------------------------------------------------------------------------------------------


def _claim(run: Opened) -> Html:
    if run.results is None:
        cells = sum(event["event"] in ("cell", "row") for event in run.events)
        text = (
            f"Not finished: {run.directory} has {'no results' if not cells else f'{cells} finished cells'} yet, and "
            "nothing is claimed before the controls are there. The command that began it goes on."
        )
        return element("p", text, class_="claim note")
    with as_written(run.directory):
        parts = [element("p", headline(run.results), class_="claim")]
        budget = run.results.get("bytes")
        if budget:
            larger = " It is larger than the images that it was made of." if budget["raw_ratio"] > 1 else ""
            total = sum(budget["raw"].values())
            parts.append(
                element(
                    "p",
                    f"The set takes {total:,} bytes raw, {_percent(budget['raw_ratio'])} of the real training set's, "
                    f"and {_percent(budget['stored_ratio'])} of them as stored.{larger}",
                )
            )
        failures = failures_of(run.results) if run.kind == "comparison" else []
        parts += [element("p", said, class_="note") for said in failures]
        if _stopped(run):
            parts.append(element("p", "It was stopped before its end: cells may be missing.", class_="note"))
    return join(*parts)


def _stopped(run: Opened) -> bool:
    last = [event["event"] for event in run.events if event["event"] in ("opened", "stopped")]
    return last[-1:] == ["stopped"]


def _verdicts(claim: Claim) -> Html:
    """Each control of a claim with its difference and verdict."""
    lines = [_marked(against.verdict, f"{against.control}: {against.said}") for against in claim.against]
    lines += [element("li", element("span", "!", class_="mark"), f"{control}: failed") for control in claim.lost]
    return element("ul", *lines, class_="verdicts")


def _marked(verdict: Verdict, text: str) -> Html:
    mark, kind = MARKS[verdict]
    return element("li", element("span", mark, class_="mark", aria_hidden="true"), text, class_=kind)


# -- the parts of one run ------------------------------------------------------------------------------------------

Part = tuple[str, str, Html]  # what a link says, where it leads, and what is there


def _sections(run: Opened, figures: Mapping[str, Figure], scale: tuple[float, float], prefix: str) -> Iterator[Part]:
    """Yield the parts of a run's page, those that it has something for."""
    parts: list[tuple[str, str, list[Html]]] = [
        ("Results", "results", _results(run, scale)),
        ("Bytes", "bytes", _bytes(run, prefix)),
        ("Pictures", "pictures", _pictures(run, figures)),
        ("Curves", "curves", _curves(run)),
        ("Table", "table", _tables(run, prefix)),
        ("Load it", "load", _loading(run)),
        ("Configuration", "configuration", _configuration(run)),
        ("Provenance", "provenance", _provenance(run)),
    ]
    for name, place, inside in parts:
        if inside:
            yield name, prefix + place, section(name, prefix + place, *inside, level=3 if prefix else 2)


def _contents(links: Sequence[tuple[str, str]]) -> Html:
    items = [element("li", element("a", name, href=f"#{place}")) for name, place in links]
    return element("nav", element("ul", *items), aria_label="Contents")


def _panels(run: Opened) -> dict[str, list[Strip]]:
    """Return the charts of accuracies: title to lines. Of a run one per kind of label, its controls below it."""
    if run.results is None or run.kind == "evaluation":
        return {}
    found: dict[str, list[Strip]] = {}
    claims = claims_of(run.results)
    if run.kind == "comparison":
        several = len({(claim.ipc, claim.student) for claim in claims}) > 1
        for claim in claims:
            title = f"{claim.labels} labels" + (f", ipc {claim.ipc}, {claim.student}" if several else "")
            found.setdefault(title, []).append(_strip(claim.method, claim.top1, False))
        return found
    for claim in claims:
        lines = [_strip(claim.method, claim.top1, True)]
        for cell in run.results["cells"]:
            if f"({claim.labels})" in cell["budget"]:
                budgets = [part for part in cell["budget"].split(", ") if f"({claim.labels})" in part]
                name = f"{cell['set']}, {cell['labels']}, {' and '.join(part.partition(' (')[0] for part in budgets)}"
                lines.append(_strip(name, cell["top1"], False))
        found[f"{claim.labels} labels"] = lines
    return found


def _strip(name: str, top1: Sequence[float], own: bool) -> Strip:
    values = tuple(map(float, top1))
    mean, deviation = spread_of(values)
    return Strip(name, values, mean, deviation, spell_spread(mean, deviation), own)


def _scale_of(runs: Sequence[Opened]) -> tuple[float, float]:
    """Return the least and the largest accuracy that the charts of all runs have room for, in tens or fives."""
    values: list[float] = []
    for run in runs:
        with as_written(run.directory):
            values += [value for lines in _panels(run).values() for line in lines for value in line.values]
    low, high = min(values, default=0.0), max(values, default=100.0)
    step = 10 if high - low > 20 else 5
    low = max(0, step * math.floor((low - 1) / step))
    return float(low), float(min(100, max(step * math.ceil((high + 1) / step), low + step)))


def _results(run: Opened, scale: tuple[float, float]) -> list[Html]:
    if run.results is None:
        return []
    claims, panels = claims_of(run.results), _panels(run)
    seeds = len(next((claim.top1 for claim in claims), ()))
    parts = []
    if panels:
        spread = f"hollow: each of {seeds} seeds; bar: ± one standard deviation" if seeds > 1 else "one seed, no spread"
        parts.append(
            element("p", f"Top-1 in %, from {scale[0]:g} to {scale[1]:g}; full: mean; {spread}.", class_="soft")
        )
        charts = [element("div", element("h3", title), strips(lines, *scale)) for title, lines in panels.items()]
        parts.append(element("div", *charts, class_="wide"))
    for claim in claims if run.kind == "run" else ():
        paper = "" if claim.paper is None else f" The paper reports {claim.paper:.1f} %."
        reached = f"{claim.method} reaches {claim.reached} in {claim.steps:,} steps.{paper} Against:"
        parts += [element("h3", f"Beside its controls, {claim.labels} labels"), element("p", reached), _verdicts(claim)]
    with_controls = [claim for claim in claims if run.kind == "comparison" and claim.against]
    if with_controls:
        lines = []
        for claim in with_controls:
            assert claim.hardest is not None
            lines.append(_marked(claim.hardest.verdict, claim.sentence))
        title = "Each method beside the control that is hardest to beat"
        parts += [element("h3", title), element("ul", *lines, class_="verdicts")]
    test = (run.results or {}).get("dataset", {}).get("test")
    if claims and test and (grain := spell_grain(test)):
        parts.append(element("p", f"{grain[:1].upper()}{grain[1:]}.", class_="soft"))
    if claims:
        parts.append(
            element(
                "p",
                "A control counts as beaten by three seeds or more where the 95 % interval of the mean difference, "
                "paired by seed (Student's t), lies above 0; not where all seeds differ by the very same, as counts "
                "of images may by chance. Seeds are of students of one set: neither another draw of "
                "images nor another distillation is in the spread.",
                class_="soft",
            )
        )
    return parts


def _bytes(run: Opened, prefix: str) -> list[Html]:
    if run.kind == "comparison":
        return []
    for _, manifest in run.sets.values():
        budget = budget_of(manifest)
        entries = {role: held.entries for role, held in manifest.files.items()}
        real = manifest.dataset
        rows = [
            [part, f"{entries[part]:,}" if entries.get(part) else "-", f"{raw:,}", f"{budget.stored[part]:,}"]
            for part, raw in budget.raw.items()
        ] + [
            ["together", "-", f"{sum(budget.raw.values()):,}", f"{sum(budget.stored.values()):,}"],
            ["real training set", f"{real.images:,}", f"{real.raw_bytes:,}", f"{real.stored_bytes:,}"],
            ["share of it", "-", _percent(budget.raw_ratio), _percent(budget.stored_ratio)],
        ]
        kind = f"Labels are {manifest.label_kind}"
        if manifest.label_kind == "dynamic":
            kind += ", made by the teachers as they are needed: not among these bytes"
        caption = (
            f"Bytes of the set. Raw: pixels, compensators and label logits as arrays; stored: files. {kind}. By the "
            f"paper's convention (image count over image count, plus label bytes): {_percent(budget.paper_ratio)}."
        )
        own = [False, False, False, True, False, True]
        return [table(["part", "entries", "raw", "stored"], rows, caption, own, place=f"{prefix}bytes-table")]
    return []


def _pictures(run: Opened, figures: Mapping[str, Figure]) -> list[Html]:
    sheets = []
    for name, (folder, manifest) in run.sets.items():
        shown = _sheet(folder / "contact_sheet.png")
        if shown is None:
            continue
        of_classes = listed([str(each) for each in manifest.class_names[:10]])
        more = " (the first ten classes)" if len(manifest.class_names) > 10 else ""
        compensated = "; below them compensators, a row per teacher" if "compensators" in manifest.files else ""
        said = (
            f"Contact sheet of {manifest.method} on {manifest.dataset.name}: images, one class per row{more}, from top "
            f"to bottom {of_classes}{compensated}."
        )
        caption = f"{name if len(run.sets) > 1 else 'the set'}: one class per row{more}{compensated}"
        sheets.append(picture(shown[0], None, said, caption, shown[1]))
    parts: list[Html] = [element("div", *sheets, class_="tiles")] if sheets else []
    drawn = [picture(each.light, each.dark, each.said, each.caption, each.kind) for each in figures.values()]
    return parts + ([element("div", *drawn, class_="figures")] if drawn else [])


def _sheet(path: Path) -> tuple[bytes, str] | None:
    """Return a contact sheet and its format, smaller where it would make the page heavy; None where there is none."""
    if not path.is_file():
        return None
    content = read_bytes(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if len(content) <= SHEET_BYTES and image.format == "PNG":
                return content, "png"
            smaller, buffer = image.convert("RGB"), io.BytesIO()
            smaller.thumbnail((SHEET_SIDE, 2 * SHEET_SIDE), Image.Resampling.BOX)
            smaller.save(buffer, "JPEG", quality=88)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StillroomError(
            f"{path} is no picture ({error}). It was cut short or edited: delete it, and the report goes without it."
        ) from error
    return buffer.getvalue(), "jpeg"


def _curves(run: Opened) -> list[Html]:
    families: dict[str, list[Training]] = {}
    for training in trainings_of(run.events):
        families.setdefault(training.family, []).append(training)
    named = {family: _name_training(family, each, run) for family, each in families.items()}
    shown = {family: name for family, name in named.items() if name is not None}
    colours = colours_of([name.split(",")[0] for name in shown.values()])
    panels = []
    for family, name in list(shown.items())[:PANELS]:
        lines = [training.losses for training in families[family]]
        last = [100 * t.epochs[-1]["top1"] for t in families[family] if type(t.epochs[-1].get("top1")) is float]
        reached = _strip("", last, False).spelt if last else ""
        title = f"{name}" + (f": {reached} %" if reached else "")
        (first, begun), (final, ended) = lines[0][0], lines[0][-1]
        said = (
            f"Training loss of {name}, {len(lines)} of them: from {begun:.3g} in epoch {first:g} to {ended:.3g} in "
            f"epoch {final:g}{f'; top-1 at the end {reached} %' if reached else ''}."
        )
        panels.append(curve(title, lines, said, COLOURS.index(colours[name.split(",")[0]])))
    if not panels:
        return []
    left = len(families) - len(panels)
    more = f" {left} more trainings are in events.jsonl." if left > 0 else ""
    text = f"Training loss by epoch, a line per seed, and top-1 after the last; each panel has its own scale.{more}"
    return [element("p", text, class_="soft"), element("div", *panels, class_="tiles")]


def _name_training(family: str, trainings: Sequence[Training], run: Opened) -> str | None:
    """Return what was trained, "infer, static labels, 112 steps"; None: no row's own.

    Rows of older versions do not name the units of their students: these are known by labels, steps and what each seed
    reached, unless two rows are alike in that.
    """
    if not family.startswith("student-"):
        return family
    results = run.results or {}
    rows = [row for row in (*results.get("cells", ()), *results.get("rows", ())) if "error" not in row]
    found = [row for row in rows if row.get("unit") == family]
    if not found:
        reached = [round(100 * training.epochs[-1].get("top1", -1.0), 3) for training in trainings]
        within = f"{family}-"
        found = [
            row for row in rows
            if "unit" not in row and row["top1"] == reached and f"-{row['labels']}-" in within
            and f"-{row['steps']}-" in within
        ]  # fmt: skip
    names = {f"{row.get('method', row.get('set'))}, {row['labels']} labels, {row['steps']:,} steps" for row in found}
    if len(names) == 1:
        return names.pop()
    return None if run.kind == "comparison" else family


def _tables(run: Opened, prefix: str) -> list[Html]:
    if run.results is None:
        cells = [event for event in run.events if event["event"] == "cell"]
        return [_cell_table(cells, "Cells that are finished so far.", prefix)] if cells else []
    if run.kind == "run":
        seeds = count_seeds(len(run.results["seeds"]))
        teachers = ", ".join(f"{name} {top['top1']:.1f} %" for name, top in run.results["teachers"].items())
        caption = (
            f"Every cell, top-1 in %, mean ± standard deviation over {seeds}; protocol: "
            f"{run.results.get('protocol', '-')}; "
            f"teachers: {teachers or 'none'}."
        )
        return [_cell_table(run.results["cells"], caption, prefix)]
    if run.kind == "evaluation":
        found = run.results["evaluation"]
        both = zip(found["top1"], found["top5"], strict=True)
        rows = [[str(number), f"{100 * a:.2f}", f"{100 * b:.2f}"] for number, (a, b) in enumerate(both)]
        caption = f"Every student, in %; protocol: {run.results['protocol']}."
        return [table(["student", "top-1", "top-5"], rows, caption, place=f"{prefix}cells")]
    shown, parts = set(), [element("p", caption_of(run.results), class_="soft")]
    for number, (title, header, rows) in enumerate(parts_of(run.results)):
        parts.append(table(header, rows, title, place=f"{prefix}part{number}"))
        shown |= set(header)
    columns = [*FIRST, *(column for part in PARTS.values() for column in part)]
    legend = facts((column.name, column.what) for column in columns if column.name in shown)
    return [*parts, element("details", element("summary", "What the columns say"), legend)]


def _cell_table(cells: Sequence[dict[str, Any]], caption: str, prefix: str) -> Html:
    rows = [
        [
            f"{cell['set']}, {cell['labels']}", cell["budget"], f"{cell['steps']:,}", *(
                _strip("", cell[top], False).spelt for top in ("top1", "top5")
            ),
            f"{cell['label_bytes']:,}", f"{sum(cell['seconds']):.0f}",
        ]
        for cell in cells
    ]  # fmt: skip
    header = ["set, labels", "budget", "steps", "top-1", "top-5", "label bytes", "train s"]
    return table(header, rows, caption, [cell["budget"] == "own" for cell in cells], place=f"{prefix}cells")


def _loading(run: Opened) -> list[Html]:
    parts = []
    for name, (folder, manifest) in run.sets.items():
        text = "\n".join(spell_loading(manifest, f"load_distilled({str(folder)!r})", "load_distilled"))
        if len(run.sets) > 1:
            parts.append(element("details", element("summary", name), code(text, f"Python that loads {name}")))
        else:
            parts.append(code(text, "Python that loads the set"))
            where = shlex.quote(str(folder))
            shell = f"stillroom verify {where}    # every checksum\nstillroom inspect {where}   # what it holds"
            parts.append(code(shell, "commands that check the set"))
    return parts


def _configuration(run: Opened) -> list[Html]:
    settings = (run.results or {}).get("settings", run.settings)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return [element("details", element("summary", "All settings, as YAML"), code(text, "settings"))]


def _provenance(run: Opened) -> list[Html]:
    results = run.results or {}
    made_by = results.get("provenance", {})
    pairs: list[tuple[str, str]] = [("directory", element("code", str(run.directory)))]
    if "command" in made_by:
        pairs.append(("command", element("code", made_by["command"])))
    commit = made_by.get("commit")
    pairs.append(("commit", element("code", commit) if commit else "not known: an installed package, or not finished"))
    if "libraries" in made_by:
        pairs.append(("versions", ", ".join(f"{name} {version}" for name, version in made_by["libraries"].items())))
    if "plan" in made_by:
        pairs.append(("numerical plan", ", ".join(f"{name} {value}" for name, value in made_by["plan"].items())))
    if made_by.get("plan_differed"):
        told = [f"{each['field']} {each['now']} (begun with {each['stored']})" for each in made_by["plan_differed"]]
        pairs.append(("plan of some starts", ", ".join(told)))
    if "seeds" in results:
        pairs.append(("seeds of students", ", ".join(map(str, results["seeds"]))))
    manifests = [manifest for _, manifest in run.sets.values()]
    drawn = {f"{name} {seed}" for manifest in manifests for name, seed in manifest.seeds.items()}
    if drawn:
        pairs.append(("seeds of the sets", ", ".join(sorted(drawn))))
    teachers = {
        f"{t.name}: {t.show_accuracy(1)} on the real test split, weights {t.hash[:12] or 'not known'}": None
        for manifest in manifests for t in manifest.teachers
    }  # fmt: skip
    for name, top in results.get("teachers", {}).items():
        if not any(known.startswith(f"{name}:") for known in teachers):
            teachers[f"{name}: {top['top1']:.1f} % on the real test split"] = None
    pairs.append(("teachers", element("ul", *(element("li", text) for text in teachers)) if teachers else "none"))
    if manifests:
        pairs.append(("data", f"{manifests[0].dataset.name}, {manifests[0].dataset.images:,} training images"))
        if test := results.get("dataset", {}).get("test"):
            pairs.append(("measured on", f"{test:,} test images, of which one is {100 / test:.2g} points"))
        pairs.append(("its fingerprint", element("code", manifests[0].dataset.fingerprint)))
    if run.events:
        spent = sum(seconds_within(read_lines(file)) for file in event_files(run.directory))
        pairs.append(("time spent", f"{spent / 60:.1f} minutes" if spent < 7200 else f"{spent / 3600:.1f} hours"))
    return [facts(pairs)]


# -- several runs --------------------------------------------------------------------------------------------------


def _titles(runs: Sequence[Opened]) -> list[str]:
    """Return the runs' titles, those that would be the same told apart: by settings, if few differ, or by directory."""
    titles: list[str] = []
    for run in runs:
        with as_written(run.directory):
            titles.append(run.title)
    told = list(titles)
    for title in {title for title in titles if titles.count(title) > 1}:
        places = [place for place, own in enumerate(titles) if own == title]
        flat = [dict(_settings(runs[place].settings)) for place in places]
        known = dict.fromkeys(name for each in flat for name in each)
        names = [name for name in known if len({each.get(name) for each in flat}) > 1]
        parts = [", ".join(f"{name} {each.get(name, '-')}" for name in names) for each in flat]
        if len(names) > DIFFERING or len(set(parts)) < len(parts) or max(map(len, parts)) > LONGEST:
            parts = [str(runs[place].directory) for place in places]
        for place, part in zip(places, parts, strict=True):
            told[place] = f"{title}: {part}"
    return told


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield each setting in a nested dictionary: its name with dots, and its value as text."""
    if not isinstance(value, dict):
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return
    for key, each in value.items():
        yield from _settings(each, f"{name}.{key}" if name else str(key))


def _overview(runs: Sequence[Opened], titles: Sequence[str], scale: tuple[float, float]) -> Html:
    """Return what several runs say side by side: a small chart of each on one scale, and one table."""
    charts, rows = [], []
    for number, run in enumerate(runs):
        with as_written(run.directory):
            link = element("a", titles[number], href=f"#run{number}")
            drawn = [
                join(element("p", text, class_="soft"), strips(lines, *scale)) for text, lines in _panels(run).items()
            ] or [element("p", "no accuracies yet", class_="soft")]
            charts.append(element("div", element("h3", link), *drawn))
            for claim in claims_of(run.results) if run.results is not None else ():
                hardest = claim.hardest
                behind = "-" if hardest is None else spell_spread(hardest.mean, hardest.deviation, "+")
                which = "no control" if hardest is None else f"{hardest.verdict}: {hardest.control}"
                first = [str(run.directory), claim.method, f"{claim.ipc}", claim.labels, claim.student]
                rows.append([*first, f"{claim.steps:,}", spell_spread(claim.mean, claim.deviation), behind, which])
    header = ["run", "method", "ipc", "labels", "student", "steps", "top-1", "vs hardest control", "verdict"]
    caption = (
        "Every result beside the control that is hardest to beat. Runs may differ in data, students and steps: only "
        "what is of one run is matched."
    )
    parts = [element("p", f"Top-1 in %, all charts from {scale[0]:g} to {scale[1]:g}.", class_="soft")]
    parts.append(element("div", *charts, class_="wide"))
    if rows:
        parts.append(table(header, rows, caption, place="all-runs"))
    return section("Beside each other", "overview", *parts)


def _last_time(run: Opened) -> float:
    return max((float(event["time"]) for event in run.events), default=0.0)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g} %" if ratio < 1 else f"{100 * ratio:,.0f} %"
