"""What the command line prints: tables and the lines below them."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from stillroom.claims import spell_grain
from stillroom.distilled import count_bytes, load_distilled
from stillroom.estimate import Stage
from stillroom.recipes import EXPECTED, Recipe
from stillroom.render import FIRST, caption_of, failures_of, parts_of
from stillroom.students import Evaluation, StudentConfig

# Tables keep their columns where the output is a file or a narrow window; a terminal wraps the lines instead.
# Names of datasets and paths are shown as they are: brackets are not markup, nor :colons: pictures.
console = Console(width=max(shutil.get_terminal_size().columns, 120), markup=False, emoji=False)


def show_results(results: dict[str, Any]) -> None:
    """Print the run's table: the method, its controls, and where a control is not beaten."""
    data, paper = results["dataset"], results["paper"]
    title = f"{data['name']}, {results['ipc']} images per class, student {results['student']}"
    table = Table("set", "labels", "budget", "steps", "top-1", "top-5", "best", "paper", title=title)
    every_epochs = results["settings"]["student"]["measure_every_epochs"]
    method = {c["labels"]: c for c in results["cells"] if c["budget"] == "own"}
    for cell in results["cells"]:
        expected = paper.get(cell["labels"]) if cell["budget"] == "own" else None
        table.add_row(
            cell["set"], cell["labels"], cell["budget"], f"{cell['steps']:,}", _spread(cell["top1"]),
            _top5(_spread(cell["top5"]), data["classes"]), _best(cell["best"], every_epochs),
            "-" if expected is None else f"{expected:.1f}",
            style="bold" if cell["budget"] == "own" else None,
        )  # fmt: skip
    console.print(table)
    teachers = ", ".join(f"{name} {accuracy['top1']:.1f}" for name, accuracy in results["teachers"].items())
    print(f"teachers, top-1: {teachers or 'none'}; {len(results['seeds'])} seeds, last epoch, mean ± std")
    print(f"students by the protocol: {results['protocol']}")
    if grain := spell_grain(data["test"]):
        print(grain)
    for labels, own in method.items():
        ahead = [
            c for c in results["cells"]
            if c["budget"] != "own" and f"({labels})" in c["budget"] and c["mean"] >= own["mean"]
        ]  # fmt: skip
        for c in ahead:
            print(
                f"not beaten: {c['set']} with {c['labels']} labels, {c['budget']}, reaches "
                f"{c['mean']:.1f}, {own['set']} with {labels} labels {own['mean']:.1f}"
            )


def show_comparison(results: dict[str, Any]) -> None:
    """Print a comparison in parts: accuracy, controls, what sets hold and cost, scores; then what failed."""
    for title, header, rows in parts_of(results):
        first = len([column for column in FIRST if column.name in header])
        columns = [Column(name, no_wrap=place < first) for place, name in enumerate(header)]
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for said in failures_of(results):
        print(said)
    print(caption_of(results))
    if grain := spell_grain(results["dataset"]["test"]):
        print(grain)


def show_teachers(squeezed: dict[str, Any]) -> None:
    """Print how good the teachers of a dataset are, by what squeeze_recipe returned."""
    table = Table("teacher", "top-1", "top-5", "weights", title=f"Teachers of {squeezed['dataset']}")
    for teacher in squeezed["teachers"]:
        top1, top5 = (f"{100 * teacher['accuracy'][k]:.1f} %" for k in ("top1", "top5"))
        table.add_row(teacher["name"], top1, _top5(top5, squeezed["classes"]), teacher["hash"][:12])
    console.print(table)


def show_evaluation(dataset: str, classes: int, student: StudentConfig, result: Evaluation, protocol: str) -> None:
    """Print what students reached on a dataset, by its name and how many classes it has."""
    table = Table("student", "labels", "steps", "top-1", "top-5", "best top-1", "label bytes",
                  title=f"{dataset}, protocol: {protocol}")  # fmt: skip
    top1, top5, best = ([100 * v for v in values] for values in (result.top1, result.top5, result.best))
    table.add_row(
        result.network, result.labels, f"{result.steps:,}", _spread(top1), _top5(_spread(top5), classes),
        _best(best, student.measure_every_epochs), f"{result.label_bytes:,}",
    )  # fmt: skip
    console.print(table)


def show_budget(folder: Path) -> None:
    """Print what a distilled set holds and costs."""
    distilled = load_distilled(folder)
    manifest, budget = distilled.manifest, count_bytes(distilled)
    table = Table(
        "part", "entries", "raw", "stored", title=f"{manifest.method} of {manifest.dataset.name}, ipc {manifest.ipc}"
    )
    for role, facts in manifest.files.items():
        table.add_row(
            role, f"{facts.entries:,}" if facts.entries else "-", _bytes(facts.raw_bytes), _bytes(facts.bytes)
        )
    real = manifest.dataset
    table.add_row("real training set", f"{real.images:,}", _bytes(real.raw_bytes), _bytes(real.stored_bytes))
    console.print(table)
    print(
        f"compression: {100 * budget.raw_ratio:.2f} % by raw bytes, {100 * budget.stored_ratio:.2f} % by stored bytes, "
        f"{100 * budget.paper_ratio:.2f} % by the paper's convention"
    )
    names = manifest.class_names[:10]
    shown = map(repr, names) if any("," in name for name in names) else names  # 'tench, Tinca tinca' is one class
    print(f"classes: {', '.join(shown)}{', ...' if len(manifest.class_names) > 10 else ''}")
    if skipped := manifest.extra.get("skipped_images"):
        print(f"left out of the real images: {skipped} that could not be read")
    if manifest.teachers:
        print("teachers: " + ", ".join(f"{t.name} {t.show_accuracy(1)}" for t in manifest.teachers))
    if manifest.image_encoding == "float16":
        low, high = distilled.images[:].float().aminmax()
        print(f"pixels: float16, from {low:.2f} to {high:.2f} where 0 is black and 1 white")
    if manifest.learning_rate is not None:
        print(f"learned learning rate: {manifest.learning_rate:g}")
    kind: str = manifest.label_kind
    if manifest.pool is not None:
        batch = manifest.pool.batches.batch_size
        kind += f", {manifest.pool.epochs} epochs of batches of {batch}, as {manifest.pool.encoding}"
    print(f"labels: {kind}; views: {distilled.view_count:,}; picture: {folder / 'contact_sheet.png'}")


def show_estimate(title: str, stages: list[Stage], notes: list[str]) -> None:
    """Print the plan of a run: time, memory and bytes of every stage, and remarks."""
    table = Table("stage", "work", "time", "memory", "bytes kept", title=title)
    for stage in stages:
        table.add_row(stage.name, stage.work, _time(stage.seconds), _bytes(stage.memory), _bytes(stage.kept))
    table.add_row("together", "", _time(sum(s.seconds for s in stages)), "", _bytes(sum(s.kept for s in stages)))
    console.print(table)
    for note in notes:
        print(note)


def show_recipes(recipes: dict[str, Recipe]) -> None:
    """Print the presets and what the paper reaches by them."""
    name_column = Column("recipe", no_wrap=True)  # it is there to be copied
    table = Table(name_column, "data", "ipc", "teachers", "steps", "student", "epochs", "paper: static", "dynamic")
    for name, recipe in recipes.items():
        paper, steps = EXPECTED.get(name, {}), getattr(recipe.method_config, "steps", "-")
        table.add_row(
            name, recipe.data.source, str(recipe.ipc), str(len(recipe.teachers.networks)), str(steps),
            recipe.student.network, f"{recipe.student.train.epochs} | {recipe.student.dynamic_epochs}",
            *(f"{paper[k]:.1f}" if k in paper else "-" for k in ("static", "dynamic")),
        )  # fmt: skip
    console.print(table)


def show_cache(rows: list[tuple[Path, int, str]]) -> None:
    """Print what the teacher cache holds, as `list_cache` returns it."""
    table = Table("teacher", "size", "what")
    for entry, size, text in rows:
        table.add_row(entry.name, _bytes(size), text)
    table.add_row("together", _bytes(sum(size for _, size, _ in rows)), "")
    console.print(table)


def print_where(directory: Path) -> None:
    """Say where the results lie."""
    print(f"distilled set: {directory / 'distilled'}  (picture: {directory / 'distilled' / 'contact_sheet.png'})")
    events = directory / "events.jsonl"
    print(f"results: {directory / 'results.json'}, events: {events if events.exists() else directory / 'workers'}")


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)  # one seed has no spread
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def _top5(text: str, classes: int) -> str:
    # Five guesses among five classes or fewer are always right.
    return text if classes > 5 else "-"


def _best(values: list[float], measure_every_epochs: int) -> str:
    # Measured after training only, the best is the last by another name.
    return f"{max(values):.1f}" if measure_every_epochs else "-"


def _bytes(count: float) -> str:
    if not count:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
