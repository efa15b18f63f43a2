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

import functools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from stillroom.analysis.duplication import feature_duplication
from stillroom.compute import Plan
from stillroom.data import FACTS, RealData
from stillroom.distilled import DistilledSet, count_bytes, count_raw_bytes, load_distilled
from stillroom.errors import DamagedFileError, StillroomError
from stillroom.files import read_json, write_atomic, write_json
from stillroom.grid import (
    OWN_LABELS,
    Comparison,
    Entry,
    check_grid,
    doubt_grid,
    random_entry,
    raw_bytes,
    set_name,
    slug,
)
from stillroom.manifest import LabelKind, read_manifest
from stillroom.markup import to_csv
from stillroom.methods import METHODS
from stillroom.paper import PAPER
from stillroom.pipeline import (
    Cell,
    bind_plan,
    bound_settings,
    build_cells,
    describe_budget,
    distill_recipe,
    is_preset,
    labellers,
    open_stages,
    provenance,
    tell_doubts,
)
from stillroom.protocols import name_protocol
from stillroom.recipes import EXPECTED, RECIPES, Recipe
from stillroom.render import FORMATS, records_of
from stillroom.run import Run, Task
from stillroom.scores import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)
from stillroom.students import Evaluation, StudentConfig, evaluate, name_students
from stillroom.teachers import Teacher, load_teachers

# What a cell may fail of without losing the others: bad input, memory, a matrix that no routine decomposes, whatever a
# method has overlooked. What stops the run is none of these.
FAILURES = (
    ValueError, RuntimeError, MemoryError, OSError, TypeError, AttributeError, LookupError, ArithmeticError,
    AssertionError,
)  # fmt: skip


Rows = dict[tuple[int, int], dict[str, Any]]  # by the numbers of the entry and of its row among the entry's

ROW_KEYS = ("method", "asked", "ipc", "matched_ipc", "labels", "student")  # what a row is known by


@dataclass(frozen=True)
class Work:
    """What all cells of a comparison share, and whose turn it is among its sets and students."""

    comparison: Comparison
    real: RealData
    teachers: list[Teacher]
    plan: Plan
    run: Run
    references: dict[str, float | str]  # network -> its accuracy when trained on all real images, or why it has none
    student: StudentConfig
    recipe: Recipe  # of the set whose turn it is
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # what was trained, by name of cell and student

    @property
    def students(self) -> list[StudentConfig]:
        """The students of the grid, or the recipe's."""
        own = self.comparison.student
        return [replace(own, network=network) for network in self.comparison.grid.students] or [own]

    def train(self, cell: Cell, plain: bool = False) -> Evaluation:
        """Train the students of a cell, or read them back; `plain`: without augmentation and mixing."""
        student, name = self.student, cell.name
        if plain:
            bare = replace(
                student.train, crop_padding=0, flip=False, resized_crop=False, shuffle_patches=1, mixup_beta=0.0,
                cutmix_beta=0.0,
            )  # fmt: skip
            student, name = replace(student, train=bare), f"{name}-plain"
        teachers = labellers(self.recipe, self.teachers)
        result = evaluate(
            cell.distilled, self.real, student, self.comparison.seeds, self.plan, self.run, teachers=teachers,
            total_steps=cell.total_steps, cell=name,
        )  # fmt: skip
        facts: dict[str, Any] = {k: [round(100 * v, 3) for v in getattr(result, k)] for k in ("top1", "top5")}
        facts |= {"set": cell.set, "labels": cell.labels, "steps": cell.total_steps, "seconds": list(result.seconds)}
        self.done[f"{name}-{student.network}"] = facts
        return result


def compare(comparison: Comparison, run: Run, name: str = "custom") -> dict[str, Any]:
    """Carry out the grid in `run`'s directory and return its results, written there as JSON and tables too.

    Raises StillroomError with the list of all cells that cannot be, before any work; a cell that fails later is among
    the results, with its message.
    """
    if (directory := run.directory) is None:
        raise StillroomError("a comparison needs a run directory to keep its sets; give one with --out")
    entries: list[Entry] = []
    real, plan = open_stages(
        comparison, run, lambda real: entries.extend(check_grid(comparison, real)), shared_settings, tuple(METHODS)
    )
    tell_doubts(doubt_grid(entries, real), run)
    made_by = provenance(plan, run)
    note_own_labels(entries, run)
    needed = any(entry.needs_teachers for entry in entries)
    teachers = load_teachers(real, comparison.teachers, plan, run) if needed else []
    references = measure_references(comparison, real, teachers, plan, run)
    work = Work(comparison, real, teachers, plan, run, references, comparison.student, comparison)
    run.event("planned", rows=sum(len(rows_of(entry, work)) for entry in entries))
    results: dict[str, Any] = {
        "recipe": name,
        "dataset": {"name": real.name, "classes": real.classes, "train": len(real.train), "test": len(real.test)},
        "teachers": {t.name: {k: round(100 * v, 2) for k, v in t.accuracy.items()} for t in teachers},
        "seeds": list(comparison.seeds),
        "budget": comparison.grid.budget,
        "real": references,
        "protocol": "",
        "rows": [],
        "trainings": work.done,
        "provenance": made_by,
        "settings": asdict(comparison),
    }
    # Those of the run before stand in the table until they are made again.
    before = read_table(run)
    kept = read_rows(before, entries, work, made_by)
    made: Rows = {}
    units = run.made

    def fill(number: int) -> None:
        nonlocal units
        for place, row in compare_entry(entries[number], work):
            if (number, place) in made:  # of an entry that was put off, read back
                continue
            made[number, place] = row
            with run.alone("comparison.json"):
                table = read_table(run) if run.worker is not None else {}  # as others have it by now
                rows = merge_rows(kept, read_rows(table, entries, work, made_by, failed=True), made)
                results["rows"] = [rows[key] for key in sorted(rows)]
                results["protocol"] = ", ".join(sorted({r["protocol"] for r in results["rows"]} - {""}))
                note_label_gains(results["rows"])
                others = table.get("trainings", {}) if rows.keys() - made.keys() else {}  # of their rows
                write_tables(results | {"trainings": others | work.done}, directory)
            run.event("row", **row)
            if not run.show:  # where there are no bars, in a file say
                old = run.made == units and run.worker is None and "error" not in row
                print(say_row(row) + (" (kept)" if old else ""), file=sys.stderr, flush=True)
            units = run.made

    for _ in run.in_any_order([functools.partial(fill, number) for number in range(len(entries))]):
        pass
    note_left_out(before, results, run)
    return results


def note_own_labels(entries: Sequence[Entry], run: Run) -> None:
    """Tell of sets that came with soft labels which no row of the table is of."""
    judged = {entry.folder for entry in entries if entry.own_labels}
    for folder, name in {entry.folder: entry.name for entry in entries if entry.folder not in {None, *judged}}.items():
        assert folder is not None
        kind = read_manifest(folder).label_kind
        if kind in ("static", "replayed"):
            why = "only hard labels are compared" if kind == "static" else "they belong to batches of other students"
            run.notice(f"{name}: no row has the {kind} labels that it came with, since {why}")


def read_table(run: Run) -> dict[str, Any]:
    """Return the comparison.json that the directory holds; of none, or of a damaged one, which is written anew, {}."""
    assert run.directory is not None
    path = run.directory / "comparison.json"
    try:
        return read_json(path) if path.exists() else {}  # type: ignore[no-any-return]
    except DamagedFileError:
        return {}


def note_left_out(before: dict[str, Any], results: dict[str, Any], run: Run) -> None:
    """Tell what the table before this one had and this one has not, since this command does not ask for it."""
    parts = {"methods": "method", "ipc": "ipc", "labels": "labels", "students": "student"}
    had, has = ({p: {row[k] for row in r.get("rows", ())} for p, k in parts.items()} for r in (before, results))
    had["seeds"], has["seeds"] = set(before.get("seeds", ())), set(results["seeds"])
    left = [f"{part} {', '.join(map(str, sorted(had[part] - has[part])))}" for part in had if had[part] - has[part]]
    if left:
        run.notice(
            f"not in this table, but in the one before it: {'; '.join(left)}. A table has what its command names; all "
            "that was made is kept, so a command that names these too makes one table of all"
        )


def read_rows(
    table: dict[str, Any], entries: Sequence[Entry], work: Work, made_by: dict[str, Any], failed: bool = False
) -> Rows:
    """Return the rows that a table has of these entries, of the same seeds, and of failed ones only where asked to.

    made_by: what makes rows now; of another version they may have other keys.
    """
    stored = {"rows": [], "seeds": [], "provenance": {}} | table
    here = json.loads(json.dumps({k: made_by[k] for k in ("libraries", "plan")}))
    if stored["seeds"] != list(work.comparison.seeds) or any(stored["provenance"].get(k) != here[k] for k in here):
        return {}
    known = {tuple(row.get(k) for k in ROW_KEYS): row for row in stored["rows"] if failed or "error" not in row}
    keys = {
        (number, place): (entry.name, entry.text, entry.budget_ipc, entry.recipe.ipc, labels, student.network)
        for number, entry in enumerate(entries)
        for place, (student, labels) in enumerate(rows_of(entry, work))
    }
    return {key: known[names] for key, names in keys.items() if names in known}


def merge_rows(kept: Rows, others: Rows, made: Rows) -> Rows:
    """Return the rows of a table that several workers fill: none of them loses what another has written.

    kept: of the run before; others: as the table is now; made: by this worker. A failed row of its own gives way to
    another worker's that is none.
    """
    own = {k: row for k, row in made.items() if "error" not in row or "error" in others.get(k, row)}
    return kept | others | own


def rows_of(entry: Entry, work: Work) -> list[tuple[StudentConfig, LabelKind]]:
    """Return the student and the kind of label of each row of one distilled set, in their order."""
    return [(student, labels) for student in work.students for labels in entry.recipe.labels]


def say_row(row: dict[str, Any]) -> str:
    """Return one line for a cell that is finished."""
    reached = f"failed: {row['error']}" if "error" in row else f"{row['mean']:.1f} %"
    reached += "".join(f"; {what} failed: {error}" for what, error in row.get("failed", {}).items())
    return f"{row['method']}, ipc {row['ipc']}, {row['labels']}, {row['student']}: {reached}"


def note_label_gains(rows: list[dict[str, Any]]) -> None:
    """Add to each row by soft labels what it is ahead of the same set by hard labels, where that is among the rows."""

    def set_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return (row["method"].removesuffix(OWN_LABELS), row["matched_ipc"], row["student"])

    hard = {set_of(row): row["top1"] for row in rows if row["labels"] == "hard" and "error" not in row}
    for row in rows:
        base = hard.get(set_of(row))
        if base is not None and row["labels"] != "hard" and "error" not in row:
            row["over_hard"] = _paired(row["top1"], base)


def write_tables(results: dict[str, Any], directory: Path) -> None:
    """Write what there is of a comparison as JSON, Markdown, LaTeX and CSV."""
    write_json(directory / "comparison.json", results)
    for suffix, render in FORMATS.items():
        write_atomic(directory / f"table.{suffix}", render(results).encode())
    write_atomic(directory / "table.csv", to_csv(*records_of(results)).encode())


def shared_settings(settings: dict[str, Any], real: RealData) -> dict[str, Any]:
    """Return what binds the whole comparison: what its cells share. The grid, labels and seeds may grow."""
    kept = bound_settings(settings, real)
    always = {name: settings[name] for name in (*METHODS, "pool") if name in settings}  # whatever is compared as yet
    return {k: v for k, v in kept.items() if k not in ("method", "ipc", "labels", "grid")} | always


def measure_references(
    comparison: Comparison, real: RealData, teachers: list[Teacher], plan: Plan, run: Run
) -> dict[str, float | str]:
    """Return each student network's accuracy when trained on all real images with hard labels, as teachers are.

    Of networks that are among the teachers it is known; others are trained where the grid asks for it. One that cannot
    be trained so has a message instead, which its cells have for their scores.
    """
    given = {text.partition("=")[0] for text in comparison.teachers.checkpoints}
    trained = {t.name for t in teachers if comparison.teachers.source == "train" and t.name not in given}
    found: dict[str, float | str] = {}
    for name in comparison.grid.students or (comparison.student.network,):
        if not (comparison.grid.scores or comparison.grid.real or name in trained):
            continue
        config = replace(comparison.teachers, networks=(name,), checkpoints=(), source="train")
        try:
            found[name] = load_teachers(real, config, plan, run)[0].accuracy["top1"]
        except FAILURES as error:
            found[name] = f"{name} on all real images: {say(error)}"
    return found


def compare_entry(entry: Entry, work: Work) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of one distilled set, one for each student and kind of label, with their places among them."""
    asked = rows_of(entry, work)
    try:
        distilled, seconds = make_set(entry, work)
        random, failed = make_random(entry, work)
        duplication = measure_duplication(distilled, work)
    except FAILURES as error:
        yield from enumerate(_failed(entry, student, labels, error, work) for student, labels in asked)
        return

    def compare_labels(student: StudentConfig, labels: LabelKind) -> dict[str, Any]:
        # No random images have learned labels, to compare by.
        scored = work.comparison.grid.scores and labels not in ("hard", "learned") and not entry.own_labels
        recipe = replace(entry.recipe, student=student, labels=("hard", labels) if scored else (labels,))
        recipe = replace(recipe, controls=recipe.controls and not failed)
        own = replace(work, student=student, recipe=recipe)
        try:
            cells = build_cells(
                recipe, distilled, work.real, work.teachers, work.plan, work.run, slug(entry.name), random,
                entry.own_labels,
            )  # fmt: skip
            row = compare_cell(entry, distilled, labels, cells, own)
            row["random_set"] = None if random is None else set_name(random_entry(entry, work.comparison.distill_seed))
        except FAILURES as error:
            return _failed(entry, student, labels, error, work)
        row["seconds"]["distil"] = seconds
        row["duplication"] = duplication
        lost = row.pop("failed", {}) | failed
        if scored:
            try:
                row["scores"] = score_cell(labels, cells, own)
            except FAILURES as error:
                lost["scores"] = say(error)
        return row | ({"failed": lost} if lost else {})

    yield from work.run.in_any_order([functools.partial(compare_labels, *pair) for pair in asked])


def make_random(entry: Entry, work: Work) -> tuple[DistilledSet | None, dict[str, str]]:
    """Return the random control of an entry, or None, and why all of its controls are lost, if they are."""
    if not work.comparison.controls or entry.recipe.method == "random":
        return None, {}
    try:
        return make_set(random_entry(entry, work.comparison.distill_seed), work)[0], {}
    except FAILURES as error:
        return None, {"controls": say(error)}


def make_set(entry: Entry, work: Work) -> tuple[DistilledSet, float | None]:
    """Return an entry's distilled set, made or read back, and the seconds that it took, if known.

    It has the labels that its method learned, or those that it came with where the entry is of these, or none.
    """
    assert work.run.directory is not None
    if entry.folder is not None:
        ready = load_distilled(entry.folder)
        return ready if entry.own_labels else _unlabelled(ready), None
    recipe = replace(entry.recipe, labels=("hard",))  # others are units of the comparison
    with Run(work.run.directory / "sets" / set_name(entry), parent=work.run) as own:
        settings = bound_settings(asdict(recipe) | {"labels": (), "labelled_by": None}, work.real)
        plan = bind_plan(own, settings, work.plan)  # of before, where the set was begun by another command
        try:
            return _unlabelled(distill_recipe(recipe, own, work.real, work.teachers, plan)), own.seconds_spent()
        finally:
            work.plan.activate()


def _unlabelled(distilled: DistilledSet) -> DistilledSet:
    """Return a set without labels that others may have made: who labels is the comparison's to say."""
    kept = distilled.manifest.label_kind in ("hard", "learned")
    return distilled if kept else distilled.with_labels(None)


def compare_cell(entry: Entry, saved: DistilledSet, labels: LabelKind, cells: list[Cell], work: Work) -> dict[str, Any]:
    """Return the row of one set, kind of label and student: accuracy, differences to its controls, costs.

    A control that fails is marked, and takes nothing else of the row with it.
    """
    own = next(cell for cell in cells if not cell.budgets and cell.labels == labels)
    matched = [(c, budget) for c in cells for budget, kind in c.budgets if kind == labels]

    def train(cell: Cell) -> Evaluation | str:
        try:
            return work.train(cell)
        except FAILURES as error:
            if cell is own:
                raise
            return say(error)

    trainings = [own, *(control for control, _ in matched)]
    found = dict(work.run.in_any_order([functools.partial(train, cell) for cell in trainings]))
    result = found[0]
    assert isinstance(result, Evaluation)
    differences: dict[str, list[float | None]] = {}
    reached: dict[str, list[float | None]] = {}
    costs: dict[str, dict[str, int]] = {}
    failed: dict[str, str] = {}
    for number, (control, budget) in enumerate(matched, 1):
        name, other = f"{control.set} + {control.labels}, {budget}", found[number]
        if isinstance(other, str):
            failed[name] = other
        else:
            differences[name] = _paired(*([100 * v for v in one.top1] for one in (result, other)))
            reached[name] = [round(100 * other.mean, 3), round(100 * other.std, 3) if len(other.top1) > 1 else None]
            dynamic = other.label_bytes if labels == control.labels == "dynamic" else 0  # as if they were stored
            costs[name] = {"steps": other.steps, "bytes": count_raw_bytes(control.distilled) + dynamic}
    dynamic_bytes = result.label_bytes if labels == "dynamic" else 0
    by_bytes = work.comparison.grid.budget == "bytes"
    by = entry.recipe.labelled_by or work.comparison.teachers.networks
    if entry.own_labels:
        by = tuple(teacher.name for teacher in saved.manifest.teachers)
    return {
        "method": entry.name,
        "asked": entry.text,
        "base": saved.manifest.method,
        "fingerprint": saved.fingerprint,
        "set": None if entry.folder is not None else set_name(entry),
        **({} if entry.folder is None else {"folder": str(entry.folder)}),
        "ipc": entry.budget_ipc,
        "matched_ipc": entry.recipe.ipc,
        "labels": labels,
        "student": work.student.network,
        "unit": name_students(own.name, work.student.network),
        "steps": result.steps,
        "top1": [round(100 * v, 3) for v in result.top1],
        "mean": round(100 * result.mean, 3),
        "std": round(100 * result.std, 3) if len(result.top1) > 1 else None,
        "top5": [round(100 * v, 3) for v in result.top5],
        "controls": reached,
        "control_costs": costs,
        "differences": differences,
        **({"failed": failed} if failed else {}),
        "protocol": name_protocol(work.student, work.real.image_size, [labels], by),
        "holds": describe_content(own.distilled),
        "bytes": describe_labelled(own.distilled, saved, dynamic_bytes),
        **({"byte_budget": byte_budget(entry, labels, work)} if by_bytes else {}),
        "dynamic_label_bytes": dynamic_bytes,
        "seconds": {"train": round(statistics.mean(result.seconds), 1)},
        "paper": paper_number(entry, labels, work.student, work.real),
    }


def byte_budget(entry: Entry, labels: LabelKind, work: Work) -> int:
    """Return the bytes of the random images that a row's budget is counted in, with labels as the row's are."""
    return raw_bytes(random_entry(entry, work.comparison.distill_seed).recipe, work.real, labels)


def score_cell(labels: str, cells: list[Cell], work: Work) -> dict[str, float]:
    """Return the scores of one set, kind of label and student, with their raw parts (shares in [0, 1]).

    Replayed labels belong to augmented batches, so they have no augmentation-robust score.
    """
    own, hard = (next(c for c in cells if not c.budgets and c.labels == kind) for kind in (labels, "hard"))
    random = next(
        (c for c in cells if (c.set, c.labels) == ("random", labels) and ("equal steps", labels) in c.budgets), own
    )  # random images themselves are their own control
    real_hard = work.references[work.student.network]
    if isinstance(real_hard, str):
        raise StillroomError(real_hard)
    recovery = hard_label_recovery(real_hard, work.train(hard).mean)
    gain = improvement_over_random(work.train(own).mean, work.train(random).mean)
    scores = {"LRS": label_robust_score(gain, recovery), "HLR": recovery, "IOR": gain, "real_hard": real_hard}
    if labels != "replayed":
        plain = improvement_over_random(work.train(own, plain=True).mean, work.train(random, plain=True).mean)
        scores |= {"ARS": augmentation_robust_score(gain, plain), "IOR_plain": plain}
    return {name: round(value, 5) for name, value in scores.items()}


def measure_duplication(distilled: DistilledSet, work: Work) -> float | None:
    """Return `feature_duplication` by the first teacher, a unit of work; None without one that has such features."""
    if not work.teachers:
        return None
    teacher = work.teachers[0]
    unit = f"duplication-{distilled.fingerprint[:12]}-{teacher.hash[:12]}"

    def make() -> tuple[dict[str, Any], None]:
        try:
            value = feature_duplication(distilled, teacher, work.plan)
        except StillroomError as error:  # not that of a finished unit which is damaged: that is an error
            work.run.notice(f"feature duplication is not measured: {error}")
            value = None
        return {"duplication": value}, None

    [(made, _)] = work.run.carry_out([Task(unit, make)])
    return made["duplication"]  # type: ignore[no-any-return]


def describe_content(distilled: DistilledSet) -> dict[str, float]:
    """Return how many images, compensators and views a set holds, and images per class (its ipc is a budget)."""
    compensators = 0 if distilled.compensators is None else distilled.compensators.codes.shape[:2].numel()
    images, classes = len(distilled.images), len(distilled.manifest.class_names)
    return {
        "images": images,
        "images_per_class": round(images / classes, 2),
        "compensators": compensators,
        "views": distilled.view_count,
    }


def describe_labelled(distilled: DistilledSet, saved: DistilledSet, dynamic_bytes: int) -> dict[str, Any]:
    """Return bytes and ratios of `distilled`: `saved` with other labels. What is on disk is not encoded again.

    dynamic_bytes: of labels that are made as they are needed. The paper's ratio counts them, those by bytes do not.
    """
    files = {role: facts for role, facts in saved.manifest.files.items() if role != "labels"}
    distilled = replace(distilled, manifest=replace(distilled.manifest, files=files))
    budget = count_bytes(distilled)
    paper_ratio = budget.paper_ratio + dynamic_bytes / budget.real_stored_bytes
    return describe_budget(replace(budget, paper_ratio=paper_ratio))


def paper_number(entry: Entry, labels: str, student: StudentConfig, real: RealData) -> list[float] | None:
    """Return the published [mean, std] for the cell, where everything but the cell's own choices is the publication's.

    Of INFER's paper where the protocol is its own; else of the recipe that the cell is, whose deviation is not kept.
    Confessed: INFER's tables take the other methods' numbers from their papers, whose protocols are not INFER's, and do
    not say how its random images were trained.
    """
    method, recipe = entry.recipe.method, replace(entry.recipe, student=student)
    variant = variant_of(recipe)
    if entry.folder is not None:
        return None
    recipe = replace(recipe, infer=replace(recipe.infer, teachers=None), labelled_by=None)
    for dataset in FACTS:
        infer, own = (f"{kind}-{dataset}-ipc{entry.budget_ipc}" for kind in ("infer", method))
        known = own in RECIPES and getattr(RECIPES[own], method, None) == getattr(recipe, method, None)
        if infer in RECIPES and (known or method == "random"):
            network = RECIPES[infer].student.network
            protocol = replace(recipe, method="infer", student=replace(student, network=network))
            number = PAPER.get((dataset, entry.budget_ipc, variant, labels, student.network))
            if number and is_preset(infer, protocol, real):
                return list(number)
        if known and variant == method and is_preset(own, recipe, real) and labels in EXPECTED.get(own, {}):
            return [EXPECTED[own][labels], None]  # type: ignore[list-item]
    return None


def variant_of(recipe: Recipe) -> str:
    """Return a method's name, with the teachers of its compensators and labels where these are not all."""
    makers = recipe.infer.teachers if recipe.method == "infer" else None
    chosen = [
        f"{name}=[{','.join(names)}]" for name, names in (("teachers", makers), ("labelled_by", recipe.labelled_by))
        if names is not None
    ]  # fmt: skip
    return ":".join([recipe.method, *([",".join(chosen)] if chosen else [])])


def _paired(of: Sequence[float], control: Sequence[float]) -> list[float | None]:
    """Return mean and standard deviation of the differences of two lists in percent, seed by seed."""
    paired = [a - b for a, b in zip(of, control, strict=True)]
    return [round(statistics.mean(paired), 3), round(statistics.stdev(paired), 3) if len(paired) > 1 else None]


def say(error: BaseException) -> str:
    """Return an error in one line: those of libraries may have many."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def _failed(entry: Entry, student: StudentConfig, labels: str, error: BaseException, work: Work) -> dict[str, Any]:
    if work.plan.device.startswith("cuda"):
        torch.cuda.empty_cache()  # of what ran out of memory, so that the next cell has some
    return {
        "method": entry.name,
        "asked": entry.text,
        "set": None if entry.folder is not None else set_name(entry),
        **({} if entry.folder is None else {"folder": str(entry.folder)}),
        "ipc": entry.budget_ipc,
        "matched_ipc": entry.recipe.ipc,
        "labels": labels,
        "student": student.network,
        "protocol": "",
        "error": say(error),
    }
