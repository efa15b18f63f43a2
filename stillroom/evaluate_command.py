"""`stillroom evaluate DIR`: students on a set that exists, by its run's data, teachers and protocol, or by others."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from stillroom.compute import ComputeConfig, Plan, resolve_plan
from stillroom.data import FACTS, DataConfig, RealData, hub_id, load_real
from stillroom.distilled import DistilledSet, count_bytes, find_set, load_distilled
from stillroom.engines import EngineName, carry_out
from stillroom.errors import UsageError
from stillroom.files import read_sealed, write_json
from stillroom.labels import PoolConfig, attach_labels
from stillroom.manifest import LabelKind, read_manifest
from stillroom.pipeline import bind_plan, bound_settings, describe_budget, holds_labels, provenance
from stillroom.protocols import PROTOCOLS, ProtocolName, name_protocol, protocol_student
from stillroom.replay import with_batches_of
from stillroom.run import Run
from stillroom.settings import parse_words, read_config, read_plain, to_yaml
from stillroom.sinks import SinkName
from stillroom.students import Evaluation, StudentConfig, check_matches, evaluate
from stillroom.tables import show_evaluation
from stillroom.teachers import Teacher, TeachersConfig, load_teachers, untrained_teachers

# What a command is told anew each time, so that no file of settings holds it.
NO_SETTINGS = (
    "distilled", "protocol", "out", "config", "time_limit", "engine", "workers", "ray_address", "log", "print_config",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateCommand:
    """Train students on a distilled set and measure them on the real test split."""

    distilled: tyro.conf.Positional[Path]  # the set's directory
    # Data, students and teachers are those of the run that made the set, where it lies in one.
    data: DataConfig = field(default_factory=DataConfig)  # the real data that the set was made of
    student: StudentConfig = field(default_factory=StudentConfig)
    labels: Literal["stored", LabelKind] = "stored"  # what is not stored is made by the teachers
    pool: PoolConfig = field(default_factory=PoolConfig)  # of replayed labels; those of the set, where it has some
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    protocol: ProtocolName | None = None  # students, labels and teachers of a protocol; see protocols.py
    out: Path | None = None  # run directory; the students are not kept if not given
    config: Path | None = None  # YAML file with settings; flags override it
    time_limit: str | None = None  # stop cleanly after this time (90s, 9m, 2h)
    engine: EngineName = "local"
    """Who does the work: this process; this one and others of the same command (a job array); or workers on Ray."""
    workers: int | None = None  # on Ray; None: as many as there is room for
    ray_address: str | None = None  # HOST:PORT or auto; None: $RAY_ADDRESS, or else a cluster of this machine alone
    log: SinkName | None = None  # where numbers go besides the run's own events
    print_config: bool = False  # print the resolved settings as YAML and stop


def evaluate_command(words: list[str]) -> int:
    """stillroom evaluate: students on a set that exists."""
    if words and words[0].startswith("-") and not {"-h", "--help"} & set(words):
        raise UsageError("name the set's directory first: stillroom evaluate DIR ...")
    own = None if not words or words[0].startswith("-") else _as_its_run(Path(words[0]))
    default = None if own is None else read_config(words, own, NO_SETTINGS)
    command = parse_words(EvaluateCommand, "evaluate", words, default)
    assert own is not None  # or the words were refused, or asked for help
    if command.protocol is not None:
        default = read_config(words, _under_protocol(own, command.protocol), NO_SETTINGS)
        command = parse_words(EvaluateCommand, "evaluate", words, default)
    for flag, given in (("--time-limit", command.time_limit), ("--engine", command.engine != "local")):
        if given and command.out is None:
            raise UsageError(f"{flag} leaves what is done to others or to later, in a run directory: give --out too")
    if command.log is not None and command.out is None:
        raise UsageError(f"--log {command.log} goes by the name of a run directory: give --out too")
    if command.print_config:
        print(to_yaml(command, NO_SETTINGS))
        return 0
    folder = find_set(command.distilled).resolve()
    if command.out is not None and command.out.resolve() in (folder, folder.parent):
        raise UsageError(f"--out {command.out} holds the set itself; give its students a directory of their own")
    dataset, source = read_manifest(folder).dataset.name, command.data.source
    is_found = source in FACTS or Path(source).exists() or hub_id(source) is not None
    if source == dataset and not is_found:
        raise UsageError(f"the set was made of {source!r}; say where these images lie: --data.source PATH")
    settled, begun_as = command, own
    dataset, classes, result, protocol = carry_out(
        command,
        command.out,
        command.compute,
        command.teachers,
        lambda compute, run: _evaluate(dataclasses.replace(settled, compute=compute), begun_as, words, run),
    )
    show_evaluation(dataset, classes, command.student, result, protocol)
    return 0


def _evaluate(
    command: EvaluateCommand, own: EvaluateCommand, words: list[str], run: Run
) -> tuple[str, int, Evaluation, str]:
    """Return the data's name and number of classes, what students reached on the set, and the protocol's name.

    `own` is the command as the set's run has it.
    """
    distilled = load_distilled(find_set(command.distilled))
    plan = resolve_plan(command.compute, run.notice)
    real = load_real(command.data)
    check_matches(distilled, real, held_out=command.data.holds_out)
    kept = {k: v for k, v in asdict(command).items() if k in ("data", "student", "labels", "pool", "teachers")}
    settings = bound_settings(kept, real)
    settings["distilled"] = {role: facts.sha256 for role, facts in distilled.manifest.files.items()}
    plan = bind_plan(run, settings, plan)
    stored_kind = distilled.manifest.label_kind
    kind = stored_kind if command.labels == "stored" else command.labels
    asked = None if command.labels == "stored" else command.pool
    holds = holds_labels(distilled, kind, asked)
    needs_teachers = kind not in ("hard", "learned") and (kind == "dynamic" or not holds)
    teachers = _label_with(command, own, words, distilled, real, plan, run) if needs_teachers else []
    if {teacher.hash for teacher in teachers} - {teacher.hash for teacher in distilled.manifest.teachers}:
        run.notice("these teachers are not the ones that the set was made with: their weights differ")
    if not holds:
        distilled = attach_labels(distilled, kind, teachers, plan, run, pool=asked, train=command.student.train)
    result = evaluate(distilled, real, command.student, command.seeds, plan, run, teachers=teachers)
    by = [teacher.name for teacher in teachers or distilled.manifest.teachers]
    protocol = name_protocol(command.student, real.image_size, [kind], by)
    if command.out is not None:
        manifest = distilled.manifest
        results = {
            "evaluation": asdict(result),
            "dataset": {"name": real.name, "classes": real.classes, "train": len(real.train), "test": len(real.test)},
            "set": {
                "folder": str(command.distilled),
                "fingerprint": distilled.fingerprint,
                "method": manifest.method,
                "ipc": manifest.ipc,
                "labels": stored_kind,
            },
            "bytes": describe_budget(count_bytes(distilled)),
            "protocol": protocol,
            "provenance": provenance(plan, run),
        }
        write_json(command.out / "results.json", results)
    return real.name, real.classes, result, protocol


def _under_protocol(command: EvaluateCommand, name: ProtocolName) -> EvaluateCommand:
    """Return the command with the protocol's students and, where it prescribes them, its labels and teachers."""
    protocol = PROTOCOLS[name]
    labels = protocol.labels[0] if len(protocol.labels) == 1 else command.labels
    networks = protocol.teachers or command.teachers.networks
    teachers = dataclasses.replace(command.teachers, networks=networks)
    student = protocol_student(name, command.data.image_size)
    return dataclasses.replace(command, student=student, labels=labels, teachers=teachers)


def _as_its_run(path: Path) -> EvaluateCommand:
    """Return what `stillroom evaluate PATH` does unless told otherwise: data, students, teachers as the set's run had.

    Where files lie is no part of a run's config.json: named datasets are looked for by name, others asked for. A set
    outside its run knows the name of its dataset and the size of its images, and its teachers' names.
    """
    folder = find_set(path)
    distilled, config = load_distilled(folder), folder.resolve().parent / "config.json"
    manifest = distilled.manifest
    facts, networks = manifest.dataset, tuple(teacher.name for teacher in manifest.teachers)
    data = DataConfig(source=facts.name, image_size=manifest.image_size[0], resize=facts.resize)
    default = EvaluateCommand(path, data, teachers=TeachersConfig(networks) if networks else TeachersConfig())
    if folder.resolve().name == "distilled" and config.exists():
        settings = read_sealed(config).get("settings", {})
        stages = ("data", "student", "teachers", "pool")
        had = {k: read_plain(settings[k], getattr(default, k), str(config), notify) for k in stages if k in settings}
        default = dataclasses.replace(default, **had)
    if (stored := manifest.pool) is not None:
        student = dataclasses.replace(default.student, train=with_batches_of(default.student.train, distilled))
        pool = PoolConfig(stored.epochs, stored.encoding, stored.seed)
        default = dataclasses.replace(default, student=student, pool=pool)
    return default


def _label_with(
    command: EvaluateCommand,
    own: EvaluateCommand,
    words: list[str],
    distilled: DistilledSet,
    real: RealData,
    plan: Plan,
    run: Run,
) -> list[Teacher]:
    """Return the teachers that label: those of the set by their weights, or others where settings name them.

    `own` is the command as the set's run has it. Raises StillroomError where the set's own would have to be trained.
    """
    placed = dataclasses.replace(own.teachers, cache=command.teachers.cache, checkpoints=command.teachers.checkpoints)
    known = all(teacher.hash for teacher in distilled.manifest.teachers)  # not of a set that others published
    if known and command.teachers == placed and not any(word.startswith("--teachers.networks") for word in words):
        hashes = {teacher.name: teacher.hash for teacher in distilled.manifest.teachers}
        return load_teachers(real, command.teachers, plan, run, hashes)
    if absent := untrained_teachers(real, command.teachers, plan):
        differ = "; where their weights differ from those that the set was made with, so do the labels"
        run.notice(
            f"not in the cache, and trained before the students: {', '.join(absent)} ({command.teachers.train.epochs} "
            f"epochs of {len(real.train):,} images; others by --teachers.networks)"
            f"{differ if distilled.manifest.teachers else ''}"
        )
    return load_teachers(real, command.teachers, plan, run)


def notify(message: str) -> None:
    """Tell the user one thing where there is no run yet."""
    print(f"stillroom: {message}", file=sys.stderr)
