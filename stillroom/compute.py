"""How tensors are computed: device, precision, memory format, compilation, and where randomness comes from.

The *numerical plan* is resolved once per run, stored in it, and reused on resume and by every worker: the same plan,
library versions and kind of processor give the same bits. Another plan gives the same result within rounding. On a GPU
that holds for eager work: a compiled kernel is tuned anew in each process and may round otherwise.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import math
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from stillroom.errors import StillroomError, check_choices

Item = TypeVar("Item")
Result = TypeVar("Result")

# Changes whenever a draw is derived differently, so that cached work of another scheme is never mistaken for ours.
SEED_SCHEME = 1

THREADS_PER_CORE = 4  # more of them, thousands say, wait for each other without end

# From how many steps on compiling one pays for itself. Training was measured on one AVX512-bf16 core (docs/log.md):
# convnet's compiles in 13 s and saves 8 ms a step, ResNet-18's in 38 s and saves 4 ms. Recovery is by what was measured
# of full-sized networks, for GPUs and G-VBSM; see recover.repays_compiling for the others.
COMPILE_FROM_STEPS = {"recovery": 300, "training": 5000}

# What a recovery's step keeps for its backward pass, in bytes per pixel of the images, by their largest side: float32,
# eager, of the hungriest network measured (MobileNetV2), whose stem halves images of more than 64 px at once.
ACTIVATION_BYTES = ((64, 24_000), (math.inf, 6_000))
MEMORY_SHARE = 0.6  # of what is free, that activations may take

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Of a memory controller, by its name in /proc/self/cgroup ("": version 2): its folder in GROUPS, the files of a group's
# limit and use, and what memory.stat calls the use that the kernel gives up before it refuses more: cached files.
GROUP_FILES = {
    "": (".", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}

Function = TypeVar("Function", bound=Callable[..., Any])


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a 63-bit seed from `seed` and the names of a piece of work, whatever the order, process or machine."""
    text = "/".join([f"stillroom-{SEED_SCHEME}", str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def build_generator(seed: int, *path: str | int) -> torch.Generator:
    """Return a CPU generator for one piece of work, e.g. ``build_generator(0, "student", "crop", step)``."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))


def seed_global(seed: int, device: str) -> None:
    """Seed what dropout draws from: torch's own generator, and that of `device` if it is a GPU.

    torch.manual_seed seeds every device there is, and takes a third of a millisecond for it.
    """
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        index = torch.device(device).index
        torch.cuda.default_generators[torch.cuda.current_device() if index is None else index].manual_seed(seed)


@dataclass(frozen=True)
class ComputeConfig:
    """What the user asks of the machine; `resolve_plan` turns it into the numerical plan of a run."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the processor has it
    compile: Literal["auto", "on", "off"] = "auto"  # auto: where the number of steps repays the compilation
    threads: int | None = None  # CPU threads; None: $OMP_NUM_THREADS, or else all cores that this process may use
    pack_slots: int | None = None  # slots of one teacher optimised in one step; None: chosen for device and images
    chunk_images: int | None = None  # of a slot that pass together; 0: all; None: chosen by free memory
    workers_per_machine: int = 1  # that share its memory, where chunks are chosen by that; --engine ray finds it out

    def __post_init__(self) -> None:
        check_choices(self, "compute")
        if self.threads is not None and self.threads < 1:
            raise StillroomError(f"compute.threads is {self.threads}; give 1 or more, or leave it out for all cores")
        if self.pack_slots is not None and self.pack_slots < 1:
            raise StillroomError(f"compute.pack_slots is {self.pack_slots}; give 1 or more, or leave it out")
        if self.chunk_images is not None and self.chunk_images < 0:
            raise StillroomError(
                f"compute.chunk_images is {self.chunk_images}; give 1 or more, 0 for whole slots, or leave it out"
            )
        if self.workers_per_machine < 1:
            raise StillroomError(f"compute.workers_per_machine is {self.workers_per_machine}; give 1 or more")


class Float32Conv2d(nn.Conv2d):
    """A convolution in float32, whatever autocast says: for strided depthwise ones on a CPU.

    oneDNN has no fast bfloat16 gradient for these: 173 ms where float32 takes 26 (144 channels, 100 images of 32 px,
    one AVX512-bf16 core), two thirds of a MobileNetV2's step.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype)).to(input.dtype)


@dataclass(frozen=True)
class Plan:
    """The numerical plan: everything that decides the bits beside the settings and the seeds."""

    device: str
    precision: Literal["float32", "bfloat16"]
    compile: Literal["auto", "on", "off"]
    threads: int
    channels_last: bool
    pack_slots: int
    processor: str
    torch_version: str
    seed_scheme: int
    chunk_images: int = 0  # of a slot that pass at a time; 0: all at once, as in plans of before there was a choice
    processes: int = 1  # that share every batch of a training; see together.py

    def activate(self) -> None:
        """Set the process-wide switches that the plan implies (threads, deterministic kernels, TensorFloat-32)."""
        torch.set_num_threads(self.threads)
        if self.device == "cpu":
            _keep_freed_memory()
        if self.device.startswith("cuda"):
            # Kernel selection by timing would make the bits depend on the moment; deterministic kernels do not.
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
            # Autocast does the fast work; what is left in float32 under it is there to be exact.
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False  # convolutions have a switch of their own

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def place(self, model: nn.Module) -> nn.Module:
        """Return `model` moved to the plan's device and memory format, its slow layers kept in float32."""
        if self.device == "cpu" and self.precision == "bfloat16":
            for layer in model.modules():
                if type(layer) is nn.Conv2d and layer.groups > 1 and max(layer.stride) > 1:
                    layer.__class__ = Float32Conv2d  # parameters and their names stay as they are
        return model.to(self.device).to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which networks run; outside it everything is float32."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def compiled(self, function: Function, pays: bool) -> Function:
        """Return `function` compiled where that is asked for, or left to us and `pays`; else unchanged."""
        if self.compile == "off" or (self.compile == "auto" and not pays):
            return function
        # Each piece of work compiles a function of its own; without this the eighth would silently run eagerly.
        torch._dynamo.reset()
        # Where a CUDA toolkit is installed but no GPU is, torch warns of it at every compilation.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        # Static shapes: one piece of work always sees one shape, and dynamic kernels are slower.
        return torch.compile(function, dynamic=False)  # type: ignore[return-value]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve_plan(
    config: ComputeConfig,
    notify: Callable[[str], None] = lambda message: None,
    slot: tuple[int, int] = (0, 0),
) -> Plan:
    """Resolve `config` on this machine; `notify` gets one line where something asked for cannot be had.

    slot: its images and their side in pixels, by which packing and chunks are chosen; 0: not known, one whole slot a
    step.

    Raises StillroomError for a device that is not here.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.split(":")[0]
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    index = device.partition(":")[2]
    if index and not (kind == "cuda" and index.isdigit() and int(index) < torch.cuda.device_count()):
        available[kind] = False
    if not available.get(kind, False):
        here = ", ".join(name for name, there in available.items() if there)
        raise StillroomError(
            f"compute.device is {config.device!r}, which this machine does not have; use one of: {here}"
        )
    cores = os.cpu_count() or 1
    if (config.threads or 0) > THREADS_PER_CORE * cores:
        raise StillroomError(
            f"compute.threads is {config.threads}, but this machine has {cores} cores; give as many, or leave it out"
        )
    met = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if met else 1
    if index and processes > 1:
        raise StillroomError(
            f"compute.device is {device!r}, but each of {processes} processes has a card of its own; give "
            f"--compute.device {kind}"
        )
    local, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes > 1 else 1, torch.cuda.device_count()
    if kind == "cuda" and local > cards:
        raise StillroomError(
            f"torchrun began {local} processes on this machine, which has {cards} cards; give as many "
            "--nproc-per-node, or --compute.device cpu"
        )
    compile_mode = config.compile
    if compile_mode != "off" and (missing := _missing_for_compile(kind)):
        notify(f"running without torch.compile: {missing}")
        compile_mode = "off"
    precision = config.precision if config.precision != "auto" else ("bfloat16" if _fast_bfloat16(kind) else "float32")
    slot_images, image_size = slot
    pack_slots = config.pack_slots or (_pack_for_gpu(slot_images * image_size**2) if kind == "cuda" else 1)
    chunk_images = config.chunk_images
    if chunk_images is None:
        free = _free_memory(device)
        if free is not None and kind != "cuda":  # a card is one worker's own
            free //= config.workers_per_machine
        chunk_images = _chunk_for_memory(free, slot_images, image_size, pack_slots)
    return Plan(
        device=device,
        precision=precision,
        compile=compile_mode,
        threads=config.threads or max(1, _own_threads() // local),
        channels_last=kind != "mps",
        pack_slots=pack_slots,
        processor=torch.cuda.get_device_name(device) if kind == "cuda" else _processor(),
        torch_version=torch.__version__,
        seed_scheme=SEED_SCHEME,
        chunk_images=chunk_images,
        processes=processes,
    )


def _pack_for_gpu(slot_pixels: int) -> int:
    """A large GPU starves on 100 small images; two thousand of 32 px fill it, as does one slot of ImageNet."""
    return max(1, 2000 * 32 * 32 // slot_pixels) if slot_pixels else 1


def _chunk_for_memory(free: int | None, slot_images: int, image_size: int, pack_slots: int) -> int:
    """Return how many images of a slot may pass together, a power of two, or 0 for all: those that memory holds."""
    if free is None or not slot_images:
        return 0
    bytes_per_pixel = next(held for side, held in ACTIVATION_BYTES if image_size <= side)
    most = int(MEMORY_SHARE * free / (bytes_per_pixel * image_size**2 * pack_slots))
    return 0 if most >= slot_images else 1 << max(0, most.bit_length() - 1)


def _free_memory(device: str) -> int | None:
    """Return the bytes that a process may still take on `device`, or None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return max(0, min([free, *_free_in_groups()]))


def _free_in_groups() -> list[int]:
    """Return what each control group of this process leaves free: a container, or a job of SLURM's within its user's,
    may be allowed less than the machine has. Below 0 where a limit was lowered since."""
    free = []
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        name = "memory" if "memory" in controllers.split(",") else controllers
        if name not in GROUP_FILES:
            continue
        mount, limit, used, cached = GROUP_FILES[name]
        group = Path(path.lstrip("/"))
        for folder in (GROUPS / mount / part for part in (group, *group.parents)):  # each within the next
            with suppress(OSError, ValueError):  # a group that is not seen from within a container; "max" for no limit
                most, taken = (int((folder / file).read_text()) for file in (limit, used))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free.append(most - taken + int(stat.get(cached, 0)))
    return free


def peak_memory(step: Callable[[], object], device: str) -> int | None:
    """Return how many bytes more than before `step` held at its peak; None where the system does not tell.

    CUDA: allocated tensors. Linux: resident memory, with the kernel's high-water mark reset and freed memory handed
    back first.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = resident_memory("VmRSS")
    step()
    return resident_memory("VmHWM") - before


def resident_memory(field: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int:
    """Return the bytes of this process in memory now (VmRSS) or at most so far (VmHWM); 0 where it is not Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def _keep_freed_memory() -> None:
    """Have glibc hand freed memory out again instead of returning it to the system, and faulting it in anew each step.

    A step frees and allocates the same activations; this took 12 % off ResNet-18's compiled compensator step. Where the
    C library has no mallopt (macOS, Windows, musl), nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: whose top stays


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``[function(item) for item in items]`` by a thread per core: Pillow leaves Python free while it works."""
    with ThreadPoolExecutor(max(1, min(usable_cores(), 16, len(items)))) as pool:
        return list(pool.map(function, items))


def _own_threads() -> int:
    """Return as many threads as the environment asks for, or else one for each core."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cores()


def _fast_bfloat16(kind: str) -> bool:
    """Whether bfloat16 matrix work is done by the hardware: any recent GPU, AVX512-bf16 or AMX processors."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
    except OSError:  # not Linux: nothing is claimed
        return set()


def _processor() -> str:
    """Name the instruction set rather than the model: it is what decides which kernels run."""
    flags = _cpu_flags()
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return " ".join([platform.machine(), *known])


def _has_python_headers() -> bool:
    return os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))


def _missing_for_compile(kind: str) -> str | None:
    """Return what torch.compile lacks here, or None."""
    if sys.platform == "win32":
        return None if shutil.which("cl") else "no C++ compiler (cl) was found"
    if kind == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang")):
            return "no C compiler (gcc) was found"
        return None if _has_python_headers() else "the headers of Python (Python.h) are not installed"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for one
    if not shutil.which(compiler.split()[0]):
        return f"no C++ compiler ({compiler}) was found"
    if kind == "mps":
        return "it is not used on mps"
    return None
