"""Teachers: cached by everything that made them, measured, refused near chance, and read from files without risk."""

from __future__ import annotations

import errno
import fcntl
import json
import pickle
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import scipy.stats
import torch
from conftest import TOY_CLASSES, ToyNet, draw_toy_colours, stopping_again_and_again
from PIL import Image

from stillroom import teachers as teachers_module
from stillroom.compute import Plan
from stillroom.data import DataConfig, LazyImages, MemoryImages, RealData, load_real
from stillroom.errors import StillroomError, TimeLimitReached
from stillroom.files import cache_root
from stillroom.run import Run
from stillroom.teachers import (
    STUDENT_SETTINGS,
    TEACHER_RECIPES,
    TeachersConfig,
    cache_entry,
    chance_of_guessing,
    check_above_chance,
    empty_cache,
    hash_weights,
    list_cache,
    load_checkpoint,
    load_teachers,
    teacher_key,
)
from stillroom.train import TrainConfig, apply_normalization, measure_accuracy

QUICK = TeachersConfig(("toynet",), recipe="fast", epochs=3, batch_size=16, learning_rate=0.05)


@pytest.fixture
def trained(toy: RealData, tmp_path: Path) -> ToyNet:
    """A network that knows the toy world, as a user might bring it: its accuracy is far from chance."""
    net = ToyNet(0)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    images = apply_normalization(toy.train.images, toy.mean, toy.std)
    for _ in range(15):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), toy.train.labels).backward()
        optimizer.step()
    return net


def refuse_to_train(*_: object, **__: object) -> None:
    pytest.fail("trained again")


def test_a_teacher_is_trained_once_measured_frozen_and_then_read_from_the_cache(
    toy: RealData, plan: Plan, toynet: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Run(tmp_path / "run") as run:
        (first,) = load_teachers(toy, QUICK, plan, run)
    assert first.accuracy["top1"] > 0.6
    assert first.accuracy == measure_accuracy(first.model, toy.test, toy.mean, toy.std, plan)
    assert not first.model.training
    assert not any(p.requires_grad for p in first.model.parameters())
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (told,) = [e for e in events if e["event"] == "teacher"]
    assert (told["name"], told["accuracy"], told["hash"]) == ("toynet", first.accuracy, first.hash)
    monkeypatch.setattr(teachers_module, "fit", refuse_to_train)
    (second,) = load_teachers(toy, QUICK, plan, Run())
    assert second.facts() == first.facts()
    (scaled,) = load_teachers(
        toy, replace(QUICK, equal_norms=True), plan, Run()
    )  # the same teacher, labelling otherwise
    assert (first.equal_norms, scaled.equal_norms, scaled.hash) == (False, True, first.hash)
    assert hash_weights(second.model) == hash_weights(first.model) == first.hash


@pytest.mark.parametrize("change", [{"processes": 2}, {"torch_version": "9.9"}])
def test_a_run_goes_on_with_the_teachers_that_it_began_with_where_bits_would_now_be_others(
    toy: RealData, plan: Plan, toynet: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any]
) -> None:
    other = replace(plan, **change)
    assert cache_entry("toynet", toy, QUICK, plan) != cache_entry("toynet", toy, QUICK, other)
    with Run(tmp_path / "run") as run:
        (first,) = load_teachers(toy, QUICK, plan, run)
    monkeypatch.setattr(teachers_module, "fit", refuse_to_train)
    with Run(tmp_path / "run") as run:
        (again,) = load_teachers(toy, QUICK, other, run)
    assert again.hash == first.hash
    with pytest.raises(pytest.fail.Exception, match="trained again"), Run(tmp_path / "new") as run:
        load_teachers(toy, QUICK, other, run)


def test_few_images_are_trained_on_for_the_least_steps(toy: RealData, plan: Plan, toynet: str) -> None:
    """96 images in batches of 16 are 6 steps an epoch."""
    config = replace(QUICK, epochs=2, batch_size=16)
    for least, steps in ((0, 12), (12, 12), (20, 20)):
        run = Run()
        history = teachers_module.train_teacher(
            ToyNet(0), toynet, toy, replace(config, least_steps=least), plan, run, run.checkpoint("unit")
        )
        assert history[-1]["step"] == replace(config, least_steps=least).steps_for(len(toy.train)) == steps
    with pytest.raises(StillroomError, match=r"teachers\.least_steps is -1; give 0 or more"):
        replace(config, least_steps=-1)


def test_the_cache_key_changes_with_each_thing_that_decides_the_weights(toy: RealData, plan: Plan) -> None:
    pixels = toy.train.images.clone()
    pixels[0, 0, 0, 0] ^= 1
    data = [
        replace(toy, train=MemoryImages(pixels, toy.train.labels)),
        replace(toy, train=MemoryImages(toy.train.images, toy.train.labels.roll(1))),
        replace(toy, class_names=("a", *toy.class_names[1:])),
        replace(toy, mean=(0.1, *toy.mean[1:])),
        replace(toy, std=(0.1, *toy.std[1:])),
        replace(toy, flip=True),
        replace(toy, image_size=16),
    ]
    settings = [
        replace(QUICK, recipe="field"),
        replace(QUICK, epochs=4),
        replace(QUICK, batch_size=8),
        replace(QUICK, learning_rate=0.1),
        replace(QUICK, seed=1),
        replace(QUICK, least_steps=99),
    ]
    plans = [replace(plan, threads=2), replace(plan, precision="bfloat16"), replace(plan, torch_version="0")]
    plans += [replace(plan, processor="abacus"), replace(plan, seed_scheme=2), replace(plan, compile="on")]
    entries = [cache_entry("toynet", toy, QUICK, plan), cache_entry("convnet", toy, QUICK, plan)]
    entries += [cache_entry("toynet", real, QUICK, plan) for real in data]
    entries += [cache_entry("toynet", toy, config, plan) for config in settings]
    entries += [cache_entry("toynet", toy, QUICK, other) for other in plans]
    assert len(set(entries)) == 2 + len(data) + len(settings) + len(plans)


def test_the_cache_key_leaves_out_settings_of_training_that_only_students_have(toy: RealData, plan: Plan) -> None:
    """What came after teachers were first cached; none of them may be trained again for it."""
    plain = TrainConfig()
    for recipe in TEACHER_RECIPES.values():
        assert all(getattr(recipe, name) == getattr(plain, name) for name in STUDENT_SETTINGS)
    train = teacher_key("toynet", toy, QUICK, plan)["train"]
    assert train.keys() == {field.name for field in fields(TrainConfig)} - set(STUDENT_SETTINGS)


def test_a_lock_in_the_cache_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(StillroomError, match="lock is a symbolic link"):
        teachers_module._try_lock(tmp_path, alone=True)
    assert not (tmp_path / "mine").exists()


def test_the_cache_key_does_not_change_with_what_leaves_the_weights_alone(toy: RealData, plan: Plan) -> None:
    entry = cache_entry("toynet", toy, QUICK, plan)
    assert cache_entry("toynet", toy, QUICK, replace(plan, pack_slots=9, chunk_images=5)) == entry
    cards = [cache_entry("toynet", toy, QUICK, replace(plan, device=name)) for name in ("cuda", "cuda:0", "cuda:1")]
    assert len(set(cards)) == 1  # the plan's processor names the kind of card
    assert cache_entry("toynet", toy, replace(QUICK, networks=("toynet", "convnet"), equal_norms=True), plan) == entry
    same = replace(toy, train=MemoryImages(toy.train.images.clone(), toy.train.labels.clone()))
    assert cache_entry("toynet", same, QUICK, plan) == entry
    assert json.dumps(teacher_key("toynet", toy, QUICK, plan))  # it is kept as JSON beside the weights


def test_a_cache_that_is_named_wins_over_the_environment_which_wins_over_the_default(
    toy: RealData, plan: Plan, toynet: str, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_root(str(tmp_path)) == tmp_path
    assert cache_root(None) == own_cache
    load_teachers(toy, replace(QUICK, cache=str(tmp_path)), plan, Run())
    assert len(list_cache(str(tmp_path))) == 1
    assert list_cache() == []
    assert cache_root("~/mine") == Path.home() / "mine"
    monkeypatch.setenv("STILLROOM_CACHE", "")
    assert cache_root(None) == Path.home() / ".cache" / "stillroom"
    monkeypatch.delenv("STILLROOM_CACHE")
    assert cache_root(None) == Path.home() / ".cache" / "stillroom"


def test_an_interrupted_training_goes_on_from_the_cache_in_another_run(
    toy: RealData, plan: Plan, toynet: str, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    (whole,) = load_teachers(toy, QUICK, plan, Run())
    empty_cache()
    with pytest.raises(TimeLimitReached):
        load_teachers(toy, QUICK, plan, Run(time_limit=0.0))
    ((entry, _, text),) = list_cache()
    assert text == "unfinished"
    checkpoint = entry / "checkpoint.safetensors"
    assert checkpoint.exists()
    (resumed,) = load_teachers(toy, QUICK, plan, Run())
    assert resumed.facts() == whole.facts()
    assert not checkpoint.exists()


def test_images_that_are_decoded_by_the_batch_are_drawn_ahead_and_make_the_same_teacher_however_often_it_is_stopped(
    plan: Plan, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, per_class, seed in (("train", 24, 1), ("test", 10, 2)):
        for index, (image, label) in enumerate(zip(*draw_toy_colours(per_class, seed), strict=True)):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index}.png")
    held = load_real(DataConfig(str(tmp_path / "images")))
    lazy = load_real(DataConfig(str(tmp_path / "images"), memory_limit_gib=0))
    (of_held,) = load_teachers(held, replace(QUICK, cache=str(tmp_path / "held")), plan, Run())

    drawn_by: set[str] = set()
    decode = LazyImages.batch

    def batch(images: LazyImages, indices: torch.Tensor) -> torch.Tensor:
        drawn_by.add(threading.current_thread().name)
        return decode(images, indices)

    monkeypatch.setattr(LazyImages, "batch", batch)
    config = replace(QUICK, cache=str(tmp_path / "lazy"))
    assert not cache_entry("toynet", lazy, config, plan).exists()
    (of_lazy,), stops = stopping_again_and_again(tmp_path / "run", lambda run: load_teachers(lazy, config, plan, run))
    assert stops >= 2
    assert any(name.startswith("draws") for name in drawn_by)
    assert of_lazy.facts() == of_held.facts()


def test_a_teacher_near_chance_stops_the_run_and_names_three_things_to_check(
    toy: RealData, plan: Plan, toynet: str
) -> None:
    shuffled = replace(toy, test=MemoryImages(toy.test.images, (toy.test.labels + 1) % TOY_CLASSES))
    with pytest.raises(StillroomError, match="near chance") as refusal:
        load_teachers(shuffled, QUICK, plan, Run())
    for suspect in ("order of the labels", "normalisation", "architecture", "north west", "'toynet'", "'toy'"):
        assert suspect in str(refusal.value)


def test_chance_of_guessing_is_the_tail_of_the_binomial_distribution() -> None:
    for right, count, chance in ((0, 5, 0.5), (3, 8, 0.25), (8, 8, 0.5), (130, 10_000, 0.01), (9_999, 10_000, 0.5)):
        expected = scipy.stats.binom.sf(right - 1, count, chance)
        assert chance_of_guessing(right, count, chance) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_near_chance_means_what_guessing_reaches_in_one_of_fifty_tries(toy: RealData) -> None:
    """Of 40 test images in 4 classes guessing gets 16 or more in 2.6 % of tries and 17 or more in 1.2 %."""
    for right, stops in ((16, True), (17, False)):
        teacher = teachers_module.Teacher("t", ToyNet(0), {"top1": right / 40, "top5": 1.0}, "", "")
        if stops:
            with pytest.raises(StillroomError, match="right on 16 of 40 test images"):
                check_above_chance(teacher, toy)
        else:
            check_above_chance(teacher, toy)


def test_a_test_split_too_small_to_tell_lets_every_teacher_pass(toy: RealData) -> None:
    two = replace(toy, test=MemoryImages(toy.test.images[:2], toy.test.labels[:2]))
    check_above_chance(teachers_module.Teacher("t", ToyNet(0), {"top1": 0.0, "top5": 1.0}, "", ""), two)


def save_plain(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path)


def save_nested(state: dict[str, Any], path: Path) -> None:
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 200, "best": 0.7}, path)


def save_safely(state: dict[str, Any], path: Path) -> None:
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)


@pytest.mark.parametrize(
    ("save", "name"), [(save_plain, "net.pt"), (save_nested, "net.pth.tar"), (save_safely, "net.safetensors")]
)
def test_weights_of_the_users_own_are_taken_from_every_common_kind_of_file(
    toy: RealData, plan: Plan, toynet: str, trained: ToyNet, tmp_path: Path, save: Any, name: str
) -> None:
    save(trained.state_dict(), tmp_path / name)
    config = replace(QUICK, checkpoints=(f"toynet={tmp_path / name}",))
    (teacher,) = load_teachers(toy, config, plan, Run())
    assert teacher.hash == hash_weights(trained)
    assert teacher.source == f"file {name}"
    assert teacher.accuracy["top1"] > 0.8
    assert list_cache() == []


def test_weights_that_do_not_fit_are_refused_with_every_key_that_is_wrong(
    toy: RealData, toynet: str, tmp_path: Path
) -> None:
    state = ToyNet(0).state_dict()
    del state["0.weight"]
    state["stem.weight"] = torch.zeros(1)
    state["7.bias"] = torch.zeros(10)
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(StillroomError, match="does not fit toynet for 4 classes at 8 px") as refusal:
        load_checkpoint("toynet", tmp_path / "net.pt", toy)
    for line in ("missing 0.weight", "unexpected stem.weight", "7.bias is [10], the network's [4]"):
        assert line in str(refusal.value)


class Payload:
    """Pickled, it writes a file as soon as it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_file_with_code_is_refused_and_its_code_never_runs(
    toy: RealData, toynet: str, tmp_path: Path, form: str
) -> None:
    path, harm = tmp_path / "net.pt", tmp_path / "harm"
    content = {"state_dict": ToyNet(0).state_dict(), "extra": Payload(harm)}
    torch.save(content, path) if form == "torch" else path.write_bytes(pickle.dumps(Payload(harm)))
    with pytest.raises(StillroomError, match=r"cannot be read as weights.*save the network's state_dict alone"):
        load_checkpoint("toynet", path, toy)
    assert not harm.exists()
    torch.load(path, weights_only=False) if form == "torch" else pickle.loads(path.read_bytes())
    assert harm.exists()  # the payload was live


def test_files_that_hold_no_weights_are_refused(toy: RealData, toynet: str, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": "text"}, tmp_path / "text.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    for name, message in (
        ("list.pt", "holds no state_dict"),
        ("text.pt", "holds no state_dict"),
        ("cut.pt", "cannot be read as weights"),
        ("cut.safetensors", "not a whole safetensors file"),
        ("missing.pt", "cannot be read as weights"),
    ):
        with pytest.raises(StillroomError, match=message):
            load_checkpoint("toynet", tmp_path / name, toy)


def test_weights_with_nan_are_refused_and_named(toy: RealData, toynet: str, tmp_path: Path) -> None:
    state = ToyNet(0).state_dict()
    state["3.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(StillroomError, match=r"values that are not finite in 3\.weight"):
        load_checkpoint("toynet", tmp_path / "net.pt", toy)


@pytest.mark.parametrize("text", ["net.pt", "resnet18=net.pt"])
def test_a_checkpoint_for_no_configured_network_is_refused(toy: RealData, plan: Plan, toynet: str, text: str) -> None:
    with pytest.raises(StillroomError, match=f"teachers.checkpoints has '{text}'; give NETWORK=FILE .*toynet"):
        load_teachers(toy, replace(QUICK, checkpoints=(text,)), plan, Run())


def test_a_checkpoint_that_is_not_there_is_refused_before_any_teacher_is_trained(
    toy: RealData, plan: Plan, toynet: str, own_cache: Path
) -> None:
    config = replace(QUICK, networks=("toynet", "convnet_thin"), checkpoints=("convnet_thin=gone.pt",))
    with pytest.raises(StillroomError, match=r"'convnet_thin=gone\.pt', but 'gone\.pt' is not a file"):
        load_teachers(toy, config, plan, Run())
    assert not list(own_cache.iterdir())


def test_networks_named_twice_or_not_at_all_are_refused(toy: RealData, plan: Plan, toynet: str) -> None:
    with pytest.raises(StillroomError, match="names 'toynet' twice"):
        load_teachers(toy, replace(QUICK, networks=("toynet", "toynet")), plan, Run())
    with pytest.raises(StillroomError, match=r"teachers\.networks is empty"):
        load_teachers(toy, replace(QUICK, networks=()), plan, Run())


def test_imagenet_weights_are_refused_for_other_classes(toy: RealData, plan: Plan) -> None:
    config = TeachersConfig(("resnet18",), source="imagenet")
    with pytest.raises(StillroomError, match="know 1000 classes, but 'toy' has 4"):
        load_teachers(toy, config, plan, Run())


def test_a_cache_that_can_only_be_read_gives_its_finished_teachers_and_refuses_to_train_or_delete(
    toy: RealData, plan: Plan, toynet: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made,) = load_teachers(toy, QUICK, plan, Run())

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(teachers_module, "open", read_only, raising=False)
    monkeypatch.setattr(Path, "rename", read_only)
    (teacher,) = load_teachers(toy, QUICK, plan, Run())
    assert teacher.hash == made.hash
    message = rf"cache {own_cache}.* cannot be written \(Read-only file system\); name another by --teachers.cache"
    with pytest.raises(StillroomError, match=message):
        load_teachers(toy, replace(QUICK, seed=1), plan, Run())
    with pytest.raises(StillroomError, match=message):
        empty_cache()


def test_a_damaged_cache_entry_is_refused_with_the_folder_to_delete(toy: RealData, plan: Plan, toynet: str) -> None:
    load_teachers(toy, QUICK, plan, Run())
    ((entry, _, _),) = list_cache()
    tensors = safetensors.torch.load_file(entry / "weights.safetensors")
    tensors["0.weight"][0, 0, 0, 0] += 1
    safetensors.torch.save_file(tensors, entry / "weights.safetensors")
    with pytest.raises(StillroomError, match=r"is damaged .*delete that folder") as refusal:
        load_teachers(toy, QUICK, plan, Run())
    assert str(entry) in str(refusal.value)
    (entry / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(StillroomError, match="not a whole safetensors file"):
        load_teachers(toy, QUICK, plan, Run())


def test_the_cache_is_listed_with_sizes_and_emptied(toy: RealData, plan: Plan, toynet: str, own_cache: Path) -> None:
    assert list_cache() == []
    (teacher,) = load_teachers(toy, QUICK, plan, Run())
    ((entry, size, text),) = list_cache()
    assert entry.parent == own_cache / "teachers"
    assert size == sum(f.stat().st_size for f in entry.iterdir())
    assert size > 4 * sum(p.numel() for p in teacher.model.parameters())
    assert text == f"top-1 {teacher.accuracy['top1']:.1%}"
    empty_cache()
    assert list_cache() == []


def test_a_teacher_that_another_process_is_training_outlasts_the_emptying_of_the_cache(own_cache: Path) -> None:
    idle, busy, late = entries = [own_cache / "teachers" / name for name in ("idle", "in training", "late")]
    for entry in entries:
        entry.mkdir(parents=True)
        (entry / "checkpoint.safetensors").write_bytes(b"half")
    with teachers_module._entry_lock(busy, Run()):
        assert empty_cache() == ([idle, late], [busy])
        assert list((own_cache / "teachers").iterdir()) == [busy]
        assert (busy / "checkpoint.safetensors").read_bytes() == b"half"
    assert empty_cache() == ([busy], [])
    assert not list((own_cache / "teachers").iterdir())


def test_the_cache_is_listed_while_a_file_of_it_is_replaced(own_cache: Path) -> None:
    entry = own_cache / "teachers" / "toynet"
    entry.mkdir(parents=True)
    (entry / "checkpoint.safetensors").write_bytes(b"123")
    (entry / ".checkpoint.safetensors.tmp").symlink_to("gone")
    assert list_cache() == [(entry, 3, "unfinished")]


def test_a_lock_whose_folder_was_deleted_while_it_was_taken_is_taken_again(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, take, deletions = own_cache / "teachers" / "toynet", fcntl.flock, iter(range(2))

    def take_late(lock: Any, how: int) -> None:
        if next(deletions, None) is not None:
            (entry / ".lock").unlink()
            entry.rmdir()
        take(lock, how)

    monkeypatch.setattr(fcntl, "flock", take_late)
    with teachers_module._entry_lock(entry, Run()):
        assert teachers_module._try_lock(entry, alone=True) is None
    lock = teachers_module._try_lock(entry, alone=True)
    assert lock is not None
    with lock:
        assert teachers_module._try_lock(entry, alone=True) is None


def test_several_may_load_a_finished_teacher_at_once_while_nobody_deletes_it(own_cache: Path) -> None:
    entry = own_cache / "teachers" / "toynet"
    with teachers_module._entry_lock(entry, Run(), wait=False) as first:
        with teachers_module._entry_lock(entry, Run(), wait=False) as second:
            assert (first, second) == (True, False)  # one of them trains it
        (entry / "teacher.json").write_text("{}")
    with (
        teachers_module._entry_lock(entry, Run(), wait=False) as first,
        teachers_module._entry_lock(entry, Run(), wait=False) as second,
    ):
        assert first
        assert second
        assert empty_cache() == ([], [entry])
    assert empty_cache() == ([entry], [])


# The same teacher as the test's, wanted by another process.
ANOTHER_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from conftest import NETWORKS, TOYNET_ROW, Plan, TeachersConfig, build_toy
from stillroom.run import Run
from stillroom.teachers import load_teachers
NETWORKS["toynet"] = TOYNET_ROW
(teacher,) = load_teachers(build_toy(), {config!r}, {plan!r}, Run(Path({run!r})))
print(teacher.hash)
"""


def test_two_processes_that_want_the_same_teacher_train_it_once(
    toy: RealData, plan: Plan, toynet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ANOTHER_PROCESS.format(
        tests=str(Path(__file__).parent), config=QUICK, plan=plan, run=str(tmp_path / "other")
    )
    others, fit = [], teachers_module.fit

    def fit_while_another_process_waits(*args: Any, **options: Any) -> Any:
        other = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        others.append(other)
        assert other.stderr is not None
        assert other.stderr.readline().startswith("waiting for another process that trains teacher toynet-toy-")
        return fit(*args, **options)

    monkeypatch.setattr(teachers_module, "fit", fit_while_another_process_waits)
    (teacher,) = load_teachers(toy, QUICK, plan, Run())
    (other,) = others
    assert other.communicate() == (f"{teacher.hash}\n", "")
    events = [json.loads(line)["event"] for line in (tmp_path / "other" / "events.jsonl").read_text().splitlines()]
    assert events == ["notice", "teacher"]  # no epoch: nothing was trained there


def test_the_hash_of_weights_sees_names_shapes_types_and_every_buffer() -> None:
    hashes = {hash_weights(ToyNet(0))}
    for name, value in ToyNet(0).state_dict().items():
        net = ToyNet(0)
        net.state_dict()[name].view(-1)[-1] += 1
        assert value.shape == net.state_dict()[name].shape
        hashes.add(hash_weights(net))
    hashes.add(hash_weights(ToyNet(0).double()))
    assert len(hashes) == 2 + len(ToyNet(0).state_dict())
    assert hash_weights(ToyNet(0).to(memory_format=torch.channels_last)) == hash_weights(ToyNet(0))


def test_a_cached_teacher_whose_facts_were_damaged_is_refused(toy: RealData, plan: Plan, toynet: str) -> None:
    load_teachers(toy, QUICK, plan, Run())
    ((entry, _, _),) = list_cache()
    path = entry / "teacher.json"
    path.write_text(path.read_text().replace('"top1"', '"top2"'))
    with pytest.raises(StillroomError, match="damaged or edited"):
        load_teachers(toy, QUICK, plan, Run())
