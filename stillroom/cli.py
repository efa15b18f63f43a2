"""The command line: every stage by name, typed settings, plans before work, tables after it.

    stillroom demo                             digits, end to end, in about two minutes
    stillroom run RECIPE [settings]            teachers, distilled set, students, controls, table
    stillroom squeeze | distill RECIPE         the same, stopped after the teachers | the distilled set
    stillroom evaluate DIR --data.source ...   students on a distilled set
    stillroom inspect | verify DIR             what a distilled set holds | whether it is whole
    stillroom recipes | clean                  what there is to run | what the teacher cache holds

Exit codes: 0 done; 1 could not be done (the message says why); 2 wrong usage; 3 stopped by --time-limit or a signal,
with everything saved: the same command goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
import yaml
from rich.console import Console
from rich.table import Column, Table

from stillroom import __version__
from stillroom.compute import ComputeConfig, resolve_plan
from stillroom.data import DataConfig, load_real
from stillroom.distilled import count_bytes, load_distilled, verify_distilled
from stillroom.errors import StillroomError, TimeLimitReached, suggest
from stillroom.estimate import estimate_recipe
from stillroom.evaluate import StudentConfig, check_matches, evaluate
from stillroom.files import write_json
from stillroom.pipeline import bound_settings, distill_recipe, open_stages, provenance, relabel, run_recipe
from stillroom.recipes import EXPECTED, RECIPES, Recipe, find_recipe
from stillroom.run import Run
from stillroom.teachers import TeachersConfig, empty_cache, list_cache, load_teachers

OK, FAILED, USAGE, STOPPED = 0, 1, 2, 3

# Tables keep their columns where the output is a file or a narrow window; a terminal wraps the lines instead.
console = Console(width=max(shutil.get_terminal_size().columns, 120))


@dataclass(frozen=True)
class RecipeCommand:
    """Carry out a recipe, or its first stages; any of its settings can be changed."""

    recipe: tyro.conf.Positional[str] = "small"  # a name that `stillroom recipes` lists
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    out: Path | None = None  # run directory; runs/RECIPE if not given
    config: Path | None = None  # YAML file with settings, as --print-config writes it; flags override it
    time_limit: str | None = None  # stop cleanly after this time (90s, 9m, 2h); the same command goes on
    dry_run: bool = False  # print the plan with an estimate of time, memory and bytes, and stop
    print_config: bool = False  # print the resolved settings as YAML and stop


@dataclass(frozen=True)
class EvaluateCommand:
    """Train students on a distilled set and measure them on the real test split."""

    distilled: tyro.conf.Positional[Path]  # the set's directory
    data: DataConfig = field(default_factory=DataConfig)  # the real data that the set was made of
    student: StudentConfig = field(default_factory=StudentConfig)
    labels: Literal["stored", "hard", "static", "dynamic"] = "stored"  # static and dynamic need the teachers
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    out: Path | None = None  # run directory; the students are not kept if not given
    config: Path | None = None  # YAML file with settings; flags override it
    time_limit: str | None = None  # stop cleanly after this time (90s, 9m, 2h)
    print_config: bool = False  # print the resolved settings as YAML and stop


@dataclass(frozen=True)
class DirectoryCommand:
    """A distilled set's directory, or that of the run that made it."""

    directory: tyro.conf.Positional[Path]


@dataclass(frozen=True)
class DemoCommand:
    """Distil scikit-learn's digits by INFER, train students on the result, and compare with random images."""

    out: Path = Path("runs/demo")  # run directory
    time_limit: str | None = None  # stop cleanly after this time (90s, 9m, 2h)


@dataclass(frozen=True)
class RecipesCommand:
    """Show the recipes that there are, and the accuracy that each should reach."""


@dataclass(frozen=True)
class CleanCommand:
    """Show the cached teachers; with --yes, delete them."""

    yes: bool = False  # delete
    cache: str = TeachersConfig().cache


class UsageError(Exception):
    """Words in an order that cannot be understood."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return OK if words else USAGE
    if words[0] in ("-V", "--version"):
        print(f"stillroom {__version__}")
        return OK
    name, *rest = words
    try:
        if name not in COMMANDS:
            print(f"stillroom: there is no command {name!r}.{suggest(name, COMMANDS)}", file=sys.stderr)
            return USAGE
        return COMMANDS[name](rest)
    except UsageError as error:
        print(f"stillroom: {error}", file=sys.stderr)
        return USAGE
    except StillroomError as error:
        print(f"stillroom: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
        return OK
    except OSError as error:
        print(f"stillroom: {error}; finished units are kept, the same command goes on", file=sys.stderr)
        return FAILED
    except torch.OutOfMemoryError as error:
        print(
            f"stillroom: out of memory ({str(error).splitlines()[0]}); lower "
            "--compute.pack-slots or the batch size, with a new --out",
            file=sys.stderr,
        )
        return FAILED
    except TimeLimitReached as stop:
        print(
            f"stillroom: stopped ({stop}); what a run directory keeps is saved, the same command goes on",
            file=sys.stderr,
        )
        return STOPPED
    except KeyboardInterrupt:
        print(
            "stillroom: interrupted; the finished units of a run directory are kept, the same command goes on",
            file=sys.stderr,
        )
        return STOPPED


# -- commands ------------------------------------------------------------------------------------------------------


def run_command(words: list[str]) -> int:
    """stillroom run: everything."""
    command = parse_recipe("run", words)
    if command is None:
        return OK
    with _open_run(command) as run:
        results = run_recipe(command.settings, run, command.recipe)
    show_results(results)
    print_where(_directory(command))
    return OK


def squeeze_command(words: list[str]) -> int:
    """stillroom squeeze: the teachers."""
    command = parse_recipe("squeeze", words)
    if command is None:
        return OK
    with _open_run(command) as run:
        real, plan = open_stages(dataclasses.replace(command.settings, controls=False), run)
        teachers = load_teachers(real, command.settings.teachers, plan, run)
    table = Table("teacher", "top-1", "top-5", "weights", title=f"Teachers of {real.name}")
    for teacher in teachers:
        top1, top5 = (f"{100 * teacher.accuracy[k]:.1f} %" for k in ("top1", "top5"))
        table.add_row(teacher.name, top1, top5, teacher.hash[:12])
    console.print(table)
    return OK


def distill_command(words: list[str]) -> int:
    """stillroom distill: teachers and the distilled set."""
    command = parse_recipe("distill", words)
    if command is None:
        return OK
    with _open_run(command) as run:
        real, plan = open_stages(dataclasses.replace(command.settings, controls=False), run)
        teachers = load_teachers(real, command.settings.teachers, plan, run)
        distill_recipe(command.settings, run, real, teachers, plan)
    show_budget(_directory(command) / "distilled")
    return OK


def evaluate_command(words: list[str]) -> int:
    """stillroom evaluate: students on a set that exists."""
    default = None
    if words and not words[0].startswith("-"):  # the set knows the name of its dataset; a path must be given again
        manifest = load_distilled(_set_directory(Path(words[0]))).manifest
        facts = manifest.dataset
        data = DataConfig(source=facts.name, image_size=manifest.image_size[0], resize=facts.resize)
        default = EvaluateCommand(Path(words[0]), data)
        if manifest.teachers:
            networks = tuple(teacher.name for teacher in manifest.teachers)
            default = dataclasses.replace(default, teachers=TeachersConfig(networks=networks))
    command = _parse(EvaluateCommand, "evaluate", words, default)
    if default is None:
        raise UsageError(f"name the set's directory first: stillroom evaluate {command.distilled} ...")
    if command.time_limit is not None and command.out is None:
        raise UsageError("--time-limit saves what is done, which needs a run directory: give --out too")
    if command.print_config:
        print(to_yaml(command, ("distilled", "out", "config", "time_limit", "print_config")))
        return OK
    distilled = load_distilled(_set_directory(command.distilled))
    with Run(command.out, time_limit=parse_duration(command.time_limit)) as run, run.stop_on_signals():
        plan = resolve_plan(command.compute, run.notice)
        real = load_real(command.data)
        check_matches(distilled, real)
        kept = {k: v for k, v in asdict(command).items() if k in ("data", "student", "labels", "teachers")}
        settings = bound_settings(kept, real)
        settings["distilled"] = {role: facts.sha256 for role, facts in distilled.manifest.files.items()}
        plan = type(plan)(**run.bind_config(settings, plan.as_dict()))
        plan.activate()
        kind = distilled.manifest.label_kind if command.labels == "stored" else command.labels
        needs_teachers = kind == "dynamic" or (kind == "static" and distilled.soft_labels is None)
        teachers = load_teachers(real, command.teachers, plan, run) if needs_teachers else []
        if {teacher.hash for teacher in teachers} - {teacher.hash for teacher in distilled.manifest.teachers}:
            run.notice("these teachers are not the ones that the set was made with: their weights differ")
        distilled = relabel(distilled, kind, teachers, plan, run)
        result = evaluate(distilled, real, command.student, command.seeds, plan, run, teachers=teachers)
        if command.out is not None:
            write_json(command.out / "results.json", {"evaluation": asdict(result), "provenance": provenance(plan)})
    table = Table("student", "labels", "steps", "top-1", "top-5", "best top-1", "label bytes", title=real.name)
    table.add_row(
        result.network, result.labels, f"{result.steps:,}", _spread([100 * v for v in result.top1]),
        _spread([100 * v for v in result.top5]), f"{100 * max(result.best):.1f}", f"{result.label_bytes:,}",
    )  # fmt: skip
    console.print(table)
    return OK


def inspect_command(words: list[str]) -> int:
    """stillroom inspect: the budget and where the picture is."""
    command = _parse(DirectoryCommand, "inspect", words)
    show_budget(_set_directory(command.directory))
    return OK


def verify_command(words: list[str]) -> int:
    """stillroom verify: every file against its checksum."""
    command = _parse(DirectoryCommand, "verify", words)
    folder = _set_directory(command.directory)
    problems = verify_distilled(folder)
    for problem in problems:
        print(f"stillroom: {problem}", file=sys.stderr)
    if not problems:
        print(f"{folder}: whole, every checksum agrees")
    return FAILED if problems else OK


def recipes_command(words: list[str]) -> int:
    """stillroom recipes: the presets and what they should reach."""
    _parse(RecipesCommand, "recipes", words)
    name_column = Column("recipe", no_wrap=True)  # it is there to be copied
    table = Table(name_column, "data", "ipc", "teachers", "steps", "student", "epochs", "paper: static", "dynamic")
    for name, recipe in RECIPES.items():
        paper = EXPECTED.get(name, {})
        table.add_row(
            name, recipe.data.source, str(recipe.ipc), str(len(recipe.teachers.networks)), str(recipe.infer.steps),
            recipe.student.network, f"{recipe.student.train.epochs} | {recipe.student.dynamic_epochs}",
            *(f"{paper[k]:.1f}" if k in paper else "-" for k in ("static", "dynamic")),
        )  # fmt: skip
    console.print(table)
    return OK


def clean_command(words: list[str]) -> int:
    """stillroom clean: what the teacher cache holds; --yes empties it."""
    command = _parse(CleanCommand, "clean", words)
    rows = list_cache(command.cache)
    table = Table("teacher", "size", "what")
    for entry, size, text in rows:
        table.add_row(entry.name, _bytes(size), text)
    table.add_row("together", _bytes(sum(size for _, size, _ in rows)), "")
    console.print(table)
    if command.yes:
        empty_cache(command.cache)
        print(f"deleted {len(rows)} teachers")
    elif rows:
        print("nothing was deleted; add --yes to delete them")
    return OK


def demo_command(words: list[str]) -> int:
    """stillroom demo: digits, end to end."""
    command = _parse(DemoCommand, "demo", words)
    with Run(command.out, time_limit=parse_duration(command.time_limit)) as run, run.stop_on_signals():
        results = run_recipe(find_recipe("digits"), run, "digits")
    show_results(results)
    print_where(command.out)
    return OK


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo_command,
    "run": run_command,
    "squeeze": squeeze_command,
    "distill": distill_command,
    "evaluate": evaluate_command,
    "inspect": inspect_command,
    "verify": verify_command,
    "recipes": recipes_command,
    "clean": clean_command,
}


# -- settings ------------------------------------------------------------------------------------------------------


def parse_recipe(name: str, words: list[str]) -> RecipeCommand | None:
    """Return the command with its settings resolved: recipe, then YAML file, then flags.

    None where --print-config or --dry-run has said all there is to say. Raises StillroomError for an unknown recipe.
    """
    recipe = next((word for word in words[:1] if not word.startswith("-")), "small")
    default = RecipeCommand(recipe, find_recipe(recipe))
    command = _parse(RecipeCommand, name, words, default)
    if command.recipe != recipe:
        raise UsageError(f"name the recipe first: stillroom {name} {command.recipe} ...")
    if command.print_config:
        print(to_yaml(command.settings))
        return None
    if command.dry_run:
        show_estimate(command)
        return None
    return command


def _parse(kind: type[Any], name: str, words: list[str], default: Any = None) -> Any:
    """Parse `words` by the dataclass `kind`; a YAML file named by --config is read as flags that stand before them."""
    file = None
    for index, word in enumerate(words):
        if word == "--config" and index + 1 < len(words):
            file = Path(words[index + 1])
        elif word.startswith("--config="):
            file = Path(word.partition("=")[2])
    positional = words[:1] if words and not words[0].startswith("-") else []
    if file is not None:
        words = positional + yaml_to_flags(file) + words[len(positional) :]
    options = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=f"stillroom {name}", args=words, **options)


def yaml_to_flags(path: Path) -> list[str]:
    """Return a YAML file of nested settings as command-line flags, so that both obey the same types and checks."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StillroomError(f"--config {str(path)!r} cannot be read as YAML: {error}") from error
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise StillroomError(
            f"--config {str(path)!r} holds {type(settings).__name__}, not settings; see --print-config"
        )
    return list(_flags(settings, ""))


def _flags(settings: dict[Any, Any], prefix: str) -> Iterator[str]:
    for key, value in settings.items():
        flag = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, f"{flag}.")
        elif isinstance(value, bool):
            group, dot, leaf = flag.rpartition(".")
            yield f"--{flag}" if value else f"--{group}{dot}no-{leaf}"
        elif isinstance(value, list):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield from (f"--{flag}", str(value))


def to_yaml(settings: Any, without: tuple[str, ...] = ()) -> str:
    """Return a dataclass of settings as YAML that --config reads back."""
    plain = json.loads(json.dumps(asdict(settings), default=str))
    return yaml.safe_dump({k: v for k, v in plain.items() if k not in without}, sort_keys=False).rstrip()


def parse_duration(text: str | None) -> float | None:
    """Return seconds: "90", "90s", "9m", "1.5h" or "1h30m". Raises StillroomError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip())
    try:
        if match is None or not any(match.groups()):
            raise ValueError
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
    except ValueError:
        raise StillroomError(f"--time-limit is {text!r}; give a time such as 90s, 9m, 1.5h or 1h30m") from None
    return 3600 * hours + 60 * minutes + seconds


def _directory(command: RecipeCommand) -> Path:
    return command.out or Path("runs") / command.recipe


@contextlib.contextmanager
def _open_run(command: RecipeCommand) -> Iterator[Run]:
    with Run(_directory(command), time_limit=parse_duration(command.time_limit)) as run, run.stop_on_signals():
        yield run


def _set_directory(path: Path) -> Path:
    """Return the distilled set's own folder, whether that or its run's directory was given."""
    return path / "distilled" if (path / "distilled" / "manifest.json").exists() else path


# -- tables --------------------------------------------------------------------------------------------------------


def show_results(results: dict[str, Any]) -> None:
    """Print the run's table: the method, its controls, and where a control is not beaten."""
    data, paper = results["dataset"], results["paper"]
    title = f"{data['name']}, {results['ipc']} images per class, student {results['student']}"
    table = Table("set", "labels", "budget", "steps", "top-1", "top-5", "best", "paper", title=title)
    method = {c["labels"]: c for c in results["cells"] if c["budget"] == "own"}
    for cell in results["cells"]:
        expected = paper.get(cell["labels"]) if cell["budget"] == "own" else None
        table.add_row(
            cell["set"], cell["labels"], cell["budget"], f"{cell['steps']:,}", _spread(cell["top1"]),
            _spread(cell["top5"]), f"{max(cell['best']):.1f}", "-" if expected is None else f"{expected:.1f}",
            style="bold" if cell["budget"] == "own" else None,
        )  # fmt: skip
    console.print(table)
    teachers = ", ".join(f"{name} {accuracy['top1']:.1f}" for name, accuracy in results["teachers"].items())
    print(f"teachers, top-1: {teachers}; {len(results['seeds'])} seeds, last epoch, mean ± std")
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
    print(f"classes: {', '.join(manifest.class_names[:10])}{', ...' if len(manifest.class_names) > 10 else ''}")
    if manifest.teachers:
        print("teachers: " + ", ".join(f"{t.name} {t.accuracy:.1f} %" for t in manifest.teachers))
    print(f"labels: {manifest.label_kind}; views: {distilled.view_count:,}; picture: {folder / 'contact_sheet.png'}")


def show_estimate(command: RecipeCommand) -> None:
    """Print the plan of a run with an estimate of time, memory and bytes, from steps timed on this machine."""
    stages, notes = estimate_recipe(command.settings)
    table = Table(
        "stage", "work", "time", "memory", "bytes kept", title=f"{command.recipe}: plan of {_directory(command)}"
    )
    for stage in stages:
        table.add_row(stage.name, stage.work, _time(stage.seconds), _bytes(stage.memory), _bytes(stage.kept))
    table.add_row("together", "", _time(sum(s.seconds for s in stages)), "", _bytes(sum(s.kept for s in stages)))
    console.print(table)
    for note in notes:
        print(note)


def print_where(directory: Path) -> None:
    """Say where the results lie."""
    print(f"distilled set: {directory / 'distilled'}  (picture: {directory / 'distilled' / 'contact_sheet.png'})")
    print(f"results: {directory / 'results.json'}, events: {directory / 'events.jsonl'}")


def _spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else 0.0
    return f"{mean:.1f} ± {std:.1f}"


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


if __name__ == "__main__":
    raise SystemExit(main())
