"""Compare: methods x budgets x labels x students as one table, each cell beside its matched controls.

    results = compare(Comparison(grid=Grid(methods=("random", "infer"))), Run(Path("runs/compare")))

    run/
        sets/NAME/          the run of one distilled set: what `stillroom distill` would have made
        units/              labels and students, shared between cells: nothing is computed twice
        comparison.json     every cell and row; table.md, table.tex and table.csv hold the rows

Only what is missing is executed, so a grid can grow. A cell that cannot be is refused before any work; one that fails
is marked in the table and does not lose the others.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.compute import Plan
from stillroom.data import FACTS, RealData
from stillroom.distilled import DistilledSet, count_bytes
from stillroom.errors import StillroomError, check_choices, suggest
from stillroom.files import write_atomic, write_json
from stillroom.labels import LABEL_BYTES
from stillroom.manifest import LabelKind
from stillroom.methods import METHODS
from stillroom.networks import build_network, penultimate_features
from stillroom.paper import PAPER
from stillroom.pipeline import (
    Cell,
    bound_settings,
    build_cells,
    check_recipe,
    describe_budget,
    distill_recipe,
    is_preset,
    labellers,
    open_stages,
    provenance,
)
from stillroom.recipes import RECIPES, Recipe
from stillroom.render import FORMATS, to_csv
from stillroom.run import Run
from stillroom.scores import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)
from stillroom.settings import read_plain
from stillroom.students import Evaluation, StudentConfig, evaluate
from stillroom.teachers import Teacher, load_teachers
from stillroom.train import apply_normalization

FEATURE_BATCH = 256


@dataclass(frozen=True)
class Grid:
    """What is compared with what. LabelKind, seeds and everything else are the recipe's."""

    methods: tuple[str, ...] = ("random", "infer")  # METHOD, or METHOD:setting=value,... for one with other settings
    ipc: tuple[int, ...] = ()  # budgets in images per class; none: the recipe's
    students: tuple[str, ...] = ()  # networks; none: the recipe's
    budget: Literal["ipc", "bytes"] = "ipc"  # bytes: every method gets the bytes of so many real images and labels
    scores: bool = False  # label- and augmentation-robust scores: adds hard labels, and trainings without augmentation

    def __post_init__(self) -> None:
        check_choices(self, "grid")
        for name in ("methods", "ipc", "students"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise StillroomError(f"grid.{name} {' '.join(map(str, values))} has repeats; give each once")
        if not self.methods:
            raise StillroomError("grid.methods is empty; give at least one, such as random infer")
        if self.scores and self.budget == "bytes":
            raise StillroomError(
                "grid.scores compares hard with soft labels of one set; give --grid.budget ipc with it"
            )
        if any(ipc < 1 for ipc in self.ipc):
            raise StillroomError(f"grid.ipc is {self.ipc}; give budgets of 1 or more images per class")


@dataclass(frozen=True)
class Comparison(Recipe):
    """A recipe, of which the grid varies method, budget and student."""

    grid: Grid = field(default_factory=Grid)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid.scores and not self.controls:
            raise StillroomError("grid.scores are made of the random control; leave --no-controls out")


@dataclass(frozen=True)
class Entry:
    """One distilled set of the grid."""

    name: str  # of the method in the table
    budget_ipc: int  # the row's budget; the recipe's ipc differs from it where budgets are matched by bytes
    recipe: Recipe  # of this set and its labels


def comparison_of(recipe: Recipe, grid: Grid) -> Comparison:
    """Return `recipe` with a grid."""
    return Comparison(**{f.name: getattr(recipe, f.name) for f in fields(Recipe)}, grid=grid)


# -- the grid ------------------------------------------------------------------------------------------------------


def read_method(text: str, recipe: Recipe) -> Recipe:
    """Return `recipe` by another method: "METHOD", or "METHOD:setting=value,setting=[a,b]".

    Raises StillroomError for an unknown method or setting and for a value of another type.
    """
    method, _, rest = text.partition(":")
    if method not in METHODS:
        raise StillroomError(f"grid.methods: there is no method {method!r}.{suggest(method, METHODS)}")
    chosen = replace(recipe, method=method)  # type: ignore[arg-type]
    if text.endswith(":"):
        raise StillroomError(f"grid.methods: {text!r} ends where a setting=value should be; give {method!r}")
    given: dict[str, Any] = {}
    for part in filter(None, re.split(r",(?![^\[]*\])", rest)):
        name, equals, value = part.partition("=")
        if not equals:
            raise StillroomError(f"grid.methods: {text!r} has {part!r} where a setting=value should be")
        listed = value.startswith("[") and value.endswith("]")
        given[name.strip()] = [v.strip() for v in value[1:-1].split(",")] if listed else value.strip()
    if not given:
        return chosen
    if not hasattr(recipe, method):
        raise StillroomError(f"grid.methods: {method!r} has no settings, but {text!r} gives some")
    config = read_plain(given, chosen.method_config, f"grid.methods {text!r}")
    return replace(chosen, **{method: config})


def plan_entries(comparison: Comparison, real: RealData) -> tuple[list[Entry], list[str]]:
    """Return the distilled sets of the grid, and a sentence for each that cannot be."""
    base = Recipe(**{f.name: getattr(comparison, f.name) for f in fields(Recipe)})
    grid = comparison.grid
    entries: list[Entry] = []
    refused: list[str] = []
    if grid.scores and "hard" not in base.labels:
        base = replace(base, labels=("hard", *base.labels))
    for ipc in grid.ipc or (base.ipc,):
        for text in grid.methods:
            try:
                recipe = replace(read_method(text, base), ipc=ipc)
                matched: dict[int, list[LabelKind]] = {}
                for labels in base.labels:
                    count = ipc if grid.budget == "ipc" else match_bytes(recipe, real, labels)
                    matched.setdefault(count, []).append(labels)
                for count, kinds in matched.items():
                    own = replace(recipe, ipc=count, labels=tuple(kinds))
                    check_recipe(own, real)
                    for other in entries:
                        if other.name != text and other.recipe == own and other.budget_ipc == ipc:
                            raise StillroomError(f"it is the same as {other.name!r}; leave one of them out")
                    entries.append(Entry(text, ipc, own))
            except StillroomError as error:
                refused.append(f"{text}, ipc {ipc}: {error}")
    for network in grid.students:
        try:
            build_network(network, real.classes, real.image_size)
        except StillroomError as error:
            refused.append(f"student {network}: {error}")
    return entries, refused


def match_bytes(recipe: Recipe, real: RealData, labels: LabelKind) -> int:
    """Return the largest ipc of the recipe's method whose raw bytes stay within those of `recipe.ipc` random images.

    Counted are pixels, compensators and stored labels (static: a float16 row per view; hard and dynamic: none).
    Raises StillroomError where not even one image per class does.
    """
    budget = raw_bytes(replace(recipe, method="random"), real, labels)
    for ipc in range(recipe.ipc, 0, -1):
        try:
            if raw_bytes(replace(recipe, ipc=ipc), real, labels) <= budget:
                return ipc
        except StillroomError:  # too small for the method
            break
    raise StillroomError(
        f"{recipe.method} with {labels} labels has no set of at most {budget:,} bytes, those of {recipe.ipc} random "
        "images per class; raise --grid.ipc"
    )


def raw_bytes(recipe: Recipe, real: RealData, labels: LabelKind) -> int:
    """Return the raw bytes of a set of the recipe: pixels, compensators, and static labels."""
    content = METHODS[recipe.method].content(real, len(recipe.teachers.networks), recipe.ipc, recipe.method_config)
    pixels = 3 * real.image_size**2
    stored = content.views * real.classes * LABEL_BYTES if labels == "static" else 0
    return content.images * pixels + content.compensators * pixels * content.compensator_bits // 8 + stored


# -- execution -----------------------------------------------------------------------------------------------------


def compare(comparison: Comparison, run: Run, name: str = "custom") -> dict[str, Any]:
    """Carry out the grid in `run`'s directory and return its results, written there as JSON and tables too.

    Raises StillroomError with the list of all cells that cannot be, before any work; a cell that fails later is among
    the results, with its message.
    """
    if run.directory is None:
        raise StillroomError("a comparison needs a run directory to keep its sets; give one with --out")
    entries: list[Entry] = []

    def check(real: RealData) -> None:
        found, refused = plan_entries(comparison, real)
        if refused:
            raise StillroomError("these cells cannot be:\n  " + "\n  ".join(refused) + "\nleave them out of the grid")
        entries.extend(found)

    real, plan = open_stages(comparison, run, check, shared_settings)
    made_by = provenance(plan)
    teachers = load_teachers(real, comparison.teachers, plan, run)
    students = [replace(comparison.student, network=n) for n in comparison.grid.students] or [comparison.student]
    references = measure_references(comparison, students, real, plan, run)
    done: dict[str, dict[str, Any]] = {}  # what was trained, by name of cell and student
    rows: list[dict[str, Any]] = []
    for entry in entries:
        for row in compare_entry(entry, comparison, students, real, teachers, plan, run, done, references):
            rows.append(row)
            run.event("row", **row)
    results = {
        "recipe": name,
        "dataset": {"name": real.name, "classes": real.classes, "train": len(real.train), "test": len(real.test)},
        "teachers": {t.name: {k: round(100 * v, 2) for k, v in t.accuracy.items()} for t in teachers},
        "seeds": list(comparison.seeds),
        "budget": comparison.grid.budget,
        "rows": rows,
        "trainings": done,
        "provenance": made_by,
        "settings": asdict(comparison),
    }
    write_json(run.directory / "comparison.json", results)
    header, texts = table_of(results)
    for suffix, render in FORMATS.items():
        write_atomic(run.directory / f"table.{suffix}", render(header, texts).encode())
    write_atomic(run.directory / "table.csv", to_csv(*records_of(results)).encode())
    return results


def table_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a comparison's table as texts.

    Differences are those of the means, paired by seed, to random images (same labels) and to the method's own naturals.
    """
    scored, seeds = any("scores" in row for row in results["rows"]), len(results["seeds"])
    header = [
        "method", "ipc", "labels", "student", "steps", "top-1", "vs random, equal epochs", "vs random, equal steps",
        "vs naturals, equal steps", "images", "compensators", "labels, bytes", "ratio by bytes", "ratio as the paper",
        "distil s", "train s", "duplication", *(("LRS", "ARS", "HLR", "IOR") if scored else ()), "paper",
    ]  # fmt: skip
    rows = []
    for row in results["rows"]:
        ipc = str(row["ipc"]) if row["ipc"] == row["matched_ipc"] else f"{row['ipc']} (as bytes: {row['matched_ipc']})"
        first = [row["method"], ipc, row["labels"], row["student"]]
        if "error" in row:
            rows.append([*first, "failed: " + row["error"], *[""] * (len(header) - 5)])
            continue
        differences = [
            _spread(row["differences"].get(f"{control} + {row['labels']}, {budget}"), "+", seeds)
            for control, budget in (("random", "equal epochs"), ("random", "equal steps"), ("naturals", "equal steps"))
        ]
        size, scores = row["bytes"], row.get("scores", {})
        rows.append([
            *first, f"{row['steps']:,}", _spread([row["mean"], row["std"]], "", seeds), *differences,
            *(f"{size['raw'][part]:,}" for part in ("images", "compensators", "labels")),
            f"{100 * size['raw_ratio']:.2f} %", f"{100 * size['paper_ratio']:.2f} %", f"{row['seconds']['distil']:.0f}",
            f"{row['seconds']['train']:.0f}", "-" if row["duplication"] is None else f"{row['duplication']:.3f}",
            *((f"{scores[k]:.3f}" if k in scores else "-" for k in ("LRS", "ARS", "HLR", "IOR")) if scored else ()),
            _spread(row["paper"]),
        ])  # fmt: skip
    return header, rows


def records_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a comparison for machines: a plain number a column, empty where there is none.

    Nested keys are joined by dots; means and deviations stand apart; seeds' own accuracies are in comparison.json.
    """
    rows = [_flatten(row) for row in results["rows"]]
    header = list(dict.fromkeys(key for row in rows for key in row))
    return header, [[str(row.get(key, "")) for key in header] for row in rows]


def _flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and name not in ("top1", "top5"):
            flat |= {f"{name}.mean": value[0], f"{name}.std": value[1]}
        elif value is not None and name not in ("top1", "top5"):
            flat[name] = value
    return flat


def _spread(numbers: Sequence[float] | None, sign: str = "", seeds: int = 2) -> str:
    if numbers is None:
        return "-"
    mean = f"{round(numbers[0], 1) + 0.0:{sign}.1f}"  # no -0.0
    return f"{mean} ± {numbers[1]:.1f}" if seeds > 1 else mean


def shared_settings(settings: dict[str, Any], real: RealData) -> dict[str, Any]:
    """Return what binds the whole comparison: what its cells share. The grid, labels and seeds may grow."""
    kept = bound_settings(settings, real)
    always = {name: settings[name] for name in (*METHODS, "pool") if name in settings}  # whatever is compared as yet
    return {k: v for k, v in kept.items() if k not in ("method", "ipc", "labels", "grid")} | always


def measure_references(
    comparison: Comparison, students: Sequence[StudentConfig], real: RealData, plan: Plan, run: Run
) -> dict[str, float]:
    """Return each student network's accuracy when trained on all real images with hard labels, as teachers are."""
    if not comparison.grid.scores:
        return {}
    names = tuple(dict.fromkeys(student.network for student in students))
    config = replace(comparison.teachers, networks=names, checkpoints=(), source="train")
    return {t.name: t.accuracy["top1"] for t in load_teachers(real, config, plan, run)}


def compare_entry(
    entry: Entry,
    comparison: Comparison,
    students: Sequence[StudentConfig],
    real: RealData,
    teachers: list[Teacher],
    plan: Plan,
    run: Run,
    done: dict[str, dict[str, Any]],
    references: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one distilled set: one for each student and kind of label."""
    assert run.directory is not None
    keys = [(student, labels) for student in students for labels in entry.recipe.labels]
    try:
        distilled, seconds = make_set(entry, real, teachers, plan, run)
        random = None
        if comparison.controls and entry.recipe.method != "random":
            control = replace(entry.recipe, method="random", ipc=entry.budget_ipc)  # of equal bytes, where those count
            random, _ = make_set(Entry("random", entry.budget_ipc, control), real, teachers, plan, run)
        duplication = feature_duplication(distilled, teachers[0], plan) if teachers else None
    except StillroomError as error:
        yield from (_failed(entry, student, labels, error) for student, labels in keys)
        return
    for student in students:
        work = Work(comparison, student, real, teachers, plan, run, done)
        try:
            recipe = replace(entry.recipe, student=student)
            cells = build_cells(recipe, distilled, real, teachers, plan, run, slug(entry.name), random)
        except StillroomError as error:
            yield from (_failed(entry, student, labels, error) for labels in entry.recipe.labels)
            continue
        for labels in entry.recipe.labels:
            try:
                row = compare_cell(entry, distilled, labels, cells, work)
                if references and labels != "hard":
                    row["scores"] = score_cell(labels, cells, work, references[student.network])
            except StillroomError as error:
                yield _failed(entry, student, labels, error)
                continue
            row["seconds"]["distil"] = seconds
            yield row | {"duplication": duplication}


def make_set(entry: Entry, real: RealData, teachers: list[Teacher], plan: Plan, run: Run) -> tuple[DistilledSet, float]:
    """Return an entry's distilled set, made or read back, and the seconds that it took."""
    assert run.directory is not None
    with Run(run.directory / "sets" / set_name(entry), parent=run) as own:
        own.bind_config(bound_settings(asdict(entry.recipe) | {"labels": ()}, real), plan.as_dict())
        return distill_recipe(entry.recipe, own, real, teachers, plan), own.seconds_spent()


@dataclass(frozen=True)
class Work:
    """What the trainings of one kind of student share."""

    comparison: Comparison
    student: StudentConfig
    real: RealData
    teachers: list[Teacher]
    plan: Plan
    run: Run
    done: dict[str, dict[str, Any]]

    def train(self, cell: Cell, plain: bool = False) -> Evaluation:
        """Train the students of a cell, or read them back; `plain`: without augmentation and mixing."""
        student, name = self.student, cell.name
        if plain:
            bare = replace(
                student.train, crop_padding=0, flip=False, resized_crop=False, shuffle_patches=1, mixup_beta=0.0,
                cutmix_beta=0.0,
            )  # fmt: skip
            student, name = replace(student, train=bare), f"{name}-plain"
        seeds = self.comparison.seeds
        steps = cell.total_steps
        result = evaluate(
            cell.distilled,
            self.real,
            student,
            seeds,
            self.plan,
            self.run,
            teachers=labellers(self.comparison, self.teachers),
            total_steps=steps,
            cell=name,
        )
        facts = {k: [round(100 * v, 3) for v in getattr(result, k)] for k in ("top1", "top5")}
        self.done[f"{name}-{student.network}"] = facts | {"steps": steps, "seconds": list(result.seconds)}
        return result


def compare_cell(entry: Entry, saved: DistilledSet, labels: str, cells: list[Cell], work: Work) -> dict[str, Any]:
    """Return the row of one set, kind of label and student: accuracy, differences to its controls, costs."""
    own = next(cell for cell in cells if cell.budget == "own" and cell.labels == labels)
    result = work.train(own)
    differences = {}
    for control in cells:
        for budget in control.budget.split(", ") if control.budget != "own" else ():
            if budget.endswith(f"({labels})"):
                name = f"{control.set} + {control.labels}, {budget.partition(' (')[0]}"
                differences[name] = _difference(result, work.train(control))
    return {
        "method": entry.name,
        "ipc": entry.budget_ipc,
        "matched_ipc": entry.recipe.ipc,
        "labels": labels,
        "student": work.student.network,
        "steps": result.steps,
        "top1": [round(100 * v, 3) for v in result.top1],
        "mean": round(100 * result.mean, 3),
        "std": round(100 * result.std, 3),
        "top5": [round(100 * v, 3) for v in result.top5],
        "differences": differences,
        "bytes": describe_labelled(own.distilled, saved),
        "dynamic_label_bytes": result.label_bytes if labels == "dynamic" else 0,
        "seconds": {"train": round(statistics.mean(result.seconds), 1)},
        "paper": paper_number(entry, labels, work.student, work.real),
    }


def score_cell(labels: str, cells: list[Cell], work: Work, real_hard: float) -> dict[str, float]:
    """Return the scores of one set, kind of label and student, with their raw parts (shares in [0, 1]).

    Replayed labels belong to augmented batches, so they have no augmentation-robust score.
    """
    own, hard = (next(c for c in cells if c.budget == "own" and c.labels == kind) for kind in (labels, "hard"))
    random = next(
        (c for c in cells if (c.set, c.labels) == ("random", labels) and f"equal steps ({labels})" in c.budget), own
    )  # random images themselves are their own control
    recovery = hard_label_recovery(real_hard, work.train(hard).mean)
    gain = improvement_over_random(work.train(own).mean, work.train(random).mean)
    scores = {"LRS": label_robust_score(gain, recovery), "HLR": recovery, "IOR": gain, "real_hard": real_hard}
    if labels != "replayed":
        plain = improvement_over_random(work.train(own, plain=True).mean, work.train(random, plain=True).mean)
        scores |= {"ARS": augmentation_robust_score(gain, plain), "IOR_plain": plain}
    return {name: round(value, 5) for name, value in scores.items()}


def feature_duplication(distilled: DistilledSet, teacher: Teacher, plan: Plan) -> float:
    """Return the mean cosine similarity between two views of a class (Section 4.4), averaged over the classes.

    Of the penultimate features of `teacher`, the first of the recipe; the paper does not say of what.
    """
    normalization = distilled.manifest.normalization
    blocks = []
    for rows in torch.arange(distilled.view_count).split(FEATURE_BATCH):
        views = apply_normalization(distilled.form_views(rows).to(plan.device), normalization.mean, normalization.std)
        blocks.append(penultimate_features(teacher.model, views).cpu())
    features = torch.nn.functional.normalize(torch.cat(blocks))
    classes = distilled.labels[distilled.view_table()[:, 0]].cpu()
    values = [mean_similarity(features[classes == index]) for index in classes.unique()]
    return round(statistics.mean(values), 5)


def mean_similarity(features: Tensor) -> float:
    """Return the mean cosine over all pairs of rows [n, features] of length 1; 1 where there is a single row.

    The square of the rows' sum holds every pair twice, and each row with itself.
    """
    count = len(features)
    if count == 1:
        return 1.0
    return (float(features.double().sum(0).square().sum()) - count) / (count * (count - 1))


def describe_labelled(distilled: DistilledSet, saved: DistilledSet) -> dict[str, Any]:
    """Return bytes and ratios of `distilled`: `saved` with other labels. What is on disk is not encoded again."""
    if distilled.soft_labels is None:
        files = {role: facts for role, facts in saved.manifest.files.items() if role != "labels"}
        distilled = replace(distilled, manifest=replace(distilled.manifest, files=files))
    return describe_budget(count_bytes(distilled))


def paper_number(entry: Entry, labels: str, student: StudentConfig, real: RealData) -> list[float] | None:
    """Return the paper's [mean, std] for the cell, where everything but the cell's own choices is the paper's."""
    for dataset in FACTS:
        name = f"infer-{dataset}-ipc{entry.budget_ipc}"
        # The protocols of the other methods' rows are not known to be those of our recipes.
        if name in RECIPES and entry.name in ("infer", "random"):
            network = RECIPES[name].student.network
            protocol = replace(entry.recipe, method="infer", student=replace(student, network=network))
            number = PAPER.get((dataset, entry.budget_ipc, entry.recipe.method, labels, student.network))
            if number and is_preset(name, protocol, real):
                return list(number)
    return None


def slug(name: str) -> str:
    """Return a method's name in the table as part of a file name, another for every other name."""
    if re.fullmatch(r"[a-z0-9_]+", name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{re.sub(r'[^a-zA-Z0-9_.]+', '-', name)[:60]}-{digest}"


def set_name(entry: Entry) -> str:
    """Return the name of the folder of an entry's set."""
    return f"{slug(entry.name)}-ipc{entry.recipe.ipc}"


def _difference(of: Evaluation, control: Evaluation) -> list[float]:
    paired = [100 * (a - b) for a, b in zip(of.top1, control.top1, strict=True)]
    return [round(statistics.mean(paired), 3), round(statistics.stdev(paired), 3) if len(paired) > 1 else 0.0]


def _failed(entry: Entry, student: StudentConfig, labels: str, error: StillroomError) -> dict[str, Any]:
    return {
        "method": entry.name,
        "ipc": entry.budget_ipc,
        "matched_ipc": entry.recipe.ipc,
        "labels": labels,
        "student": student.network,
        "error": str(error),
    }
