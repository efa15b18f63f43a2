"""What stored labels cost and give: accuracy against their bytes, from static labels over pools to dynamic ones.

    python benchmarks/label_pools.py --data data/cifar100.npz --ipc 10 --epochs 50 --out pools.json
    python benchmarks/label_pools.py runs/laptop-cifar100-ipc10 --data data/cifar100.npz --out pools.json

The set is that of a finished run, or random images. Students train on it with static labels, with pools of 1 to 16
epochs in every encoding that the classes allow, and with dynamic labels, all for the same epochs and steps. Students on
a pool share its draws (its seed), dynamic and static ones draw each their own. Resumes where it stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from measure import run_students

from stillroom.compute import Plan
from stillroom.data import DataConfig, load_real
from stillroom.distilled import count_bytes, load_distilled
from stillroom.errors import StillroomError
from stillroom.labels import PoolConfig, attach_labels
from stillroom.logits import count_logit_bytes
from stillroom.manifest import LabelEncoding
from stillroom.methods.select import RandomConfig, distill_random
from stillroom.protocols import PROTOCOLS, name_protocol, protocol_student
from stillroom.run import Run
from stillroom.students import evaluate
from stillroom.teachers import TeachersConfig, load_teachers


def cells(arguments: argparse.Namespace, classes: int) -> list[tuple[str, PoolConfig | None]]:
    """Return the rows to measure: a kind of label and, where it is replayed, its pool."""
    pools = []
    for encoding in arguments.encodings:
        try:
            count_logit_bytes(1, classes, encoding)
        except StillroomError as error:
            print(f"left out: {error}")
            continue
        pools += [("replayed", PoolConfig(epochs, encoding, arguments.pool_seed)) for epochs in arguments.pools]
    return [("static", None), *pools, ("dynamic", None)]


def measure(arguments: argparse.Namespace, plan: Plan, run: Run) -> list[dict[str, Any]]:
    real = load_real(DataConfig(arguments.data, holdout_per_class=arguments.holdout_per_class))
    student = protocol_student(arguments.protocol, real.image_size)
    epochs = arguments.epochs or student.dynamic_epochs
    train = replace(student.train, epochs=epochs)
    student = replace(student, network=arguments.student or student.network, train=train, dynamic_epochs=epochs)
    config = TeachersConfig(tuple(arguments.networks), recipe="fast", epochs=arguments.teacher_epochs)
    kept = ("directory", "data", "holdout_per_class", "ipc", "pool_seed")
    settings = {name: str(getattr(arguments, name)) for name in kept} | {"student": asdict(student)}
    run.bind_config(settings | {"teachers": asdict(replace(config, cache=None))}, plan.as_dict())
    if arguments.directory is None:
        teachers = load_teachers(real, config, plan, run)
        plain = distill_random(real, teachers, arguments.ipc, RandomConfig(), 0, plan, run)
    else:  # a set's own teachers label it
        plain = load_distilled(arguments.directory / "distilled").with_labels(None)
        hashes = {teacher.name: teacher.hash for teacher in plain.manifest.teachers}
        teachers = load_teachers(real, replace(config, networks=tuple(hashes)), plan, run, hashes)
    rows: list[dict[str, Any]] = []
    for kind, pool in cells(arguments, real.classes):
        name = kind if pool is None else f"{kind}-{pool.encoding}-{pool.epochs}"
        labelled = attach_labels(plain, kind, teachers, plan, run, "labels", pool, train)
        result = evaluate(labelled, real, student, tuple(arguments.seeds), plan, run, teachers=teachers, cell=name)
        budget = count_bytes(labelled)
        rows.append({
            "labels": kind, "pool_epochs": pool and pool.epochs, "encoding": pool and pool.encoding,
            "steps": result.steps, "mean": round(100 * result.mean, 2), "std": round(100 * result.std, 2),
            "label_bytes": result.label_bytes,  # of dynamic labels: what storing them would take
            "file_bytes": budget.stored["labels"], "raw_ratio": round(budget.raw_ratio, 6),
            "stored_ratio": round(budget.stored_ratio, 6), "top1": [round(100 * value, 3) for value in result.top1],
        })  # fmt: skip
        print(f"{name:24} {100 * result.mean:6.2f} ± {100 * result.std:.2f}  {result.label_bytes:>12,} B", flush=True)
    print(f"students by the protocol: {name_protocol(student, real.image_size, ['hard'], [])}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="a finished run; random images if not given")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--holdout-per-class", type=int, default=0, help="measure on training images held out")
    parser.add_argument("--ipc", type=int, default=10, help="of random images")
    parser.add_argument(
        "--networks", nargs="+", default=["resnet10_thin", "convnet_thin"], help="teachers of random images"
    )
    parser.add_argument("--teacher-epochs", type=int, default=10)
    parser.add_argument("--protocol", default="laptop", choices=PROTOCOLS)
    parser.add_argument("--student", help="network; the protocol's if not given")
    parser.add_argument("--epochs", type=int, help="of every student; the protocol's with dynamic labels if not given")
    parser.add_argument("--pools", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="epochs stored")
    encodings = get_args(LabelEncoding)
    parser.add_argument("--encodings", nargs="+", default=["float16", "uint8", "top8"], choices=encodings)
    parser.add_argument("--pool-seed", type=int, default=0)
    run_students(parser, measure)


if __name__ == "__main__":
    main()
