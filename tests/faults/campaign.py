"""The fault campaign: commands are killed, starved of disk, locked out, disturbed and given damaged files.

    python tests/faults/campaign.py --trials 200 --out docs/results/faults.json

Every time a command ends with the bits of an undisturbed one, or with one clear error and, once what it names is put
right, with these bits. Of two workers at one run one is killed, and the other ends so. `--trials` counts kills; each
file is damaged twice, by a flipped byte and by cutting.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from nursery import Child, Told, fork, prepare

from stillroom import cli
from stillroom.files import hash_tensors, load_tensors

ON_CPU = ["--compute.device", "cpu", "--compute.precision", "float32", "--compute.compile", "off"]
NOBODY = 65534
PART_OF = {"squeeze": "squeeze", "distill": "run", "run": "run", "evaluate": "students", "export": "views",
           "import": "imported", "compare": "compare"}  # fmt: skip
SHARED = ("--engine", "shared")  # what makes a command one of several workers
HOLDING_SECONDS = ("events.jsonl", "table.md", "table.tex")  # which table.csv and results.json have in columns
SAME, CLEAR = "same bits", "clear error"


class World:
    """Undisturbed commands of all stages, and copies of what they leave, to be disturbed."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.chmod(0o755)  # for the child that is nobody
        self.folder, self.random = folder, random.Random(seed)
        self.source = prepare(folder)
        self.counts: dict[str, Counter[str]] = {}
        self.seconds: dict[str, float] = {}
        self.failures: list[str] = []
        self.whole = folder / "whole"
        self.whole.mkdir()
        self.expected: dict[str, dict[str, Any]] = {}  # after each stage: what its parts hold
        for stage in self.commands():
            begun = time.monotonic()
            told = self.start(stage, self.whole).wait()
            assert told.code == 0, (stage, told.err)
            self.seconds[stage] = time.monotonic() - begun
            self.expected[stage] = {n: v for n, v in state(self.whole).items() if n.split("/")[0] == PART_OF[stage]}

    def commands(self) -> dict[str, list[str]]:
        """The words of each stage's command, given in the place where its files lie."""
        few = ["--labels", "static", "--seeds", "0"]
        compare = ["compare", "toy", "--grid.methods", "random", "sre2l", "--sre2l.steps", "3", *few]
        return {
            "squeeze": ["squeeze", "toy", "--out", "squeeze"],
            "distill": ["distill", "toy", *few, "--out", "run"],
            "run": ["run", "toy", *few, "--out", "run"],
            "evaluate": ["evaluate", "run", "--data.source", str(self.source), "--seeds", "0", *ON_CPU,
                         "--out", "students"],
            "export": ["export", "run", "views", "--to", "folder"],
            "import": ["import", "views", "--data.source", str(self.source), "--out", "imported"],
            "compare": [*compare, "--out", "compare"],
        }  # fmt: skip

    def start(
        self, stage: str, place: Path, disturb: Callable[[], object] = lambda: None, words: Sequence[str] = ()
    ) -> Child:
        """Start the stage's command, with more `words`, in a child, in which `disturb` is called before."""

        def work() -> int:
            os.environ["STILLROOM_CACHE"] = "cache"
            os.chdir(place)
            disturb()
            return cli.main([*self.commands()[stage], *words])

        number = sum(sum(c.values()) for c in self.counts.values())
        return fork(work, self.folder / f"err-{number}-{self.random.random()}")

    def copy(self, *parts: str) -> Path:
        """Return a new place that has these parts of the undisturbed one, all where none is named."""
        place = self.folder / "disturbed"
        shutil.rmtree(place, ignore_errors=True)
        for part in parts or [entry.name for entry in self.whole.iterdir()]:
            shutil.copytree(self.whole / part, place / part)
        place.mkdir(exist_ok=True)
        return place

    def count(self, kind: str, outcome: str) -> None:
        self.counts.setdefault(kind, Counter())[outcome] += 1

    def judge(self, kind: str, stage: str, place: Path, told: Told, what: str = "", but: str = "") -> None:
        """Count a command that ended: as undisturbed, by a clear error, or, which is a failure, in another way.

        `but`: a damaged file that was not needed, and may stay so.
        """
        if told.code == 0 and (wrong := [name for name in self.differing(stage, place) if name != but]):
            self.fail(kind, f"{stage} {what}", f"other bits in {wrong[:3]}")
        elif told.code == 0:
            self.count(kind, SAME)
        elif told.is_clear_error:
            self.count(kind, CLEAR)
        else:
            self.fail(kind, f"{stage} {what}", f"exit code {told.code}: {told.err[-400:]}")

    def fail(self, kind: str, what: str, how: str) -> None:
        self.count(kind, "FAILED")
        self.failures.append(f"{kind}: {what}: {how}")
        print(self.failures[-1], flush=True)

    def differing(self, stage: str, place: Path) -> list[str]:
        """The files of the stage's directory that are not those of an undisturbed command."""
        found = state(place)
        return [name for name, value in self.expected[stage].items() if found.get(name) != value]

    def wrong_sets(self, place: Path) -> list[str]:
        """Artifacts that verify, and are not those of an undisturbed command."""
        wrong = []
        for manifest in place.rglob("manifest.json"):
            name = str(manifest.parent.relative_to(place))
            read = lambda folder=manifest.parent: cli.main(["verify", str(folder)])  # noqa: E731
            told = fork(read, self.folder / "verify").wait()
            own = {n: v for files in self.expected.values() for n, v in files.items() if n.startswith(f"{name}/")}
            # A card that is not there yet has a staged copy, which verifying has looked at.
            if told.code == 0 and any(
                (place / n).exists() and (place / n).read_bytes() != content for n, content in own.items()
            ):
                wrong.append(name)
            if told.code != 0 and not told.is_clear_error:
                wrong.append(f"{name}: {told}")
        return wrong


def state(place: Path) -> dict[str, Any]:
    """Every file below `place` by name: its bytes, or of what holds seconds all but these."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = str(path.relative_to(place))
        if path.name.startswith(".") or path.name in HOLDING_SECONDS or "/checkpoints/" in name or "/." in name:
            continue
        try:
            if (path.parent / "manifest.json").exists():
                found[name] = path.read_bytes()
            elif path.suffix == ".safetensors":
                tensors, meta = load_tensors(path)
                found[name] = (hash_tensors(tensors), _timeless(meta))
            elif path.suffix == ".json":
                found[name] = _timeless(json.loads(path.read_text()))
            elif path.suffix == ".csv" and path.parent.name == "compare":
                rows = csv.DictReader(io.StringIO(path.read_text()))
                found[name] = _timeless(list(rows))
            else:
                found[name] = path.read_bytes()
        except Exception as error:
            found[name] = f"unreadable: {error}"
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("time", "sha256", "provenance")
        return {k: _timeless(v) for k, v in value.items() if "seconds" not in k and k not in left_out}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


# -- the kinds of faults -------------------------------------------------------------------------------------------


def finish(world: World, kind: str, stage: str, place: Path) -> None:
    """Let the stage's command end in peace; a folder that the error says is not empty is deleted, and it goes again."""
    told = world.start(stage, place).wait()
    if stage in ("export", "import") and told.is_clear_error and "holds something already" in told.err:
        world.count(kind, "asked to delete a half-written folder")
        shutil.rmtree(place / ("views" if stage == "export" else "imported"))
        told = world.start(stage, place).wait()
    if told.code != 0:
        world.fail(kind, stage, f"went on by exit code {told.code}: {told.err[-300:]}")
    elif wrong := world.differing(stage, place):
        world.fail(kind, stage, f"other bits in {wrong[:3]}")
    else:
        world.count(kind, SAME)


def kill(world: World, trials: int) -> None:
    """kill -9 at random moments of every stage, one to four times before the same command may end."""
    kills = 0
    while kills < trials:
        place = world.copy("cache")
        shutil.rmtree(place / "cache")
        for stage in world.commands():
            for _ in range(world.random.randint(1, 4)):
                told = world.start(stage, place).wait(world.random.uniform(0, world.seconds[stage]))
                kills += told.code == -9
                world.count(f"kill {stage}", "killed" if told.code == -9 else "ended before")
                if wrong := world.wrong_sets(place):
                    world.fail("kill", stage, f"a wrong set verifies: {wrong}")
            finish(world, f"kill {stage}", stage, place)


def kill_a_worker(world: World, trials: int) -> None:
    """kill -9 of one of two workers at a random moment; the other one ends as if alone, and no table loses a row."""
    for _ in range(trials):
        place = world.copy("cache")
        shutil.rmtree(place / "cache")
        for stage in ("squeeze", "run", "evaluate", "compare"):
            kind, seconds = f"kill one of two workers: {stage}", world.seconds[stage]
            names = world.random.sample(("first", "second"), 2)
            begins, ends = (world.random.uniform(0, seconds) for _ in range(2))
            workers = {"first": world.start(stage, place, words=SHARED)}
            time.sleep(begins)
            workers["second"] = world.start(stage, place, words=SHARED)
            killed, lives = (workers[name] for name in names)
            rows = Rows(place / "compare" / "comparison.json")
            told = killed.wait(ends, rows.look)
            world.count(kind, "killed" if told.code == -9 else "ended before")
            left = lives.wait(meanwhile=rows.look)
            if told.code not in (0, -9):
                world.fail(kind, stage, f"exit code {told.code}: {told.err[-400:]}")
            if rows.lost:
                world.fail(kind, stage, f"the table had {rows.lost} rows")
            world.judge(kind, stage, place, left)


class Rows:
    """How many rows a comparison's table has, looked at while it grows: `lost` tells where they became fewer."""

    def __init__(self, table: Path) -> None:
        self.table, self.most, self.lost = table, 0, ""

    def look(self) -> None:
        if self.table.exists():
            found = len(json.loads(self.table.read_text())["rows"])
            self.lost = self.lost or (f"{self.most}, then {found}" if found < self.most else "")
            self.most = max(self.most, found)


def fill_disk(world: World, trials: int) -> None:
    """A file system of a few kilobytes, which is made larger after the error; where mounting is not allowed, none."""
    for _ in range(trials):
        place = world.copy()
        shutil.rmtree(place)
        place.mkdir()
        size = world.random.randrange(8, 160, 4)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place], capture_output=True
        ).returncode:
            world.count("disk full", "skipped: mounting is not allowed")
            return
        try:
            told = world.start("run", place).wait()
            world.judge("disk full", "run", place, told, f"{size} kB")
            if wrong := world.wrong_sets(place):
                world.fail("disk full", f"{size} kB", f"a wrong set verifies: {wrong}")
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            finish(world, "disk full", "run", place)
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def lock_out(world: World) -> None:
    """Folders that nothing may be written to."""

    def become_nobody() -> None:
        if os.geteuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    for stage in world.commands():
        place = world.copy("cache", "run", "views")
        for folder in (place, *(p for p in place.rglob("*") if p.is_dir())):
            folder.chmod(0o555)
        told = world.start(stage, place, become_nobody).wait()
        world.judge("read-only folder", stage, place, told)
        for folder in (place, *(p for p in place.rglob("*") if p.is_dir())):
            folder.chmod(0o755)


def start_twice(world: World, trials: int) -> None:
    """Two of one command at once: one ends as if alone, and so does the other, or it says who is at it."""
    for _ in range(trials):
        for stage in world.commands():
            before = {"evaluate": ["run"], "export": ["run"], "import": ["views"]}.get(stage, [])
            place = world.copy(*before) if before else world.copy("cache")
            if not before or stage == "evaluate":
                shutil.rmtree(place / "cache", ignore_errors=True)
            first = world.start(stage, place)
            time.sleep(world.random.uniform(0, world.seconds[stage]))
            second = world.start(stage, place)
            told = [first.wait(), second.wait()]
            if all(t.code for t in told):
                world.fail("two at once", stage, f"both failed: {told}")
            for t in told:
                world.judge("two at once", stage, place, t)


def turn_clock(world: World, trials: int) -> None:
    """A clock that jumps by years at each look, forwards and back, and files that are of other years."""

    def jump() -> None:
        look, years = time.time, random.Random(0)
        time.time = lambda: look() + years.uniform(-2e9, 2e9)

    for _ in range(trials):
        place = world.copy("cache")
        shutil.rmtree(place / "cache")
        for stage in world.commands():
            world.start(stage, place).wait(world.random.uniform(0, world.seconds[stage]))
            for path in place.rglob("*"):
                when = world.random.uniform(0, 4e9)
                os.utime(path, (when, when))
            if stage in ("export", "import"):
                shutil.rmtree(place / ("views" if stage == "export" else "imported"), ignore_errors=True)
            world.judge("clock", stage, place, world.start(stage, place, jump).wait())


def damage(world: World, times: int) -> None:
    """A flipped or missing byte in every file of runs, artifacts and cache, finished and not, before the same command.

    What verifies is to be the undisturbed set, and the command to end as undisturbed or by a clear error.
    """
    half = world.copy("cache")  # stopped within INFER's work, for checkpoints
    shutil.rmtree(half / "cache")
    world.start("run", half).wait(0.35 * world.seconds["run"])
    halfway = world.folder / "halfway"
    half.rename(halfway)
    for origin, place_of in ((world.whole, world.copy), (halfway, lambda: _copied(halfway, world))):
        for path in sorted(p for p in origin.rglob("*") if p.is_file() and p.name != ".lock"):
            name = str(path.relative_to(origin))
            part = name.split("/")[0]
            if part == "views" or not path.stat().st_size:
                continue
            stages = {"cache": ["run"], "run": ["run", "evaluate"], "squeeze": ["squeeze"], "students": ["evaluate"],
                      "compare": ["compare"], "imported": []}[part]  # fmt: skip
            for how in ("flipped byte", "cut") * times:
                place = place_of()
                content = bytearray(path.read_bytes())
                at = world.random.randrange(len(content))
                if how == "cut":
                    del content[at:]
                else:
                    content[at] ^= world.random.randint(1, 255)
                (place / name).write_bytes(content)
                what = f"{name} at byte {at}"
                if wrong := world.wrong_sets(place):
                    world.fail(how, what, f"a wrong set verifies: {wrong}")
                for stage in stages:
                    if stage == "evaluate" and part == "run":
                        if "/distilled/" not in name and "config.json" not in name:
                            continue
                        shutil.rmtree(place / "students", ignore_errors=True)
                    told = world.start(stage, place).wait()
                    world.judge(how, stage, place, told, what, name if "/units/" in name else "")
                if not stages:
                    world.count(how, CLEAR)  # wrong_sets has seen that it does not verify


def _copied(origin: Path, world: World) -> Path:
    place = world.folder / "disturbed"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(origin, place)
    return place


def run_campaign(folder: Path, trials: int, seed: int, damages: int = 1, out: Path | None = None) -> dict[str, Any]:
    """Carry out the campaign and return its counts by kind of fault and outcome, and what failed."""
    world = World(folder, seed)
    few = max(1, trials // 40)
    for work in (
        lambda: kill(world, trials),
        lambda: kill_a_worker(world, 2 * few),
        lambda: fill_disk(world, 2 * few),
        lambda: lock_out(world),
        lambda: start_twice(world, few),
        lambda: turn_clock(world, few),
        lambda: damage(world, damages) if damages else None,
    ):
        begun = time.monotonic()
        work()
        print(f"{time.monotonic() - begun:.0f} s", {k: dict(v) for k, v in world.counts.items()}, flush=True)
        results = {
            "trials": trials,
            "seed": seed,
            "counts": {kind: dict(sorted(counts.items())) for kind, counts in sorted(world.counts.items())},
            "failures": world.failures,
            "command": f"python tests/faults/campaign.py --trials {trials}",
            "commit": commit(),
        }
        if out is not None:
            out.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    return results


def commit() -> str:
    """The commit of the source that ran."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return git.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run_campaign(Path(folder), options.trials, options.seed, out=options.out)
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
