"""A recipe from end to end: real data, teachers, distilled set, labels, students, and the controls beside them.

    results = run_recipe(find_recipe("digits"), Run(Path("runs/digits")))

Every stage is made of units that the run keeps; the same command after an interruption goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from stillroom.card import Budget
from stillroom.compute import Plan, resolve_plan
from stillroom.data import FACTS, RealData, load_real
from stillroom.distilled import DistilledSet, count_bytes, load_distilled
from stillroom.errors import StillroomError
from stillroom.events import read_events
from stillroom.files import sha256_bytes, write_json
from stillroom.images import name_some
from stillroom.labels import PoolConfig, attach_labels, count_label_bytes
from stillroom.logits import count_logit_bytes
from stillroom.manifest import library_versions
from stillroom.methods import METHODS
from stillroom.methods.select import Content
from stillroom.networks import build_network
from stillroom.protocols import name_protocol
from stillroom.recipes import EXPECTED, RECIPES, Recipe
from stillroom.run import Run, Task
from stillroom.students import Evaluation, evaluate, hash_labels, name_students, steps_for
from stillroom.teachers import Teacher, check_config, load_teachers

# A budget above or below these is doubted before the work begins. Random images of CIFAR-100 with static labels reached
# 18.8 % where students saw each class 250 times, 26.5 % for 500 times and 37.9 % for 1,800 (docs/log.md).
LARGEST_SHARE = 0.3  # of the real images' bytes, at the set's size
LEAST_SIGHTS = 300  # of a class by a student, in all its steps


@dataclass(frozen=True)
class Cell:
    """One row of a run's table: a set, a kind of label, and the budgets of optimiser steps that it answers for."""

    name: str  # of the trainings: the same name is the same training
    set: str  # infer, random, naturals
    labels: str
    # Of a control: equal epochs or equal steps, each with the method's kind of label whose budget it is; (): the method
    budgets: tuple[tuple[Literal["equal epochs", "equal steps"], str], ...]
    label: Callable[[], DistilledSet]  # makes the labels, or reads them back
    total_steps: int

    @property
    def distilled(self) -> DistilledSet:
        """The set with its labels, which are made when it is first asked for."""
        return self.label()

    @property
    def budget(self) -> str:
        """The budgets in words: "own", or "equal epochs (static), equal steps (dynamic)"."""
        return ", ".join(f"{budget} ({labels})" for budget, labels in self.budgets) or "own"


def open_stages(
    recipe: Recipe,
    run: Run,
    check: Callable[[RealData], None] | None = None,
    bind: Callable[[dict[str, Any], RealData], dict[str, Any]] | None = None,
    may_be_new: Collection[str] = (),
) -> tuple[RealData, Plan]:
    """Load the data and fix the numerical plan, refusing what cannot work before any work is spent.

    `check` and `bind` stand in for `check_recipe` and `bound_settings`, where there is more to a run than one recipe;
    `may_be_new` are sections that its configuration may grow by.
    """
    resolve_plan(recipe.compute)  # a device that is not there is refused before the data is read
    real = load_real(recipe.data)
    plan = resolve_plan(recipe.compute, run.notice, (real.classes, real.image_size))
    if real.skipped_images:
        count, which = len(real.skipped_images), name_some(real.skipped_images)
        run.notice(f"{count} images of {real.name!r} could not be read and were left out: {which}")
    check_recipe(recipe, real) if check is None else check(real)
    # Only now: a run directory must not be bound to settings that never worked.
    # Neither how it is computed nor how many students there are makes it another run.
    settings = (bind or bound_settings)(asdict(recipe), real)
    return real, bind_plan(run, settings, plan, may_be_new)


def bind_plan(run: Run, settings: dict[str, Any], plan: Plan, may_be_new: Collection[str] = ()) -> Plan:
    """Bind the run to `settings` and return the plan to work by, activated; see Run.bind_config.

    The user is told where it is not the one that the run began with, or not the one that is asked for now.
    """
    asked = plan.as_dict()
    bound = Plan(**run.bind_config(settings, asked, may_be_new))
    kept = [f"{key} {value!r} (not {asked[key]!r})" for key, value in bound.as_dict().items() if value != asked[key]]
    if kept:
        run.notice_once(f"going on with the numerical plan that the run began with: {', '.join(kept)}")
    bound.activate()
    return bound


def bound_settings(settings: dict[str, Any], real: RealData) -> dict[str, Any]:
    """Return what makes a run this run: the settings that decide its results, and the content of its data.

    How it is computed, how many students and controls there are, and where files lie can change between two starts;
    what was made with other weights of a teacher is refused by their hash.
    """
    unbound = {"compute", "seeds", "controls"} | (METHODS.keys() - {settings.get("method")})
    unbound |= set() if "replayed" in settings["labels"] else {"pool"}
    settings = {k: v for k, v in settings.items() if k not in unbound}
    places = {
        "data": ("source", "root", "download", "memory_limit_gib", "licence"),
        "teachers": ("cache", "checkpoints"),
    }
    for stage, where in places.items():
        settings[stage] = {k: v for k, v in settings[stage].items() if k not in where}
    return settings | {"data_fingerprint": real.fingerprint}


def check_recipe(recipe: Recipe, real: RealData, control_ipc: int | None = None) -> None:
    """Raise StillroomError for a recipe that this data cannot be distilled by, before any teacher is trained.

    `control_ipc`: of the random control, where that is not the recipe's.
    """
    budget = control_ipc or recipe.ipc
    check_config(recipe.teachers, real)
    if "replayed" in recipe.labels:
        count_logit_bytes(1, real.classes, recipe.pool.encoding)  # refuses an encoding that has too few classes
    build_network(recipe.student.network, real.classes, real.image_size)
    models = {name: build_network(name, real.classes, real.image_size) for name in recipe.teachers.networks}
    own = METHODS[recipe.method].check(real, models, recipe.ipc, recipe.method_config)
    if "learned" in recipe.labels and not learns_labels(recipe, real):
        raise StillroomError(
            f"labels has 'learned', but {recipe.method!r} learns none; give hard, static, replayed or dynamic"
        )
    content = METHODS[recipe.method].content(real, len(models), recipe.ipc, recipe.method_config)
    if content.image_bits != 8 and recipe.image_encoding != "auto":
        raise StillroomError(
            f"image_encoding is {recipe.image_encoding!r}, but {recipe.method!r} makes pixels of {content.image_bits} "
            "bits, which it would cut and round; leave it at 'auto'"
        )
    needed = max(own, budget) if recipe.controls else own  # the random control's
    counts = real.train.labels.bincount(minlength=real.classes)
    if int(counts.min()) < needed:
        index = int(counts.argmin())
        fixes = [f"lower --ipc{_largest_budget(recipe, real, models) if control_ipc is None else ''}"]
        fixes += ["leave the random control out by --no-controls"] if int(counts[index]) >= own else []
        raise StillroomError(
            f"class {real.class_names[index]!r} has {int(counts[index])} training images, but ipc {budget} "
            f"needs {needed} of each class, so that the rarest one limits all; {', or '.join(fixes)}, or add images to "
            "it or leave it out"
        )
    if budget * real.classes >= len(real.train):
        raise StillroomError(
            f"ipc {budget} for {real.classes} classes is a budget of {budget * real.classes} images, but "
            f"{real.name!r} has only {len(real.train)} training images; lower --ipc"
        )


def _largest_budget(recipe: Recipe, real: RealData, models: dict[str, nn.Module]) -> str:
    """Return " to N", the largest ipc below the recipe's that takes no more images than the rarest class has.

    " to N with --no-controls" where the random control would need more, "" where there is none.
    """
    fewest, method = int(real.train.labels.bincount(minlength=real.classes).min()), METHODS[recipe.method]
    for controls in (True, False) if recipe.controls else (False,):
        for ipc in range(min(recipe.ipc - 1, fewest if controls else recipe.ipc), 0, -1):
            try:
                own = method.check(real, models, ipc, recipe.method_config)
            except StillroomError:  # too small for the method
                break
            if own <= fewest:
                return f" to {ipc}" + (" with --no-controls" if recipe.controls and not controls else "")
    return ""


def doubt_budget(recipe: Recipe, real: RealData, last: Literal["set", "students"] = "students") -> list[str]:
    """Return why the recipe's budget may not be worth its work, a sentence each; `last`: the last stage to be done.

    What it doubts works, unlike what `check_recipe` refuses.
    """
    doubts, method = [], METHODS[recipe.method]
    content = method.content(real, len(recipe.teachers.networks), recipe.ipc, recipe.method_config)
    kept = content.images // real.classes
    if content.compensators and kept < 2:
        fewer = ", or name fewer --teachers.networks" if content.compensators > 1 else ""
        doubts.append(
            f"the budget is small: ipc {recipe.ipc} keeps {kept} image per class beside {content.compensators} "
            f"compensator{'s' * (content.compensators > 1)}, where random images keep {recipe.ipc}; raise --ipc{fewer}"
        )
    pixels, train = 3 * real.image_size**2, recipe.student.train
    labels = [count_label_bytes(k, content.views, real.classes, recipe.pool, train.batch_size) for k in recipe.labels]
    held = (content.images * content.image_bits + content.compensators * content.compensator_bits) * pixels // 8
    share = (held + max(labels, default=0)) / (len(real.train) * pixels)
    if share > LARGEST_SHARE:
        doubts.append(
            f"the set is not much smaller: it takes {share:.0%} of the bytes of {real.name!r} at {real.image_size} "
            "pixels; lower --ipc, or train on the real images"
        )
    sights = {kind: recipe.student.train_for(kind).epochs * content.views / real.classes for kind in recipe.labels}
    kind = min(sights, key=lambda kind: sights[kind])
    if last == "students" and sights[kind] < LEAST_SIGHTS:
        setting = "dynamic-epochs" if kind in ("dynamic", "replayed") else "train.epochs"
        doubts.append(
            f"the training is short: students with {kind} labels see each class {sights[kind]:.0f} times, and on "
            f"CIFAR-100 those of 250 reached half of what 1,800 gave; raise --student.{setting}"
        )
    return doubts


def tell_doubts(doubts: Sequence[str], run: Run) -> None:
    """Tell them once: who goes on with a run has read them."""
    if run.directory is None or not any((run.directory / "units").iterdir()):
        for doubt in doubts:
            run.notice(doubt)


def learns_labels(recipe: Recipe, real: RealData) -> bool:
    """Whether the recipe's method learns labels, by its content in METHODS."""
    content = METHODS[recipe.method].content
    return content(real, len(recipe.teachers.networks), recipe.ipc, recipe.method_config).learned_labels


def distill_recipe(recipe: Recipe, run: Run, real: RealData, teachers: list[Teacher], plan: Plan) -> DistilledSet:
    """Return the recipe's distilled set with labels as far as they can be stored, saved in the run's directory.

    A finished one is read back; where its folder was deleted it is made again of the run's units.
    """
    folder = None if run.directory is None else run.directory / "distilled"
    hashes = [teacher.hash for teacher in teachers]
    if folder is not None and (finished := run.finished("distilled")) is not None:
        made_by = finished[0].get("teachers", hashes)
        if made_by and hashes and made_by != hashes:  # random images with hard labels are nobody's
            raise StillroomError(
                f"{str(folder)!r} was made with other teachers' weights; give another directory with --out"
            )
        if folder.exists():
            return _read_back(folder, finished[0].get("files"))
    distill = METHODS[recipe.method].distill
    distilled = distill(real, teachers, recipe.ipc, recipe.method_config, recipe.distill_seed, plan, run)
    check_made(recipe, real, teachers, distilled)
    distilled = distilled.with_image_encoding(recipe.image_encoding)
    if distilled.manifest.label_kind != "learned":  # which stay with their set; the run keeps others beside them
        kind = next((k for k in recipe.labels if k == "static"), recipe.labels[0])
        unit, train = f"labels-{recipe.method}", recipe.student.train
        labelled_by = labellers(recipe, teachers)
        distilled = attach_labels(distilled, kind, labelled_by, plan, run, unit, recipe.pool, train)
    if folder is None:
        return distilled

    there = folder

    def save() -> tuple[dict[str, Any], None]:
        files = {role: facts.sha256 for role, facts in distilled.save(there).files.items()}
        return {"files": files, "teachers": hashes}, None

    run.carry_out([Task("distilled", save, lambda made: there.exists())])
    return load_distilled(there)  # students train on what is stored


def check_made(recipe: Recipe, real: RealData, teachers: list[Teacher], made: DistilledSet) -> None:
    """Raise StillroomError for a set that is not what its method says it makes, by which budgets are matched."""
    codes = None if made.compensators is None else made.compensators.codes
    compensators, bits = (0, 0) if codes is None else (codes.shape[0] * codes.shape[1], 8 * codes.element_size())
    learned = made.manifest.label_kind == "learned"
    held = Content(len(made.images), compensators, bits, made.view_count, 8 * made.images.element_size(), learned)
    said = METHODS[recipe.method].content(real, len(teachers), recipe.ipc, recipe.method_config)
    if made.manifest.method != recipe.method or held != said:
        raise StillroomError(
            f"the method {recipe.method!r} made a set of {made.manifest.method!r} that holds {held}, but by its "
            f"content in METHODS it holds {said}; mend the one or the other"
        )


def _read_back(folder: Path, files: dict[str, str] | None) -> DistilledSet:
    """Return the set of a run; raises StillroomError where it is damaged, or not the one that the run made."""
    remedy = f"delete the folder {str(folder)!r}: the same command makes it again"
    try:
        distilled = load_distilled(folder)
    except StillroomError as error:
        raise StillroomError(f"{error} Or {remedy}") from error
    found = {role: facts.sha256 for role, facts in distilled.manifest.files.items()}
    for role in ("images", "compensators", "labels"):
        if files is not None and files.get(role) != found.get(role):
            raise StillroomError(
                f"the {role} in {str(folder)!r} are not those that this run made, and its students were trained on; "
                f"put the set elsewhere and evaluate it there, or {remedy}"
            )
    return distilled


def labellers(recipe: Recipe, teachers: list[Teacher]) -> list[Teacher]:
    """Return those of `teachers` that label, in the recipe's order."""
    if recipe.labelled_by is None:
        return teachers
    return [teacher for name in recipe.labelled_by for teacher in teachers if teacher.name == name]


def squeeze_recipe(recipe: Recipe, run: Run) -> dict[str, Any]:
    """Train or load the recipe's teachers in `run`, nothing else, and return what there is to tell of them."""
    real, plan = open_stages(replace(recipe, controls=False), run)
    teachers = load_teachers(real, recipe.teachers, plan, run)
    return {"dataset": real.name, "classes": real.classes, "teachers": [teacher.facts() for teacher in teachers]}


def make_recipe_set(recipe: Recipe, run: Run) -> None:
    """Make the recipe's distilled set in `run`, and no students."""
    real, plan = open_stages(replace(recipe, controls=False), run)
    tell_doubts(doubt_budget(recipe, real, "set"), run)
    teachers = load_teachers(real, recipe.teachers, plan, run) if recipe.needs_teachers else []
    distill_recipe(recipe, run, real, teachers, plan)


def run_recipe(recipe: Recipe, run: Run, name: str = "custom") -> dict[str, Any]:
    """Carry out `recipe` in `run` and return its results, which are also written to results.json."""
    real, plan = open_stages(recipe, run)
    tell_doubts(doubt_budget(recipe, real), run)
    made_by = provenance(plan, run)  # now: the source may change while the run goes on
    teachers = load_teachers(real, recipe.teachers, plan, run) if recipe.needs_teachers else []
    distilled = distill_recipe(recipe, run, real, teachers, plan)
    cells = build_cells(recipe, distilled, real, teachers, plan, run)
    run.event("planned", students=len(cells) * len(recipe.seeds))

    def train(cell: Cell) -> Evaluation:
        return evaluate(
            cell.distilled,
            real,
            recipe.student,
            recipe.seeds,
            plan,
            run,
            teachers=labellers(recipe, teachers),
            total_steps=cell.total_steps,
            cell=cell.name,
        )

    rows: dict[int, dict[str, Any]] = {}
    for number, evaluation in run.in_any_order([functools.partial(train, cell) for cell in cells]):
        rows[number] = _row(cells[number], evaluation)
        run.event("cell", **rows[number])
    results = {
        "recipe": name,
        "dataset": {"name": real.name, "classes": real.classes, "train": len(real.train), "test": len(real.test)},
        "teachers": {t.name: {k: round(100 * v, 2) for k, v in t.accuracy.items()} for t in teachers},
        "ipc": recipe.ipc,
        "fingerprint": distilled.fingerprint,
        "labels_sha256": f.sha256 if (f := distilled.manifest.files.get("labels")) else None,
        "seeds": list(recipe.seeds),
        "student": recipe.student.network,
        "protocol": name_protocol(
            recipe.student, real.image_size, recipe.labels, recipe.labelled_by or recipe.teachers.networks
        ),
        "bytes": describe_budget(count_bytes(distilled)) if distilled.manifest.files else {},
        "cells": [rows[number] for number in range(len(cells))],
        "paper": EXPECTED.get(name, {}) if is_preset(name, recipe, real) else {},
        "provenance": made_by,
        "settings": asdict(recipe),
    }
    if run.directory is not None:
        write_json(run.directory / "results.json", results)
    return results


def is_preset(name: str, recipe: Recipe, real: RealData) -> bool:
    """Whether this is the work of the preset `name`, so that the paper's number may stand beside its own.

    The same settings and teachers, on the whole of a dataset that is the preset's by its classes, wherever it lies; how
    teachers are trained is not the paper's to say.
    """
    preset = RECIPES.get(name)
    if preset is None or preset.data.source not in FACTS:
        return False
    stages = ("method", "ipc", "method_config", "student", "image_encoding", "labelled_by")
    facts, cut = FACTS[preset.data.source], recipe.data.train_per_class is not None or recipe.data.holds_out
    return (
        all(getattr(preset, stage) == getattr(recipe, stage) for stage in stages)
        and all(
            getattr(preset.teachers, n) == getattr(recipe.teachers, n) for n in ("networks", "source", "equal_norms")
        )
        and (facts.classes, facts.image_size) == (real.classes, real.image_size)
        and facts.class_names in (None, real.class_names)
        and not cut
    )


def build_cells(
    recipe: Recipe,
    distilled: DistilledSet,
    real: RealData,
    teachers: list[Teacher],
    plan: Plan,
    run: Run,
    called: str | None = None,
    random: DistilledSet | None = None,
    own_labels: bool = False,
) -> list[Cell]:
    """Return the rows of the run's table: the set under each kind of label, and its controls.

    `called`: the method's name in the table, where that is not enough to tell it from others; `random`: the random
    control, where it is made already; `own_labels`: whether the set came with its labels, which nobody here made.
    Controls: random images with hard labels, random images with the same labels, and, for INFER, its naturals without
    compensators; at the epochs of the method and at its optimiser steps, since it has M + 1 times as many views. Nobody
    has learned labels but their own set, so beside these stand random images with hard labels alone.
    """
    method, labelled_by = called or recipe.method, labellers(recipe, teachers)
    # Sets that other teachers label too, in one table, are told apart.
    labels_by = "" if recipe.labelled_by is None else f"-by-{_short(' '.join(recipe.labelled_by))}"
    own_by = f"-own-{_short(hash_labels(distilled, []))}" if own_labels else ""
    sets: dict[str, DistilledSet] = {method: distilled}
    views = replace(distilled.manifest.views, naturals_as_views=True)  # controls are read like the method's set
    if recipe.controls:
        if distilled.compensators is not None:
            bare = distilled.with_labels(None)
            naturals = replace(bare, compensators=None, manifest=replace(bare.manifest, views=views))
            if not own_labels:
                sets["naturals"] = naturals
            elif distilled.soft_labels is not None and distilled.manifest.views.naturals_as_views:
                # By the same labels: its own of the naturals, which come first.
                sets["naturals"] = naturals.with_labels(distilled.soft_labels[: len(distilled.images)])
        if recipe.method != "random":
            if random is None:
                config = METHODS["random"].config()
                random = METHODS["random"].distill(real, teachers, recipe.ipc, config, recipe.distill_seed, plan, run)
                random = random.with_image_encoding(recipe.image_encoding)
            if random.manifest.views != views:
                bare = random.with_labels(None)
                random = replace(bare, manifest=replace(bare.manifest, views=views))
            sets["random"] = random

    @functools.cache
    def labelled(name: str, kind: str) -> DistilledSet:
        """Return a set with labels of this kind: its own, or else those that the run keeps."""
        if holds_labels(sets[name], kind, recipe.pool):
            return sets[name]
        unit = f"labels-{_unit(sets[name])}{labels_by}"
        train = recipe.student.train_for(kind)
        return attach_labels(sets[name], kind, labelled_by, plan, run, unit, recipe.pool, train)

    cells: list[Cell] = []
    for labels in recipe.labels:
        train = recipe.student.train_for(labels)
        own, steps = functools.partial(labelled, method, labels), steps_for(distilled, train)
        by = own_by or (labels_by if labels not in ("hard", "learned") else "")
        cells.append(Cell(f"{_unit(distilled)}-{labels}{by}-{steps}", method, labels, (), own, steps))
        controls = [("random", "hard"), ("random", labels), ("naturals", labels)]
        for name, kind in dict.fromkeys(controls):
            if name == method or name not in sets or kind == "learned":
                continue
            control = functools.partial(labelled, name, kind)
            by = own_by if name == "naturals" and own_by else labels_by if kind != "hard" else ""
            if own_by and kind == "replayed":  # by the set's pool, which may not be the table's
                by += f"-{recipe.pool.epochs}-{recipe.pool.encoding}-{recipe.pool.seed}"
            budgets: tuple[tuple[Literal["equal epochs", "equal steps"], int], ...] = (
                ("equal epochs", steps_for(sets[name], train)),
                ("equal steps", steps),
            )
            for budget, total in budgets:
                cell = f"{_unit(sets[name])}-{kind}{by}-{total}"
                same = next((i for i, c in enumerate(cells) if (c.name, c.set) == (cell, name) and c.budgets), None)
                if same is None:
                    cells.append(Cell(cell, name, kind, ((budget, labels),), control, total))
                else:  # one training that answers for both
                    cells[same] = replace(cells[same], budgets=(*cells[same].budgets, (budget, labels)))
    return cells


def _short(text: str) -> str:
    return sha256_bytes(text.encode())[:8]


def _unit(distilled: DistilledSet) -> str:
    """Return what a set's labels and students are kept as: the same for the same set, by whatever name.

    INFER's naturals are the control of one set and, without compensators, a set of their own.
    """
    return distilled.fingerprint[:12]


def holds_labels(distilled: DistilledSet, labels: str, pool: PoolConfig | None) -> bool:
    """Whether the set's own labels are of this kind and, where they are replayed, a pool such as is asked for."""
    stored = distilled.manifest.pool
    asked = stored is None or pool in (None, PoolConfig(stored.epochs, stored.encoding, stored.seed))
    return distilled.manifest.label_kind == labels and asked


def provenance(plan: Plan, run: Run | None = None) -> dict[str, Any]:
    """Return what made a result: the command, the commit where there is one, library versions and numerical plan.

    Of a `run` that went on by another plan than it began with, in some start, also by which.
    """
    program = Path(sys.argv[0]).name
    own = program in ("stillroom", "cli.py")
    return {
        "command": shlex.join(["stillroom", *sys.argv[1:]]) if own else program,
        "commit": source_commit(),
        "libraries": library_versions(),
        "plan": plan.as_dict(),
        **({"plan_differed": differed} if (differed := _plan_differences(run)) else {}),
    }


def _plan_differences(run: Run | None) -> list[dict[str, Any]]:
    """Return the fields of the plan that some start of the run had otherwise, each with what was stored and then."""
    events = [] if run is None or run.directory is None else read_events(run.directory)
    found = [{k: e.get(k) for k in ("field", "stored", "now")} for e in events if e["event"] == "plan_differs"]
    return [difference for number, difference in enumerate(found) if difference not in found[:number]]


def source_commit() -> str | None:
    """Return the commit of this source tree, "+changes" where files differ from it; None for an installed wheel."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--", "."],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        return None
    if tracked.returncode != 0:
        return None
    return commit + ("+changes" if changes else "")


def describe_budget(budget: Budget) -> dict[str, Any]:
    """Return a byte budget as plain numbers, its ratios among them."""
    ratios = {name: getattr(budget, name) for name in ("raw_ratio", "stored_ratio", "paper_ratio")}
    return dataclasses.asdict(budget) | {name: round(value, 6) for name, value in ratios.items()}


def _row(cell: Cell, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "set": cell.set,
        "labels": cell.labels,
        "budget": cell.budget,
        "unit": name_students(cell.name, evaluation.network),
        "steps": evaluation.steps,
        "top1": [round(100 * v, 3) for v in evaluation.top1],
        "mean": round(100 * evaluation.mean, 3),
        "std": round(100 * evaluation.std, 3),
        "top5": [round(100 * v, 3) for v in evaluation.top5],
        "best": [round(100 * v, 3) for v in evaluation.best],
        "seconds": list(evaluation.seconds),
        "label_bytes": evaluation.label_bytes,
    }
