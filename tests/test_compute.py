"""The numerical plan is resolved once, and randomness comes from names alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillroom import compute
from stillroom.compute import ComputeConfig, Plan, build_generator, derive_seed, resolve_plan
from stillroom.errors import StillroomError

SEED_OF_STUDENT_CROP_7 = 6619680381166455902  # the first 63 bits of sha256 of "stillroom-1/0/student/crop/7"


def test_seeds_are_the_same_for_ever() -> None:
    """A change of these values makes every cached teacher and every published number of another scheme."""
    assert compute.SEED_SCHEME == 1
    assert derive_seed(0, "student", "crop", 7) == SEED_OF_STUDENT_CROP_7


def test_seeds_of_different_work_are_unrelated() -> None:
    paths = [(seed, *path) for seed in range(20) for path in (("a", 1), ("a", 11), ("b", 1), ("ab",), ("a", "b"))]
    seeds = [derive_seed(*path) for path in paths]
    assert len(set(seeds)) == len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)
    draws = torch.stack([torch.randn(2000, generator=build_generator(*path)) for path in paths[:20]])
    correlations = torch.corrcoef(draws) - torch.eye(20)
    assert correlations.abs().max() < 0.12


def test_the_plan_keeps_what_was_asked_for() -> None:
    plan = resolve_plan(ComputeConfig("cpu", precision="bfloat16", compile="off", threads=3, pack_slots=5))
    assert (plan.device, plan.precision, plan.compile) == ("cpu", "bfloat16", "off")
    assert (plan.threads, plan.pack_slots) == (3, 5)
    assert plan.dtype == torch.bfloat16
    assert plan.torch_version == torch.__version__
    assert Plan(**plan.as_dict()) == plan


def test_threads_are_those_that_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, threads in (("3", 3), ("", len(os.sched_getaffinity(0))), ("0", len(os.sched_getaffinity(0)))):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert resolve_plan(ComputeConfig("cpu", compile="off")).threads == threads


def test_far_more_threads_than_cores_are_refused_and_a_few_more_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert resolve_plan(ComputeConfig("cpu", compile="off", threads=8)).threads == 8
    with pytest.raises(StillroomError, match=r"compute\.threads is 9, but this machine has 2 cores"):
        resolve_plan(ComputeConfig("cpu", compile="off", threads=9))


@pytest.mark.parametrize(("flags", "precision"), [({"avx2"}, "float32"), ({"avx2", "avx512_bf16"}, "bfloat16")])
def test_precision_follows_what_the_processor_does_in_hardware(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], precision: str
) -> None:
    monkeypatch.setattr(compute, "_cpu_flags", lambda: flags)
    assert resolve_plan(ComputeConfig("cpu", compile="off")).precision == precision


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "compute.device is 'tpu', which this machine does not have; use one of: cpu"),
        ({"threads": 0}, "compute.threads is 0; give 1 or more"),
        ({"pack_slots": 0}, "compute.pack_slots is 0; give 1 or more"),
    ],
)
def test_what_the_machine_cannot_give_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StillroomError, match=message):
        resolve_plan(ComputeConfig(**settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(StillroomError, match=r"compute\.device is 'cuda:1'"):
        resolve_plan(ComputeConfig(device="cuda:1"))


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_without_a_compiler_everything_runs_eagerly_after_one_notice(
    monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    monkeypatch.setattr(compute.shutil, "which", lambda name: None)
    notices: list[str] = []
    plan = resolve_plan(ComputeConfig("cpu", compile=mode), notices.append)
    assert plan.compile == "off"
    (notice,) = notices
    assert "C++ compiler" in notice
    resolve_plan(ComputeConfig("cpu", compile="off"), notices.append)
    assert len(notices) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="CXX names no compiler there")
def test_a_compiler_that_the_environment_names_but_does_not_have_counts_as_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    notices: list[str] = []
    assert resolve_plan(ComputeConfig("cpu"), notices.append).compile == "off"
    assert "no-such-compiler" in notices[0]


def test_functions_are_compiled_where_that_is_asked_for_or_pays(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute.torch, "compile", lambda function, **_: "compiled")
    monkeypatch.setattr(compute.torch._dynamo, "reset", lambda: None)

    def work() -> None: ...

    def kinds(mode: str) -> list[bool]:
        own = Plan(**{**plan.as_dict(), "compile": mode})
        return [own.compiled(work, pays) == "compiled" for pays in (False, True)]

    assert kinds("auto") == [False, True]
    assert kinds("on") == [True, True]
    assert kinds("off") == [False, False]


def test_autocast_is_on_for_bfloat16_alone(plan: Plan) -> None:
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with plan.autocast():
        assert layer(x).dtype == torch.float32
    with Plan(**{**plan.as_dict(), "precision": "bfloat16"}).autocast():
        assert layer(x).dtype == torch.bfloat16


def test_strided_depthwise_layers_are_placed_in_float32_with_their_names_and_results() -> None:
    torch.manual_seed(0)
    strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
    plain = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    model = nn.Sequential(strided, plain)
    names, weight = list(model.state_dict()), strided.weight.detach().clone()
    plan = resolve_plan(ComputeConfig(device="cpu", precision="bfloat16", compile="off"))
    placed = plan.place(model)
    assert list(placed.state_dict()) == names
    x = torch.randn(4, 8, 8, 8).bfloat16()
    with plan.autocast():
        found, other = placed[0](x), placed[1](x)
    assert found.dtype == other.dtype == torch.bfloat16
    # One rounding, of the result: the weights are not rounded. The layer of stride 1 is autocast as ever.
    assert torch.equal(found, nn.functional.conv2d(x.float(), weight, stride=2, padding=1, groups=8).bfloat16())
    assert type(placed[1]) is nn.Conv2d


GIB = 2**30


def write_group(folder: Path, names: tuple[str, str, str], limit: object, used: int, cached: int) -> None:
    """A control group as the kernel shows it: the files of its limit and its use, and its statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\ninactive_anon 7\n")


V1, V2 = compute.GROUP_FILES["memory"][1:], compute.GROUP_FILES[""][1:]
NO_LIMIT = 9223372036854771712  # of version 1


@pytest.mark.parametrize(
    ("own", "groups", "free"),
    [
        ("0::/\n", {}, 64),  # the machine's
        ("0::/\n", {".": (V2, 16 * GIB, 15 * GIB, 0)}, 1),
        ("0::/\n", {".": (V2, 16 * GIB, 15 * GIB, 14 * GIB)}, 15),  # cached files make room
        ("0::/\n", {".": (V2, 2 * GIB, 3 * GIB, 0)}, 0),  # the limit was lowered
        ("0::/jobs/1/task\n", {"jobs": (V2, 9 * GIB, 0, 0), "jobs/1": (V2, 8 * GIB, GIB, 0),
                               "jobs/1/task": (V2, "max", GIB, 0)}, 7),
        ("0::/outside/1\n", {".": (V2, 5 * GIB, GIB, 0)}, 4),  # a path that a container does not see
        ("9:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/job\n",
         {"memory/job": (V1, 6 * GIB, 5 * GIB, 2 * GIB), "memory": (V1, NO_LIMIT, 0, 0), "job": (V2, 1, 1, 0)}, 3),
    ],
)  # fmt: skip
def test_free_memory_is_what_the_innermost_and_every_outer_group_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, groups: dict[str, Any], free: int
) -> None:
    monkeypatch.setattr(compute, "PROC", tmp_path / "proc")
    monkeypatch.setattr(compute, "GROUPS", tmp_path / "groups")
    assert compute._free_memory("cpu") is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 * GIB // 1024} kB\n")
    assert compute._free_memory("cpu") == 64 * GIB
    (tmp_path / "proc/self/cgroup").write_text(own)
    for name, facts in groups.items():
        write_group(tmp_path / "groups" / name, *facts)
    assert compute._free_memory("cpu") == free * GIB


def test_workers_of_one_machine_choose_chunks_by_their_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_free_memory", lambda device: 16 * GIB)
    for workers, chunk in ((1, 32), (4, 8), (10**6, 1)):
        config = ComputeConfig("cpu", workers_per_machine=workers)
        assert resolve_plan(config, slot=(1000, 224)).chunk_images == chunk
    with pytest.raises(StillroomError, match="workers_per_machine is 0; give 1 or more"):
        ComputeConfig(workers_per_machine=0)
