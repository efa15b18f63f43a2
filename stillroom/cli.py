"""The command line: every stage by name, typed settings, plans before work, tables after it.

    stillroom demo                             digits, end to end, in about two minutes
    stillroom run own --data.source FOLDER     your own images: settings fitted to them and to this machine
    stillroom run RECIPE [settings]            teachers, distilled set, students, controls, table
    stillroom compare RECIPE --grid.methods .. methods x budgets x labels x students as one table
    stillroom squeeze | distill RECIPE         the same, stopped after the teachers | the distilled set
    stillroom evaluate DIR --data.source ...   students on a distilled set
    stillroom inspect | verify DIR             what a distilled set holds | whether it is whole
    stillroom import SET --data.source ...     a set that others published, into the artifact
    stillroom export DIR OUT --to ...          a set's views, for other people's scripts
    stillroom push DIR OWNER/NAME              a set and its card, to the Hugging Face Hub
    stillroom figure NAME RUN ...              a figure of finished runs, and its data; without words: which there are
    stillroom report RUN ...                   one page of finished runs, to be opened from disk
    stillroom watch RUN                        what a run is at, while it goes on
    stillroom recipes | clean                  what there is to run | what the teacher cache holds

Trained teachers are kept in a cache: --teachers.cache DIR (clean: --cache DIR), or else the environment variable
STILLROOM_CACHE, or else ~/.cache/stillroom.

Several workers share one run by --engine shared, each the same command, or by --engine ray; several GPUs share each
training by torchrun -m stillroom.cli ... (docs/cluster.md).

Exit codes: 0 done; 1 could not be done (the message says why); 2 wrong usage; 3 stopped by --time-limit or a signal,
with everything saved: the same command goes on.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro

from stillroom import __version__, hub, together
from stillroom.compare import compare
from stillroom.compute import ComputeConfig, resolve_plan
from stillroom.data import FACTS, DataConfig, look_at
from stillroom.distilled import find_set, load_distilled, verify_distilled
from stillroom.engines import EngineName, carry_out, check_engine, say_finished
from stillroom.errors import StillroomError, TimeLimitReached, UsageError, suggest
from stillroom.estimate import estimate_comparison, estimate_recipe
from stillroom.evaluate_command import evaluate_command, notify
from stillroom.events import read_config as read_config_of_run
from stillroom.exchange import ImportConfig, import_set
from stillroom.export import ExportLayout, export_set
from stillroom.figure_command import figure_command
from stillroom.files import require_free_folder
from stillroom.fitting import find_said, fit_recipe, open_settings, summarise
from stillroom.grid import Comparison, Grid, comparison_of
from stillroom.pipeline import (
    make_recipe_set,
    run_recipe,
    squeeze_recipe,
)
from stillroom.protocols import PROTOCOLS, ProtocolName, protocol_student
from stillroom.recipes import RECIPES, Recipe, find_recipe
from stillroom.render import failures_of
from stillroom.report_command import report_command, write_report
from stillroom.run import Run, finished_units
from stillroom.settings import parse_duration, parse_words, read_config, read_plain, reading_words, to_yaml
from stillroom.sinks import SinkName
from stillroom.tables import (
    print_where,
    show_budget,
    show_cache,
    show_comparison,
    show_estimate,
    show_recipes,
    show_results,
    show_teachers,
)
from stillroom.teachers import (
    empty_cache,
    list_cache,
)
from stillroom.train import help_others
from stillroom.watch import watch_command

OK, FAILED, USAGE, STOPPED = 0, 1, 2, 3


@dataclass(frozen=True)
class RecipeCommand:
    """Carry out a recipe, or its first stages; any of its settings can be changed."""

    recipe: tyro.conf.Positional[str] = "small"  # a name that `stillroom recipes` lists
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    protocol: ProtocolName | None = None  # students and labels of a protocol in place of the recipe's; see protocols.py
    out: Path | None = None  # run directory; runs/RECIPE if not given
    config: Path | None = None  # YAML file with settings, as --print-config writes it; flags override it
    time_limit: str | None = None  # stop cleanly after this time (90s, 9m, 2h); the same command goes on
    engine: EngineName = "local"
    """Who does the work: this process; this one and others of the same command (a job array); or workers on Ray."""
    workers: int | None = None  # on Ray; None: as many as there is room for
    ray_address: str | None = None  # HOST:PORT or auto; None: $RAY_ADDRESS, or else a cluster of this machine alone
    log: SinkName | None = None  # where numbers go besides the run's own events
    dry_run: bool = False  # print the plan with an estimate of time, memory and bytes, and stop
    print_config: bool = False  # print the resolved settings as YAML and stop

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self.out or Path("runs") / self.recipe


@dataclass(frozen=True)
class CompareCommand(RecipeCommand):
    """Compare methods, budgets and students in one table; --method and --ipc are the grid's to say."""

    settings: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)
    out: Path | None = None  # run directory; runs/compare-RECIPE if not given

    @property
    def directory(self) -> Path:
        """The comparison's directory."""
        return self.out or Path("runs") / f"compare-{self.recipe}"


@dataclass(frozen=True)
class DirectoryCommand:
    """A distilled set's directory, or that of the run that made it."""

    directory: tyro.conf.Positional[Path]


@dataclass(frozen=True)
class ImportCommand:
    """Read a set that others published: images in class folders, parquet, npz, or INFER's own files."""

    published: tyro.conf.Positional[str]  # folder of class folders or parquet files, .parquet or .npz file, or Hub id
    settings: Annotated[ImportConfig, tyro.conf.arg(name="")] = field(default_factory=ImportConfig)
    data: DataConfig = field(default_factory=DataConfig)  # the real data that the set was made of, at the set's size
    out: Path = Path("imported")  # a new or empty folder for the distilled set


@dataclass(frozen=True)
class ExportCommand:
    """Write a distilled set's views in the layout of other people's scripts."""

    directory: tyro.conf.Positional[Path]  # the set's directory, or that of the run that made it
    out: tyro.conf.Positional[Path]  # a new or empty folder; for npz a new file
    to: ExportLayout


@dataclass(frozen=True)
class PushCommand:
    """Show what would be public of a set on the Hugging Face Hub; with --yes, send it, which cannot be undone."""

    directory: tyro.conf.Positional[Path]  # the set's directory, or that of the run that made it
    repository: tyro.conf.Positional[str]  # "owner/name" on the Hub: new, empty, or an older version of a set
    private: bool = False  # only its owner may see it
    yes: bool = False  # send
    dry_run: bool = False  # send nothing, whatever else is said


@dataclass(frozen=True)
class DemoCommand:
    """Distil scikit-learn's digits by INFER, train students on the result, and compare with random images."""

    out: Path = Path("runs/demo")  # run directory
    time_limit: str | None = None  # stop cleanly after this time (90s, 9m, 2h)
    compute: ComputeConfig = field(default_factory=lambda: find_recipe("digits").compute)


@dataclass(frozen=True)
class RecipesCommand:
    """Show the recipes that there are, and the accuracy that each should reach."""


@dataclass(frozen=True)
class CleanCommand:
    """Show the cached teachers; with --yes, delete them, but for those that another process is training."""

    yes: bool = False  # delete
    cache: str | None = None  # folder of trained teachers; None: $STILLROOM_CACHE, or else ~/.cache/stillroom


Command = TypeVar("Command", bound=RecipeCommand)
Settings = TypeVar("Settings", bound=Recipe)
Result = TypeVar("Result")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not together.launched():
        return _carry_out_words(words)
    leads = together.join()
    try:
        if leads:
            return _carry_out_words(words)
        help_others()
        return OK
    finally:
        together.leave()


def _carry_out_words(words: list[str]) -> int:
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
    command = parse_recipe("run", words, RecipeCommand)
    if command is None:
        return OK
    name = command.recipe
    results = _carry_out(command, command.settings, lambda settings, run: run_recipe(settings, run, name))
    show_results(results)
    print_where(command.directory)
    return OK


def compare_command(words: list[str]) -> int:
    """stillroom compare: a grid of methods, budgets and students as one table."""
    command = parse_recipe("compare", words, CompareCommand)
    if command is None:
        return OK
    name = command.recipe
    results = _carry_out(command, command.settings, lambda settings, run: compare(settings, run, name))
    show_comparison(results)
    out = command.directory
    print(
        f"table, its columns explained: {out / 'table.md'}, .tex, .csv; all numbers: {out / 'comparison.json'}; "
        f"sets, without soft labels: {out / 'sets'}"
    )
    return FAILED if failures_of(results) else OK


def squeeze_command(words: list[str]) -> int:
    """stillroom squeeze: the teachers."""
    command = parse_recipe("squeeze", words, RecipeCommand)
    if command is None:
        return OK
    show_teachers(_carry_out(command, command.settings, squeeze_recipe))
    return OK


def distill_command(words: list[str]) -> int:
    """stillroom distill: teachers and the distilled set."""
    command = parse_recipe("distill", words, RecipeCommand)
    if command is None:
        return OK
    _carry_out(command, command.settings, make_recipe_set)
    show_budget(command.directory / "distilled")
    return OK


def inspect_command(words: list[str]) -> int:
    """stillroom inspect: the budget and where the picture is."""
    command = parse_words(DirectoryCommand, "inspect", words)
    show_budget(find_set(command.directory))
    return OK


def verify_command(words: list[str]) -> int:
    """stillroom verify: every file against its checksum."""
    command = parse_words(DirectoryCommand, "verify", words)
    folder = find_set(command.directory)
    problems = verify_distilled(folder)
    for problem in problems:
        print(f"stillroom: {problem}", file=sys.stderr)
    if not problems:
        print(f"{folder}: whole, every checksum agrees")
    return FAILED if problems else OK


def import_command(words: list[str]) -> int:
    """stillroom import: other people's sets."""
    command = parse_words(ImportCommand, "import", words)
    require_free_folder(command.out, "import: --out")
    distilled = import_set(command.published, command.data, command.settings)
    distilled.save(command.out)
    read = distilled.manifest.extra["import"]
    print(f"{command.published}, read as {read['layout']}, is now {command.out}")
    for note in read["notes"]:
        print(f"- {note}")
    show_budget(command.out)
    return OK


def export_command(words: list[str]) -> int:
    """stillroom export: our sets for others."""
    command = parse_words(ExportCommand, "export", words)
    distilled = load_distilled(find_set(command.directory))
    notes = export_set(distilled, command.to, command.out)
    print(f"{distilled.view_count:,} views as {command.to} in {command.out}")
    for note in notes:
        print(f"- {note}")
    return OK


def push_command(words: list[str]) -> int:
    """stillroom push: a set to the Hub; --yes sends it."""
    command = parse_words(PushCommand, "push", words)
    publication = hub.prepare(command.directory, command.repository, command.private)
    print("\n".join(publication.lines))
    if command.dry_run or not command.yes:
        print("nothing was sent; it cannot be taken back once others have it: add --yes to send it")
        return OK
    commit = hub.send(publication)
    print(f'sent; anybody who may see it reads it back by stillroom.load("{command.repository}@{commit}")')
    return OK


def recipes_command(words: list[str]) -> int:
    """stillroom recipes: the presets and what they should reach."""
    parse_words(RecipesCommand, "recipes", words)
    show_recipes(RECIPES)
    return OK


def clean_command(words: list[str]) -> int:
    """stillroom clean: what the teacher cache holds; --yes empties it."""
    command = parse_words(CleanCommand, "clean", words)
    rows = list_cache(command.cache)
    show_cache(rows)
    if command.yes:
        deleted, kept = empty_cache(command.cache)
        print(f"deleted {len(deleted)} teachers")
        for entry in kept:
            print(f"kept {entry.name}: another process is training it")
    elif rows:
        print("nothing was deleted; add --yes to delete them")
    return OK


def demo_command(words: list[str]) -> int:
    """stillroom demo: digits, end to end."""
    command = parse_words(DemoCommand, "demo", words)
    tell = None if sys.stderr.isatty() else say_finished
    with Run(command.out, time_limit=parse_duration(command.time_limit), sink=tell) as run, run.stop_on_signals():
        results = run_recipe(replace(find_recipe("digits"), compute=command.compute), run, "digits")
    show_results(results)
    print_where(command.out)
    page = command.out / "report.html"
    write_report([command.out], page)
    print(f"report: {page} (open it in a browser)")
    return OK


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo_command,
    "run": run_command,
    "compare": compare_command,
    "squeeze": squeeze_command,
    "distill": distill_command,
    "evaluate": evaluate_command,
    "inspect": inspect_command,
    "verify": verify_command,
    "import": import_command,
    "export": export_command,
    "push": push_command,
    "figure": figure_command,
    "report": report_command,
    "watch": watch_command,
    "recipes": recipes_command,
    "clean": clean_command,
}


# -- from words to runs --------------------------------------------------------------------------------------------


def parse_recipe(name: str, words: list[str], kind: type[Command]) -> Command | None:
    """Return the command with its settings resolved: recipe, then protocol, then YAML file, then flags.

    None where --print-config or --dry-run has said all there is to say. Raises UsageError for an unknown recipe, for a
    file that holds no settings, and for values that are out of range whatever the data.
    """
    recipe = next((word for word in words[:1] if not word.startswith("-")), "small")
    with reading_words():
        preset = find_recipe(recipe)
    preset = comparison_of(preset, Grid()) if issubclass(kind, CompareCommand) else preset
    command = parse_words(kind, name, words, kind(recipe, read_config(words, preset)))
    if command.protocol is not None:
        with reading_words():
            settings = _recipe_under_protocol(preset, command.protocol, command.settings)
        command = parse_words(kind, name, words, kind(recipe, read_config(words, settings)))
    parse_duration(command.time_limit)
    check_engine(command)
    if command.recipe != recipe:
        raise UsageError(f"name the recipe first: stillroom {name} {command.recipe} ...")
    if isinstance(command.settings, Comparison):
        _check_said_once(command.settings, preset)
    if recipe == "own":
        command = _fit_command(command, name, words)
    if command.print_config:
        print(to_yaml(command.settings))
        return None
    if command.dry_run:
        if isinstance(command.settings, Comparison):
            estimate = estimate_comparison(command.settings)
        else:
            last = {"squeeze": "teachers", "distill": "set"}.get(name, "students")
            estimate = estimate_recipe(command.settings, last)
        if finished := finished_units(command.directory):
            students = sum(name.startswith("student-") for name in finished)
            estimate[1].append(
                f"{command.directory} holds {len(finished)} finished units, {students} of them students; what of this "
                "work they are is not done again, though the plan counts it"
            )
        show_estimate(f"{command.recipe}: plan of {command.directory}", *estimate)
        return None
    return command


def _fit_command(command: Command, name: str, words: list[str]) -> Command:
    """Return the command with what its recipe leaves open chosen, and tell of it; what words and files say stays.

    A run that is there already goes on with what was chosen for it, on whatever machine and by however many workers.
    """

    def over(settings: Recipe) -> Command:
        """The command, its words and files laid over these settings."""
        return parse_words(type(command), name, words, type(command)(command.recipe, read_config(words, settings)))

    fixed = find_said(lambda settings: over(settings).settings, command.settings)
    chosen = open_settings(command.settings)
    if command.protocol is not None:
        fixed |= {path: value for path, value in chosen.items() if path.startswith("student.")}
    if isinstance(command.settings, Comparison) and command.settings.grid.ipc:
        fixed["ipc"] = max(command.settings.grid.ipc)
    stored: dict[str, Any] = {}
    if (command.directory / "config.json").exists():
        settings = read_config_of_run(command.directory)["settings"]
        known = {k: v for k, v in settings.items() if k in ("data", "teachers", "ipc", "infer", "student")}
        before = open_settings(read_plain(known, command.settings, str(command.directory / "config.json"), notify))
        # A comparison's grid says the budgets: its ipc follows from the rest.
        stored = {path: value for path, value in before.items() if path != "ipc" or "ipc" in settings}
    plan, look = resolve_plan(command.settings.compute), look_at(command.settings.data)
    fitted, reasons = fit_recipe(command.settings, look, plan.device, plan.threads, stored | fixed)
    if stored:
        reasons = [f"{command.directory} goes on with what was chosen for it: {summarise(fitted)}"]
    for reason in reasons:
        notify(reason)
    return over(fitted)


def _check_said_once(comparison: Comparison, preset: Recipe) -> None:
    """Raise UsageError where the grid says one thing and the recipe's own settings another."""
    grid = comparison.grid
    if grid.methods and comparison.method != preset.method:
        raise UsageError(f"--method {comparison.method} is not looked at beside --grid.methods; name it there")
    if grid.ipc and comparison.ipc != preset.ipc:
        raise UsageError(f"--ipc {comparison.ipc} is not looked at beside --grid.ipc; name it there")


def _recipe_under_protocol(recipe: Recipe, name: ProtocolName, given: Recipe) -> Recipe:
    """Return the recipe with the protocol's students and labels, its own teachers kept: they make the set, too.

    given: the recipe with what the user gave besides, which says what data and teachers there are.
    """
    data, protocol = given.data, PROTOCOLS[name]
    size = data.image_size or (FACTS[data.source].image_size if data.source in FACTS else None)
    labelled_by = recipe.labelled_by
    if protocol.teachers and set(protocol.teachers) <= set(given.teachers.networks):
        labelled_by = protocol.teachers
    elif protocol.teachers:
        print(
            f"the protocol {name!r} has labels of {', '.join(protocol.teachers)} alone, which is not among the "
            f"teachers; here all of them label. For its own: stillroom evaluate DIR --protocol {name}",
            file=sys.stderr,
        )
    return dataclasses.replace(
        recipe,
        teachers=given.teachers,
        student=protocol_student(name, size),
        labels=protocol.labels,
        labelled_by=labelled_by,
    )


def _carry_out(command: RecipeCommand, settings: Settings, work: Callable[[Settings, Run], Result]) -> Result:
    """Return what `work` makes of the command's own settings, in its directory, on the engine that it names."""
    return carry_out(
        command,
        command.directory,
        settings.compute,
        settings.teachers,
        lambda compute, run: work(dataclasses.replace(settings, compute=compute), run),
    )


if __name__ == "__main__":
    raise SystemExit(main())
