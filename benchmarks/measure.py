"""What the step benchmarks share: images, time, memory, the matmul peak, and the file that results go to."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.compute import ComputeConfig, Plan, resolve_plan
from stillroom.data import DataConfig, MemoryImages, RealData, load_real
from stillroom.pipeline import provenance, source_commit
from stillroom.run import Run

BEGUN_AT = source_commit()  # the source may change while a benchmark runs

VARIANTS = ("bfloat16-compiled", "float32-compiled", "bfloat16-eager", "float32-eager")
CLASSES, SIZE = 100, 32
CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def load_images(data: str | None, classes: int, per_class: int = 10) -> RealData:
    """Return real data: of the folder or name `data`, else smooth noise, uint8, `per_class` images of each class."""
    if data is not None:
        return load_real(DataConfig(source=data))
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(classes * per_class, 3, 8, 8, generator=generator)
    fine = torch.randn(classes * per_class, 3, SIZE, SIZE, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear") + 0.2 * fine
    images = ((0.45 + 0.25 * smooth).clamp(0, 1) * 255).to(torch.uint8)
    split = MemoryImages(images, torch.arange(classes).repeat(per_class))
    names = tuple(f"class {index}" for index in range(classes))
    return RealData(
        "generated", names, split, split, CIFAR_MEAN, CIFAR_STD, SIZE, True, 0, images.numel(), images.numel()
    )


def use_torch_defaults(device: str, threads: int) -> None:
    """Set the switches that `Plan.activate` sets to what a script finds that sets none: what baselines run under."""
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")


def wait_for_device() -> None:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


def time_steps(step: Callable[[], object], steps: int) -> float:
    """Return milliseconds per call of `step`, mean over `steps` calls, the device's work included."""
    wait_for_device()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    wait_for_device()
    return (time.perf_counter() - begun) * 1000 / steps


def time_interleaved(
    steps_of: dict[str, Callable[[], object]], steps: int, repeats: int, before: dict[str, Callable[[], None]]
) -> dict[str, list[float]]:
    """Return, per name, `repeats` times of a block of `steps` calls: all names in turn, again and again.

    What else the machine does then slows all of them alike. `before[name]`, untimed, sets what the block runs under.
    """
    times: dict[str, list[float]] = {name: [] for name in steps_of}
    for _ in range(repeats):
        for name, step in steps_of.items():
            before[name]()
            times[name].append(time_steps(step, steps))
    return times


def multiply_peak(device: str, dtype: torch.dtype, side: int = 1024, repeats: int = 10) -> float:
    """Return the highest rate of a square torch.mm or of a 3 x 3 convolution in this process, in GFLOP/s.

    On a CPU convolutions can be twice as fast as torch.mm in float32, being another library's.
    """
    side = 8 * side if device.startswith("cuda") else side
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    images = torch.randn(side // 16, 256, 8, 8, device=device).to(dtype, memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        product = min(time_steps(lambda: torch.mm(a, b), 1) for _ in range(repeats))
        convolution = min(time_steps(lambda: torch.conv2d(images, kernel, padding=1), 1) for _ in range(repeats))
    return max(2 * side**3 / product, 2 * images.numel() * kernel[0].numel() / convolution) / 1e6


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def describe_times(
    times: list[float], baseline: float, images: int, gflop: float, peak: float, memory: int | None, slots: int = 1
) -> dict[str, Any]:
    """Return what every row says of a loop's `times` in milliseconds: of one slot, where a step takes several.

    baseline: the other way's median; gflop: of one slot's step; peak: of multiply_peak, in GFLOP/s.
    """
    milliseconds = statistics.median(times) / slots
    return {
        "milliseconds": milliseconds,
        "fastest": min(times) / slots,
        "slowest": max(times) / slots,
        "ratio": baseline / milliseconds,
        "images_per_second": 1000 * images / milliseconds,
        "gflop": gflop,
        "peak_gflops": peak,
        "share_of_peak": gflop / milliseconds * 1000 / peak,
        "memory_mib": None if memory is None else memory / 2**20,
    }


def write_results(path: Path | None, plan: Plan, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print `rows` as a table and, where `path` is given, write them with what made them."""
    shown = [key for key in rows[0] if not isinstance(rows[0][key], list)]
    cells = [[f"{v:.3g}" if isinstance(v := row.get(key), float) else str(v) for key in shown] for row in rows]
    print("| " + " | ".join(shown) + " |")
    print("| " + " | ".join("---" for _ in shown) + " |")
    for line in cells:
        print("| " + " | ".join(line) + " |")
    if path is not None:
        begun = {"command": shlex.join(["python", *sys.argv]), "commit": BEGUN_AT}
        record = {"provenance": provenance(plan) | begun, "settings": settings, "rows": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, default=str) + "\n")


def build_parser(description: str | None, networks: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark of a step is asked for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=networks)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=5, help="of a timed block")
    parser.add_argument("--repeats", type=int, default=5, help="blocks of each loop")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", help="real images: a dataset's name or folder; default: generated smooth noise")
    parser.add_argument("--classes", type=int, default=CLASSES, help="of the images, where --data is not given")
    parser.add_argument("--cold-compile", action="store_true", help="compile without caches, as a first run does")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser


def add_optimisation(parser: argparse.ArgumentParser) -> None:
    """Add what the benchmarks of a whole optimisation are asked for besides."""
    parser.add_argument("--optimise-steps", type=int, default=100, help="of the whole optimisation; 0: none")
    parser.add_argument("--pack-slots", type=int, help="slots in a step; default: as runs on this device choose")


def build_plan(arguments: argparse.Namespace, variant: str) -> Plan:
    """Return the numerical plan of a variant, such as "bfloat16-compiled", on the device that is asked for."""
    precision, mode = variant.split("-")
    config = ComputeConfig(
        device=arguments.device,
        precision=precision,  # type: ignore[arg-type]
        compile="on" if mode == "compiled" else "off",
        threads=arguments.threads,
        pack_slots=getattr(arguments, "pack_slots", None),
    )
    return resolve_plan(config, notify=print)


def run_steps(
    arguments: argparse.Namespace, measure: Callable[[str, RealData, argparse.Namespace], list[dict[str, Any]]]
) -> int:
    """Measure every network, write the rows, and return the exit code: 1 where some loop does not agree."""
    torch.compiler.config.force_disable_caches = arguments.cold_compile
    real = load_images(arguments.data, arguments.classes)
    rows: list[dict[str, Any]] = []
    for name in arguments.networks:
        torch.compiler.reset()
        rows += measure(name, real, arguments)
    write_results(arguments.out, build_plan(arguments, arguments.variants[0]), vars(arguments), rows)
    return 0 if all(row.get("agrees", True) for row in rows) else 1


def run_students(
    parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace, Plan, Run], list[dict[str, Any]]]
) -> None:
    """Measure students of several seeds and write the rows; what a stopped benchmark finished is kept beside them."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="JSON file; each finished student is kept in a folder beside it")
    arguments = parser.parse_args()
    plan = resolve_plan(ComputeConfig(threads=arguments.threads), print)
    plan.activate()
    with Run(arguments.out.with_suffix("") if arguments.out else None) as run:
        rows = measure(arguments, plan, run)
    write_results(arguments.out, plan, vars(arguments), rows)
