"""Replayed labels: dynamic ones, stored epoch by epoch, give the same batches; and what their storing costs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import TOY_CLASSES, build_toy_teacher
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_distilled import reseal

from stillroom import ReplayLoader, api, labels, logits, replay
from stillroom import files as files_module
from stillroom.compute import ComputeConfig, Plan
from stillroom.data import RealData
from stillroom.distilled import DistilledSet, count_bytes, load_distilled, verify_distilled
from stillroom.errors import StillroomError
from stillroom.files import sha256_bytes, tensor_pieces
from stillroom.labels import PoolConfig, attach_labels
from stillroom.logits import StoredLogits, count_logit_bytes, encode_logits
from stillroom.manifest import BatchSettings, LabelEncoding
from stillroom.methods import infer
from stillroom.methods.infer import InferConfig
from stillroom.pipeline import bound_settings, run_recipe
from stillroom.recipes import Recipe, smoke
from stillroom.run import Run
from stillroom.students import StudentConfig, build_draws, evaluate, soft_label_loss, train_student
from stillroom.teachers import Teacher
from stillroom.train import Epochs, TrainConfig

TRAIN = TrainConfig(
    epochs=9, batch_size=8, optimizer="adamw", learning_rate=1e-2, crop_padding=1, flip=False, mixup_beta=0.8
)
CUT = replace(TRAIN, mixup_beta=0.0, cutmix_beta=1.0)
CROPPED = replace(TRAIN, crop_padding=0, resized_crop=True, mixup_folded=True)


@pytest.fixture
def bare(toy: RealData, toy_teachers: list[Teacher], plan: Plan) -> DistilledSet:
    """8 naturals, 24 views, without labels: three steps an epoch."""
    return infer.distill(toy, toy_teachers, 4, InferConfig(steps=3), 0, plan, Run())


def replayed(
    bare: DistilledSet,
    teachers: list[Teacher],
    plan: Plan,
    run: Run | None = None,
    train: TrainConfig = TRAIN,
    **pool: Any,
) -> DistilledSet:
    return attach_labels(bare, "replayed", teachers, plan, run or Run(), pool=PoolConfig(**pool), train=train)


def train_losses(
    distilled: DistilledSet, teachers: list[Teacher], toynet: str, toy: RealData, plan: Plan, seed: int, steps: int = 10
) -> list[float]:
    config = StudentConfig(toynet, TRAIN)
    _, history = train_student(distilled, toy, config, TRAIN, steps, seed, teachers, plan, Run(), "unit")
    return [row["loss"] for row in history]


# ---- what is replayed


@pytest.mark.parametrize("train", [TRAIN, CUT, CROPPED, replace(CROPPED, shuffle_patches=2)])
def test_a_pool_of_as_many_epochs_as_a_training_has_gives_the_batches_of_dynamic_labels(
    bare: DistilledSet, toy_teachers: list[Teacher], plan: Plan, train: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit where labels are stored in float32; as stored, within the rounding of float16."""
    dynamic = build_draws(bare.with_labels(None, "dynamic"), train, toy_teachers, plan)
    rounded = replayed(bare, toy_teachers, plan, train=train, epochs=2)
    monkeypatch.setattr(logits, "FLOAT", torch.float32)
    exact = replayed(bare, toy_teachers, plan, train=train, epochs=2)
    epochs = Epochs(24, 8, 0, ("student",))  # a dynamic student of the pool's seed
    again = replay.replayed_epochs(exact, train)
    for step in range(6):
        epoch, within = divmod(step, 3)
        rows = epochs.rows(epoch)[within]
        assert torch.equal(rows, again.rows(epoch)[within])
        images, targets = dynamic(rows, epochs.generator(step))
        for made, expected in ((exact, targets), (rounded, targets.half().float())):
            with monkeypatch.context() as patch:
                patch.setattr(logits, "FLOAT", torch.float32 if made is exact else torch.float16)
                found = build_draws(made, train, [], plan)(rows, again.generator(step), step)
            assert torch.equal(found[0], images)
            assert torch.equal(found[1], expected)


def test_a_student_on_enough_replayed_epochs_is_the_dynamic_student(
    bare: DistilledSet, toy: RealData, toy_teachers: list[Teacher], plan: Plan, toynet: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dynamic = train_losses(bare.with_labels(None, "dynamic"), toy_teachers, toynet, toy, plan, seed=0)
    stored = train_losses(replayed(bare, toy_teachers, plan, epochs=4), [], toynet, toy, plan, seed=0)
    assert stored == pytest.approx(dynamic, rel=0.02)
    few = train_losses(replayed(bare, toy_teachers, plan, epochs=1), [], toynet, toy, plan, seed=0)
    assert few[0] == stored[0]
    assert few[1:] != stored[1:]
    monkeypatch.setattr(logits, "FLOAT", torch.float32)
    assert train_losses(replayed(bare, toy_teachers, plan, epochs=4), [], toynet, toy, plan, seed=0) == dynamic


def test_epochs_beyond_the_pool_take_its_epochs_in_turn_with_the_same_batches(
    bare: DistilledSet, toy: RealData, toy_teachers: list[Teacher], plan: Plan, toynet: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[tuple[torch.Tensor, ...]] = []
    pool = replayed(bare, toy_teachers, plan, epochs=2)
    build = build_draws(pool, TRAIN, [], plan)
    monkeypatch.setattr(
        "stillroom.students.build_draws", lambda *_, **__: lambda *a: seen.append(build(*a)) or seen[-1]
    )
    train_losses(pool, [], toynet, toy, plan, seed=5, steps=14)
    assert len(seen) == 14
    for step in range(14):
        assert all(torch.equal(a, b) for a, b in zip(seen[step], seen[step % 6], strict=True))
    assert not torch.equal(seen[0][0], seen[3][0])


def test_students_of_other_seeds_see_the_same_batches_and_begin_elsewhere(
    bare: DistilledSet, toy: RealData, toy_teachers: list[Teacher], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = replayed(bare, toy_teachers, plan, epochs=2, seed=7)
    seen: list[tuple[list[Any], float]] = []

    def record(model: torch.nn.Module, config: TrainConfig, epochs: Epochs, *_: object, **__: object) -> list[dict]:
        first = sum(parameter.double().abs().sum().item() for parameter in model.parameters())
        seen.append(([epochs.rows(1).tolist(), epochs.seed, epochs.period], first))
        return [{"top1": 0.5, "top5": 1.0, "seconds": 1.0}]

    monkeypatch.setattr("stillroom.students.fit", record)
    config = StudentConfig("convnet_thin", TRAIN)
    big = replace(toy, image_size=8)
    evaluate(pool, big, config, (0, 1), plan, Run())
    (draws, first), (same, other) = seen
    assert draws == same
    assert draws[1:] == [7, 2]
    assert first != other


def test_a_loader_replays_the_students_batches_in_a_loop_of_ones_own(
    bare: DistilledSet, toy: RealData, toy_teachers: list[Teacher], plan: Plan, toynet: str, tmp_path: Path
) -> None:
    """By hand, from the folder alone, in the README's way: the same losses as the student has."""
    from conftest import ToyNet

    from stillroom.compute import derive_seed
    from stillroom.train import build_optimizer, schedule_rate

    replayed(bare, toy_teachers, plan, epochs=2).save(tmp_path / "set")
    loader = ReplayLoader(load_distilled(tmp_path / "set"), temperature=30)
    assert len(loader) == 3
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(1, "student", toynet))
        model = ToyNet(torch.initial_seed()).train()
    optimizer, losses = build_optimizer(model, TRAIN), []
    for epoch in range(3):
        losses.append(0.0)
        for within, (images, soft_labels) in enumerate(loader):
            assert images.dtype == soft_labels.dtype == torch.float32
            for group in optimizer.param_groups:
                group["lr"] = schedule_rate(TRAIN, 3 * epoch + within, 9, 3)
            loss = torch.nn.functional.kl_div(model(images).div(30).log_softmax(1), soft_labels, reduction="batchmean")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1] += loss.item() / 3
    expected = train_losses(load_distilled(tmp_path / "set"), [], toynet, toy, plan, seed=1, steps=9)
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_a_loader_goes_to_any_epoch_and_on_from_there(
    bare: DistilledSet, toy_teachers: list[Teacher], plan: Plan
) -> None:
    pool = replayed(bare, toy_teachers, plan, epochs=2)
    loader = ReplayLoader(pool, temperature=4)
    passes = [list(loader) for _ in range(3)]
    assert torch.equal(passes[0][1][0], passes[2][1][0])
    assert not torch.equal(passes[0][1][0], passes[1][1][0])
    loader.set_epoch(7)
    assert torch.equal(next(iter(loader))[1], passes[1][0][1])
    assert loader.epoch == 8
    for bad in ({"temperature": 0.0}, {"epoch": -1}):
        with pytest.raises(StillroomError, match="give"):
            ReplayLoader(pool, **bad)
    with pytest.raises(StillroomError, match="label_kind is 'hard', so there are no labels to replay"):
        ReplayLoader(bare.with_labels(None))
    with pytest.raises(StillroomError, match=r"not to plain views: train on the batches of stillroom\.ReplayLoader"):
        pool.views()


# ---- refused


def test_a_student_with_other_batches_is_refused_with_the_fields_that_differ(
    bare: DistilledSet, toy: RealData, toy_teachers: list[Teacher], plan: Plan, toynet: str
) -> None:
    pool = replayed(bare, toy_teachers, plan, epochs=1)
    other = replace(TRAIN, batch_size=6, mixup_beta=0.0, cutmix_beta=1.0)
    words = "batch_size 6 here, 8 there; mixup_beta 0.0 here, 0.8 there; cutmix_beta 1.0 here, 0.0 there"
    with pytest.raises(StillroomError, match=words):
        evaluate(pool, toy, StudentConfig(toynet, other), (0,), plan, Run())
    # what does not decide batches is free
    evaluate(pool, toy, StudentConfig(toynet, replace(TRAIN, learning_rate=0.1)), (0,), plan, Run(), total_steps=1)


def test_every_setting_of_training_decides_batches_or_does_not() -> None:
    """A new setting must be put among one or the other, or labels would be replayed to batches of another."""
    free = {
        "epochs", "optimizer", "learning_rate", "weight_decay", "momentum", "nesterov", "schedule", "warmup_fraction",
        "decay_norms", "cosine_slowdown",
    }  # fmt: skip
    decide = {field.name for field in fields(BatchSettings)}
    assert decide | free == {field.name for field in fields(TrainConfig)}
    assert not decide & free


def test_a_machine_that_draws_otherwise_is_told_so(
    bare: DistilledSet, toy_teachers: list[Teacher], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = replayed(bare, toy_teachers, plan, epochs=1)
    ReplayLoader(pool)
    with monkeypatch.context() as patch:
        patch.setattr(replay, "SEED_SCHEME", 2)
        with pytest.raises(StillroomError, match=r"seed scheme 1 there, 2 here"):
            ReplayLoader(pool)
    drawn = replay.augment_images
    monkeypatch.setattr(replay, "augment_images", lambda i, c, f, g: drawn(i, c, f, (torch.rand(1, generator=g), g)[1]))
    with pytest.raises(StillroomError, match="this machine draws otherwise"):
        ReplayLoader(pool)


def test_draws_are_those_of_the_seed_scheme(bare: DistilledSet) -> None:
    """Where this fails, draws have changed: raise compute.SEED_SCHEME, or stored labels go with other images."""
    digests = [
        replay.fingerprint_draws(bare, train, Epochs(24, 8, 3, ("student",)))[:12]
        for train in (TRAIN, CUT, CROPPED, replace(CUT, shuffle_patches=3))
    ]
    assert digests == ["323bd6a047ef", "4b62eb53e373", "a4f0e4d28a93", "fa84bc63fcbb"]


def test_labels_stored_before_patches_could_be_shuffled_are_replayed_to_patches_as_they_are(
    bare: DistilledSet, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path
) -> None:
    made = replayed(bare, toy_teachers, plan, epochs=1)
    made.save(tmp_path / "set")
    obj = json.loads((tmp_path / "set" / "manifest.json").read_bytes())
    del obj["pool"]["batches"]["shuffle_patches"]
    (tmp_path / "set" / "manifest.json").write_bytes(reseal(obj))
    old = load_distilled(tmp_path / "set")
    assert old.manifest.pool == made.manifest.pool
    with pytest.raises(StillroomError, match="shuffle_patches 2 here, 1 there"):
        replay.replayed_epochs(old, replace(TRAIN, shuffle_patches=2))


def test_teachers_whose_logits_are_not_finite_are_refused_and_nothing_is_kept(
    bare: DistilledSet, plan: Plan, tmp_path: Path
) -> None:
    teacher = build_toy_teacher(4)
    for value in (1e6, float("nan")):
        teacher.model[-1].weight.data.fill_(value)
        with (
            Run(tmp_path / "run") as run,
            pytest.raises(StillroomError, match=r"replayed labels of 8 rows in epoch 0, step 0, are not finite"),
        ):
            replayed(bare, [teacher], plan, run)
        assert not list(tmp_path.glob("run/units/*"))


def test_replayed_labels_need_teachers_and_the_training_that_they_are_for(
    bare: DistilledSet, toy_teachers: list[Teacher], plan: Plan
) -> None:
    with pytest.raises(StillroomError, match="at least one teacher"):
        replayed(bare, [], plan)
    with pytest.raises(StillroomError, match="give its settings as train"):
        attach_labels(bare, "replayed", toy_teachers, plan, Run())
    with pytest.raises(StillroomError, match=r"pool\.epochs is 0"):
        PoolConfig(epochs=0)
    with pytest.raises(StillroomError, match=r"pool\.encoding is 'top9'"):
        PoolConfig(encoding="top9")  # type: ignore[arg-type]
    with pytest.raises(StillroomError, match="labels of 4 classes have no 4 largest"):
        replayed(bare, toy_teachers, plan, encoding="top4")


# ---- units


def test_a_pool_that_was_interrupted_goes_on_and_is_the_same_and_nothing_is_labelled_twice(
    bare: DistilledSet, toy_teachers: list[Teacher], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replayed(bare, toy_teachers, plan, epochs=3)
    labelled: list[tuple[int, int]] = []
    encode = labels.encode_batch

    def dying(found: torch.Tensor, encoding: LabelEncoding, epoch: int, within: int) -> StoredLogits:
        if (epoch, within) == (1, 1) and (1, 1) not in labelled:
            labelled.append((epoch, within))
            raise KeyboardInterrupt
        labelled.append((epoch, within))
        return encode(found, encoding, epoch, within)

    monkeypatch.setattr(labels, "encode_batch", dying)
    with Run(tmp_path / "run") as run, pytest.raises(KeyboardInterrupt):
        replayed(bare, toy_teachers, plan, run, epochs=2)
    with Run(tmp_path / "run") as run:
        replayed(bare, toy_teachers, plan, run, epochs=2)
        assert [row[0] for row in labelled] == [0] * 3 + [1] * 2 + [1] * 3
        larger = replayed(bare, toy_teachers, plan, run, epochs=3)
    assert [row[0] for row in labelled[8:]] == [2] * 3  # a larger pool goes on where the smaller one ended
    assert larger.manifest == whole.manifest
    assert larger.pool is not None
    assert whole.pool is not None
    assert torch.equal(larger.pool.tensors["logits"], whole.pool.tensors["logits"])
    with Run(tmp_path / "run") as run:  # but other teachers' labels are not taken for these
        replayed(bare, toy_teachers[:1], plan, run, epochs=1)
    assert len(labelled) == 14


# ---- encodings


ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(12)), elements=st.floats(-300, 300, width=32))


@given(rows=ROWS, scale=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]))
@settings(max_examples=60, deadline=None)
def test_encodings_err_by_no_more_than_they_say(rows: np.ndarray, scale: float) -> None:
    values = torch.from_numpy(rows * np.float32(scale))
    half = values.abs() * 2**-11 + 2**-25  # of float16: half a unit in the last place, or of the smallest subnormal
    assert bool(((encode_logits(values, "float16").decode() - values).abs() <= half).all())
    low, span = values.amin(1, keepdim=True), values.amax(1, keepdim=True) - values.amin(1, keepdim=True)
    bound = span / 510 + (low.abs() + span) * 2**-11 + 256 * 2**-25
    assert bool(((encode_logits(values, "uint8").decode() - values).abs() <= bound * (1 + 1e-4)).all())
    top = encode_logits(values, "top4")
    kept = top.tensors["classes"].long()
    found = top.decode()
    assert torch.equal(found.gather(1, kept), values.gather(1, kept).half().float())
    others = torch.ones_like(values, dtype=torch.bool).scatter(1, kept, False)
    assert bool((values.gather(1, kept).amin(1) >= values[others].view(-1, 8).amax(1)).all())
    assert bool((found[others].view(-1, 8) == found[others].view(-1, 8)[:, :1]).all())
    mean = values[others].view(-1, 8).double().mean(1)
    assert bool(((found[others].view(-1, 8)[:, 0] - mean).abs() <= 8 * half.amax(1) + 2**-20 * scale).all())
    again = encode_logits(found, "float16").decode()
    assert torch.equal(again, found)


@pytest.mark.parametrize("encoding", get_args(LabelEncoding))
@pytest.mark.parametrize("classes", [40, 300, 40_000])
def test_bytes_are_counted_before_as_after(encoding: LabelEncoding, classes: int) -> None:
    stored = encode_logits(torch.randn(2, 3, classes, generator=torch.Generator().manual_seed(0)), encoding)
    assert stored.raw_bytes == count_logit_bytes(6, classes, encoding)
    assert stored.shape == (2, 3, classes)
    assert torch.equal(stored.decode(1, 2), stored.decode()[1, 2])
    by_hand = {"float16": 2 * classes, "uint8": classes + 4}
    width = 1 if classes <= 256 else 2 if classes <= 2**15 else 4
    assert stored.raw_bytes == 6 * by_hand.get(encoding, int(encoding.removeprefix("top") or 0) * (2 + width) + 2
                                                if encoding.startswith("top") else 0)  # fmt: skip


def test_the_mean_of_the_other_logits_is_nearer_than_their_mass_where_students_soften() -> None:
    """By NumPy, of logits as a teacher of 100 classes may have them: a peak among normal numbers."""
    chance = np.random.default_rng(0)
    rows = chance.normal(0, 2.5, (400, 100))
    rows[np.arange(400), chance.integers(0, 100, 400)] += chance.uniform(2, 12, 400)
    found = encode_logits(torch.from_numpy(rows), "top8").decode().double().numpy()
    others = rows.argsort(1)[:, :-8]

    def with_mass_at(temperature: float) -> np.ndarray:
        kept = found.copy()
        softened = np.exp(np.take_along_axis(rows, others, 1) / temperature).mean(1, keepdims=True)
        np.put_along_axis(kept, others, np.broadcast_to(temperature * np.log(softened), others.shape), 1)
        return kept

    def divergence(kept: np.ndarray, temperature: float) -> float:
        return soft_label_loss(torch.from_numpy(kept), torch.from_numpy(rows), temperature).item()

    for temperature in (20, 30):
        assert divergence(found, temperature) < 0.96 * divergence(with_mass_at(1), temperature)
        assert divergence(found, temperature) < 1.001 * divergence(with_mass_at(temperature), temperature)
    assert divergence(with_mass_at(1), 1) < 0.6 * divergence(found, 1)  # the price of it, where nothing is softened
    eight = encode_logits(torch.from_numpy(rows), "uint8").decode().double().numpy()
    assert divergence(eight, 30) < divergence(found, 30) / 1000


# ---- the folder


@pytest.fixture
def wide(bare: DistilledSet, plan: Plan) -> DistilledSet:
    """A set of twelve classes, so that there are classes to leave out."""
    names = tuple(f"class {index}" for index in range(12))
    manifest = dataclasses.replace(bare.manifest, class_names=names)
    return dataclasses.replace(bare, labels=torch.arange(8), manifest=manifest)


def wide_pool(wide: DistilledSet, encoding: LabelEncoding, plan: Plan) -> DistilledSet:
    class Wide(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, ::16] * 3  # 192 numbers, every sixteenth: twelve classes

    teacher = Teacher("wide", Wide(), {"top1": 0.5, "top5": 0.5}, "c" * 64, "made for a test")
    return replayed(wide, [teacher], plan, epochs=2, encoding=encoding, train=CUT)


@pytest.mark.parametrize("encoding", ["float16", "uint8", "top4", "top8"])
def test_a_pool_is_loaded_bit_for_bit_and_counted(
    wide: DistilledSet, plan: Plan, tmp_path: Path, encoding: LabelEncoding
) -> None:
    pool = wide_pool(wide, encoding, plan)
    written = pool.save(tmp_path / "set")
    loaded = load_distilled(tmp_path / "set")
    assert verify_distilled(tmp_path / "set") == []
    assert loaded.manifest == written
    assert loaded.manifest.pool == pool.manifest.pool
    assert pool.pool is not None
    assert loaded.pool is not None
    assert pool.pool.tensors.keys() == loaded.pool.tensors.keys()
    for name, tensor in pool.pool.tensors.items():
        assert torch.equal(loaded.pool.tensors[name], tensor)
    assert loaded.pool.shape == (2, 3, 8, 12)
    budget = count_bytes(loaded)
    assert budget.raw["labels"] == count_logit_bytes(48, 12, encoding)
    file = next((tmp_path / "set").glob("labels-*"))
    assert budget.stored["labels"] == file.stat().st_size
    assert budget.raw_ratio == sum(budget.raw.values()) / budget.real_raw_bytes
    assert written.files["labels"].entries == 48
    relabelled = loaded.with_labels(None)
    assert relabelled.pool is relabelled.manifest.pool is None
    relabelled.save(tmp_path / "set")
    assert not list((tmp_path / "set").glob("labels-*"))
    assert "ReplayLoader" not in (tmp_path / "set" / "README.md").read_text()


def test_label_bytes_of_an_evaluation_are_those_stored(
    bare: DistilledSet, toy: RealData, toy_teachers: list[Teacher], plan: Plan, toynet: str
) -> None:
    config = StudentConfig(toynet, TRAIN, dynamic_epochs=1)
    for encoding, row in (("float16", 2 * TOY_CLASSES), ("uint8", TOY_CLASSES + 4)):
        result = evaluate(replayed(bare, toy_teachers, plan, encoding=encoding), toy, config, (0,), plan, Run())
        assert (result.labels, result.steps, result.label_bytes) == ("replayed", 3, 4 * 3 * 8 * row)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m.update(pool=None), "label_kind is 'replayed', but the facts of a pool of labels are absent"),
        (lambda m: m.pop("pool"), "label_kind is 'replayed', but the facts of a pool of labels are absent"),
        (lambda m: m.update(label_kind="static"), "but the facts of a pool of labels are there"),
        (lambda m: m["pool"].update(epochs=3), r"must hold top4 \[3, 3, 8, 12\]"),
        (lambda m: m["pool"].update(epochs=2**60), "must hold top4"),
        (lambda m: m["pool"].update(epochs=0), "pool.epochs is 0"),
        (lambda m: m["pool"].update(encoding="top8"), "values of the top8 logits are torch.float16"),
        (lambda m: m["pool"].update(encoding="uint8"), "uint8 logits have the tensors"),
        (lambda m: m["pool"].update(encoding="zip"), "pool.encoding is 'zip'"),
        (lambda m: m["pool"].update(batches=None), "pool.batches is None"),
        (lambda m: m["pool"]["batches"].update(batch_size=6), r"must hold top4 \[2, 4, 6, 12\]"),
        (lambda m: m["pool"]["batches"].update(batch_size=0), "pool.batches.batch_size is 0"),
        (lambda m: m["pool"]["batches"].update(crop_padding="1"), "pool.batches.crop_padding is '1'"),
        (lambda m: m["pool"]["batches"].update(shuffle_patches=0), "pool.batches.shuffle_patches is 0"),
        (lambda m: m["pool"]["batches"].update(resized_crop_scale=[1.0]), "needs two numbers"),
        (lambda m: m["pool"]["batches"].pop("cutmix_beta"), "pool.batches lacks cutmix_beta"),
        (lambda m: m["pool"].update(more=1), "pool has an unknown key 'more'"),
        (lambda m: m["files"].pop("labels"), "the pool of labels is absent"),
    ],
)
def test_a_manifest_whose_pool_no_save_writes_is_refused_by_key(
    wide: DistilledSet, plan: Plan, tmp_path: Path, edit: Any, words: str
) -> None:
    folder = tmp_path / "set"
    wide_pool(wide, "top4", plan).save(folder)
    obj = json.loads((folder / "manifest.json").read_bytes())
    edit(obj)
    (folder / "manifest.json").write_bytes(reseal(obj))
    with pytest.raises(StillroomError, match=words):
        load_distilled(folder)
    assert len(verify_distilled(folder)) == 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("classes", lambda t: t.flip(-1), "must ascend within 0 to 11"),
        ("classes", lambda t: t + 9, "must ascend within 0 to 11"),
        ("classes", lambda t: t.to(torch.int32), "classes of the top4 logits are torch.int32"),
        ("values", lambda t: t * float("nan"), "values of the top4 logits are not finite"),
        ("rest", lambda t: t[:1], "rest of the top4 logits are"),
        ("values", lambda t: t[..., 0], "must be"),
        ("values", lambda t: t[0, 0, 0, 0], "must be"),
    ],
)
def test_a_forged_file_of_labels_with_a_fitting_hash_is_refused(
    wide: DistilledSet, plan: Plan, tmp_path: Path, name: str, change: Any, words: str
) -> None:
    pool = wide_pool(wide, "top4", plan)
    folder = tmp_path / "set"
    pool.save(folder)
    assert pool.pool is not None
    tensors = pool.pool.tensors | {name: change(pool.pool.tensors[name])}
    content = b"".join(tensor_pieces(tensors, {}, "forged"))
    obj = json.loads((folder / "manifest.json").read_bytes())
    facts = obj["files"]["labels"]
    facts["bytes"], facts["sha256"] = len(content), sha256_bytes(content)
    facts["name"] = f"labels-{facts['sha256'][:12]}.safetensors"
    (folder / facts["name"]).write_bytes(content)
    (folder / "manifest.json").write_bytes(reseal(obj))
    with pytest.raises(StillroomError, match=words):
        load_distilled(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_changed_byte_of_a_set_with_a_pool_is_an_error_that_names_the_file(
    tmp_path_factory: pytest.TempPathFactory, pool_folder: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in pool_folder.iterdir())))
    folder = shutil.copytree(pool_folder, tmp_path_factory.mktemp("changed") / "set")
    content = bytearray((folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(StillroomError, match=name.replace(".", r"\.")):
        load_distilled(folder)


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import build_toy

    from stillroom.compute import ComputeConfig, resolve_plan
    from stillroom.methods.select import RandomConfig, distill_random

    plan = resolve_plan(ComputeConfig(device="cpu", precision="float32", compile="off", threads=1))
    random = distill_random(build_toy(), [], 4, RandomConfig(), 0, plan, Run())
    folder = tmp_path_factory.mktemp("pool") / "set"
    replayed(random, [build_toy_teacher(0)], plan, epochs=2, encoding="uint8").save(folder)
    return folder


def test_a_manifest_from_before_there_were_pools_is_read(bare: DistilledSet, tmp_path: Path) -> None:
    bare.with_labels(None).save(tmp_path)
    obj = json.loads((tmp_path / "manifest.json").read_bytes())
    assert obj.pop("pool") is None
    (tmp_path / "manifest.json").write_bytes(reseal(obj))
    assert load_distilled(tmp_path).manifest.pool is None
    assert verify_distilled(tmp_path) == []


def test_the_batches_of_a_pool_can_be_taken_over(bare: DistilledSet, toy_teachers: list[Teacher], plan: Plan) -> None:
    pool = replayed(bare, toy_teachers, plan, epochs=1, train=CUT)
    taken = replay.with_batches_of(TrainConfig(epochs=3, learning_rate=0.5), pool)
    assert asdict(replay.batch_settings(taken)) == asdict(replay.batch_settings(CUT))
    assert (taken.epochs, taken.learning_rate) == (3, 0.5)
    assert replay.with_batches_of(TRAIN, bare) is TRAIN


# ---- recipes, and the command line


@pytest.fixture
def pool_recipe(toy_recipe: Recipe) -> Recipe:
    student = replace(toy_recipe.student, dynamic_epochs=3)
    return replace(toy_recipe, labels=("replayed",), pool=PoolConfig(epochs=2, encoding="uint8"), student=student)


def timeless(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in cell.items() if k != "seconds"} for cell in results["cells"]]


class Killed(BaseException):
    """Ends the work where it stands: nothing catches it, nothing is saved on the way out."""


def test_a_run_with_replayed_labels_and_its_controls_killed_at_any_write_comes_to_the_same(
    pool_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Run(tmp_path / "whole") as run:
        whole = run_recipe(pool_recipe, run)
    rows = {(c["set"], c["labels"], c["budget"].split()[0]): c for c in whole["cells"]}
    own = rows["infer", "replayed", "own"]
    assert (own["steps"], own["label_bytes"]) == (9, 2 * 24 * (4 + 4))  # three epochs trained, two stored
    assert rows["random", "replayed", "equal"]["label_bytes"] == 2 * 16 * (4 + 4)
    assert ("naturals", "replayed", "equal") in rows
    assert load_distilled(tmp_path / "whole" / "distilled").manifest.pool is not None
    assert whole["bytes"]["raw"]["labels"] == 2 * 24 * 8

    replace_file, writes = files_module.os.replace, iter(range(10**6))

    def replace_or_die(source: Path, target: Path) -> None:
        if next(writes) % 11 == 9:
            raise Killed
        replace_file(source, target)

    monkeypatch.setattr(files_module.os, "replace", replace_or_die)
    kills = 0
    while True:
        with Run(tmp_path / "run") as run:
            try:
                results = run_recipe(pool_recipe, run)
                break
            except Killed:
                kills += 1
    assert kills >= 3
    assert timeless(results) == timeless(whole)
    for path in (tmp_path / "whole" / "distilled").iterdir():
        assert (tmp_path / "run" / "distilled" / path.name).read_bytes() == path.read_bytes()
    monkeypatch.setattr(files_module.os, "replace", replace_file)
    monkeypatch.setattr(labels, "encode_batch", lambda *_: pytest.fail("labelled again"))
    with Run(tmp_path / "run") as run:
        assert timeless(run_recipe(replace(pool_recipe, seeds=(0, 1, 2)), run)) != timeless(whole)


def test_a_run_is_bound_to_its_pool_only_where_labels_are_replayed(toy_recipe: Recipe, toy: RealData) -> None:
    assert "pool" not in bound_settings(asdict(toy_recipe), toy)
    replayed = replace(toy_recipe, labels=("hard", "replayed"))
    assert bound_settings(asdict(replayed), toy)["pool"] == asdict(PoolConfig())


def test_a_recipe_whose_encoding_has_too_few_classes_is_refused_before_any_work(
    pool_recipe: Recipe, own_cache: Path
) -> None:
    wrong = replace(pool_recipe, pool=PoolConfig(encoding="top8"))
    with pytest.raises(StillroomError, match=r"labels of 4 classes have no 8 largest.*--pool\.encoding"):
        run_recipe(wrong, Run())
    assert not list(own_cache.iterdir())
    assert smoke(wrong).pool == PoolConfig(epochs=2)


def test_the_six_line_way_distils_with_replayed_labels_and_trains_on_their_batches(
    toy: RealData, toy_teachers: list[Teacher], toynet: str
) -> None:
    made = api.distill(
        "random", toy, toy_teachers, ipc=4, labels="replayed", pool=PoolConfig(epochs=1), train=CUT,
        compute=ComputeConfig("cpu", "float32", "off", 1),
    )  # fmt: skip
    assert made.manifest.pool is not None
    assert made.manifest.pool.batches.cutmix_beta == 1.0
    result = api.evaluate(made, toy, toynet, seeds=1, epochs=1, compute=ComputeConfig("cpu", "float32", "off", 1))
    assert (result.labels, result.steps) == ("replayed", 2)
