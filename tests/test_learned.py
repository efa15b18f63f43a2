"""What bi-level and kernel methods learn, by a toy method: pixels beyond [0, 1], labels, a learning rate."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TOY_CLASSES, TOY_SIZE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from stillroom import compare, grid, students, teachers
from stillroom.compute import Plan
from stillroom.data import RealData, load_real
from stillroom.distilled import DistilledSet, count_bytes, load_distilled, verify_distilled
from stillroom.errors import StillroomError
from stillroom.estimate import estimate_recipe
from stillroom.export import export_set
from stillroom.files import sha256_bytes
from stillroom.grid import Grid, comparison_of
from stillroom.labels import attach_labels
from stillroom.manifest import SEAL_KEY, ViewSettings
from stillroom.methods import METHODS, Method
from stillroom.methods.select import Content, RandomConfig, describe_set, distill_random
from stillroom.pipeline import check_recipe, run_recipe
from stillroom.recipes import Recipe
from stillroom.run import Run
from stillroom.students import StudentConfig, build_draws, evaluate
from stillroom.tables import show_budget
from stillroom.teachers import Teacher
from stillroom.train import TrainConfig

RATE = 0.03
UNCUT = ViewSettings(clip=False)
TRAIN = TrainConfig(epochs=2, batch_size=8, optimizer="adamw", learning_rate=1e-2, crop_padding=0, flip=False)


@dataclass(frozen=True)
class BoldConfig:
    """A toy: real images with twice their contrast, and labels that say how sure of each class it is."""

    contrast: float = 2.0


def distill_bold(
    real: RealData, teachers: list[Teacher], ipc: int, config: BoldConfig, seed: int, plan: Plan, run: Run
) -> DistilledSet:
    made = distill_random(real, teachers, ipc, RandomConfig(), seed, plan, run)
    images = ((made.images.float() / 255 - 0.5) * config.contrast + 0.5).half()
    noise = torch.randn(len(images), real.classes, generator=torch.Generator().manual_seed(seed))
    logits = (8 * torch.nn.functional.one_hot(made.labels, real.classes) + noise).half()
    manifest = describe_set("bold", dataclasses.asdict(config), real, ipc, seed, teachers, UNCUT)
    learned = {"image_encoding": "float16", "label_kind": "learned", "extra": {"learning_rate": RATE}}
    return DistilledSet(images, made.labels, made.slots, None, logits, replace(manifest, **learned))


def bold_content(real: RealData, teachers: int, ipc: int, config: BoldConfig) -> Content:
    return Content(ipc * real.classes, 0, 0, ipc * real.classes, image_bits=16, learned_labels=True)


@pytest.fixture
def bold_recipe(toy_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    row = Method(BoldConfig, distill_bold, METHODS["random"].check, bold_content, needs_teachers=False)
    monkeypatch.setitem(METHODS, "bold", row)
    return replace(toy_recipe, method="bold", labels=("learned",), seeds=(0,))  # type: ignore[arg-type]


def test_an_encoding_that_would_cut_the_pixels_is_refused_before_any_work(bold_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(bold_recipe, image_encoding="jpeg95")
    with pytest.raises(StillroomError, match="image_encoding is 'jpeg95', but 'bold' makes pixels of 16 bits"):
        check_recipe(recipe, load_real(recipe.data))


@pytest.fixture
def bold(toy: RealData, plan: Plan) -> DistilledSet:
    return distill_bold(toy, [], 2, BoldConfig(), 0, plan, Run())


def bits(tensor: Tensor | None) -> bytes:
    assert tensor is not None
    return tensor.numpy().tobytes()


# ---- the artifact


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_finite_pixels_labels_and_rate_are_loaded_bit_for_bit(
    bold: DistilledSet, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Subnormal numbers, minus zero and the largest ones among them, at any size of image."""
    height, width, count = (data.draw(st.integers(1, 5)) for _ in range(3))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))

    def halves(*shape: int) -> Tensor:
        codes = draw.integers(0, 2**16, shape).astype(np.uint16)
        codes[(codes & 0x7C00) == 0x7C00] &= 0x83FF  # neither infinite nor NaN
        return torch.from_numpy(codes.view(np.float16))

    rate = data.draw(st.none() | st.integers(1, 5) | st.floats(1e-12, 10))
    manifest = replace(bold.manifest, image_size=(height, width), extra={} if rate is None else {"learning_rate": rate})
    labels = torch.from_numpy(draw.integers(0, TOY_CLASSES, count))
    saved = DistilledSet(
        halves(count, 3, height, width), labels, torch.arange(count), None, halves(count, TOY_CLASSES), manifest
    )
    folder = tmp_path_factory.mktemp("bits")
    saved.save(folder)
    loaded = load_distilled(folder)
    assert (bits(loaded.images), bits(loaded.soft_labels)) == (bits(saved.images), bits(saved.soft_labels))
    assert (bits(loaded.labels), bits(loaded.slots)) == (bits(saved.labels), bits(saved.slots))
    assert (loaded.images.dtype, loaded.manifest.learning_rate) == (torch.float16, rate)
    assert replace(loaded.manifest, files={}) == saved.manifest
    assert loaded.fingerprint == saved.fingerprint
    assert verify_distilled(folder) == []
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded.save(folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_float_pixels_open_with_pyarrow_alone_and_count_two_bytes_each(bold: DistilledSet, tmp_path: Path) -> None:
    manifest = bold.save(tmp_path)
    table = pq.read_table(tmp_path / manifest.files["images"].name)
    pixels = [
        np.frombuffer(image["bytes"], "<f2").reshape(3, TOY_SIZE, TOY_SIZE) for image in table["image"].to_pylist()
    ]
    assert np.array_equal(np.stack(pixels), bold.images.numpy())
    assert table["label"].to_pylist() == bold.labels.tolist()
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"]["bytes"]["dtype"] == "binary"  # no picture, which a viewer would fail to decode
    budget = count_bytes(load_distilled(tmp_path))
    assert budget.raw == {"images": 8 * 3 * TOY_SIZE**2 * 2, "compensators": 0, "labels": 8 * TOY_CLASSES * 2}
    assert budget.stored["images"] == (tmp_path / manifest.files["images"].name).stat().st_size
    obj = json.loads((tmp_path / "manifest.json").read_text())
    assert (obj["pixel_encoding"], obj["image_encoding"], obj["label_kind"]) == ("float16", "float16", "learned")


def test_views_leave_the_range_where_the_set_says_so(bold: DistilledSet) -> None:
    pixels, rows = bold.images.numpy().astype(np.float32), torch.arange(8)
    assert pixels.min() < 0
    assert pixels.max() > 1
    assert np.array_equal(bold.form_views(rows).numpy(), pixels)
    cut = replace(bold, manifest=replace(bold.manifest, views=ViewSettings()))
    assert np.array_equal(cut.form_views(rows).numpy(), pixels.clip(0, 1))
    view, soft_label = bold.views(normalize=False)[5]
    assert np.array_equal(view.numpy(), pixels[5])
    assert soft_label.numpy() == pytest.approx(bold.soft_labels[5].float().softmax(0).numpy())  # type: ignore[index]


def test_card_sheet_and_budget_show_what_was_learned(
    bold: DistilledSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bold.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for words in ("bytes of float16 pixels", "learned by the method", "Labels are learned.", "learning rate is 0.03."):
        assert words in card
    sheet = np.asarray(Image.open(io.BytesIO((tmp_path / "contact_sheet.png").read_bytes())))
    cell = TOY_SIZE * (64 // TOY_SIZE)
    first = sheet[:cell:8, :cell:8].transpose(2, 0, 1)  # of class 0, whose images stand in the order of slots
    assert np.array_equal(first, (bold.images[0].float().numpy().clip(0, 1) * 255).round())
    show_budget(tmp_path)
    shown = capsys.readouterr().out
    assert "pixels: float16, from -0." in shown
    assert "learned learning rate: 0.03" in shown


def test_sets_of_8_bits_are_written_with_the_keys_that_they_always_had(
    toy: RealData, plan: Plan, tmp_path: Path
) -> None:
    distill_random(toy, [], 2, RandomConfig(), 0, plan, Run()).save(tmp_path)
    obj = json.loads((tmp_path / "manifest.json").read_text())
    assert sorted(obj) == [
        "class_names", "dataset", "extra", "files", "image_encoding", "image_size", "ipc", "label_kind", "libraries",
        "manifest_sha256", "method", "normalization", "pixel_encoding", "pool", "recipe", "schema_version", "seeds",
        "teachers", "views",
    ]  # fmt: skip
    assert (obj["pixel_encoding"], obj["image_encoding"], obj["extra"]) == ("uint8", "png", {})
    assert "learn" not in (tmp_path / "README.md").read_text()


def forge(folder: Path, edit: Callable[[dict[str, Any]], object], images: bytes | None = None) -> None:
    """Change the manifest, and perhaps the images, so that every hash fits."""
    obj = json.loads((folder / "manifest.json").read_bytes())
    if images is not None:
        digest = sha256_bytes(images)
        name = f"images-{digest[:12]}.parquet"
        (folder / name).write_bytes(images)
        obj["files"]["images"] |= {"name": name, "bytes": len(images), "sha256": digest}
    edit(obj)
    obj.pop(SEAL_KEY)

    def encode(value: dict[str, Any]) -> bytes:
        return (json.dumps(value, sort_keys=True, indent=2) + "\n").encode()

    (folder / "manifest.json").write_bytes(encode(obj | {SEAL_KEY: sha256_bytes(encode(obj))}))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m.update(image_encoding="png"), "does not hold what the manifest says"),
        (lambda m: m.update(image_encoding="float32"), "image_encoding is 'float32', but must be one of"),
        (lambda m: m.update(image_size=[4, 16]), None),  # as many bytes: nothing contradicts it
        (lambda m: m.update(image_size=[8, 9]), "does not hold what the manifest says"),
        (lambda m: m.update(label_kind="hard"), "label_kind is 'hard', but soft labels are there"),
        (lambda m: m["files"].pop("labels"), "label_kind is 'learned', but soft labels are absent"),
        (lambda m: m["extra"].update(learning_rate=0), "extra.learning_rate is 0, but must be a number above 0"),
        (lambda m: m["extra"].update(learning_rate="fast"), "extra.learning_rate is 'fast'"),
        (lambda m: m["extra"].update(learning_rate=10**400), "extra.learning_rate is 1000"),
        (lambda m: m["extra"].update(learning_rate=True), "extra.learning_rate is True"),
    ],
)
def test_a_manifest_that_contradicts_what_was_learned_is_refused(
    bold: DistilledSet, tmp_path: Path, edit: Callable[[dict[str, Any]], object], words: str | None
) -> None:
    bold.save(tmp_path)
    forge(tmp_path, edit)
    if words is None:
        assert load_distilled(tmp_path).images.shape == (8, 3, 4, 16)
        return
    with pytest.raises(StillroomError, match=words):
        load_distilled(tmp_path)
    assert len(verify_distilled(tmp_path)) == 1


def test_damaged_float_images_are_refused_though_their_hash_fits(bold: DistilledSet, tmp_path: Path) -> None:
    manifest = bold.save(tmp_path / "whole")
    content = (tmp_path / "whole" / manifest.files["images"].name).read_bytes()
    draw = np.random.default_rng(0)
    for number in range(40):
        bold.save(tmp_path / str(number))
        damaged = bytearray(content)
        for place in draw.integers(0, len(content), 3):
            damaged[place] ^= int(draw.integers(1, 256))
        forge(
            tmp_path / str(number), lambda m: None, bytes(damaged[: len(content) if number % 4 else len(content) // 2])
        )
        try:
            loaded = load_distilled(tmp_path / str(number))
        except StillroomError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
        else:
            assert loaded.images.shape == bold.images.shape
    (tmp_path / "whole" / manifest.files["images"].name).write_bytes(content[:-1] + b"!")
    with pytest.raises(StillroomError, match="was changed after it was written"):
        load_distilled(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"images": torch.full_like(s.images, torch.inf)}, r"pixels of images \[0, 1, 2\] are not finite"),
        (lambda s: {"images": s.images.float()}, r"images are torch.float32 .* must be float16"),
        (lambda s: {"images": s.images.byte()}, r"images are torch.uint8 .* must be float16 .* is 'float16'"),
        (lambda s: {"manifest": replace(s.manifest, image_encoding="png")}, r"torch.float16 .* must be uint8"),
        (lambda s: {"manifest": replace(s.manifest, image_encoding="jpeg95")}, r"torch.float16 .* must be uint8"),
        (lambda s: {"image_files": (b"",) * 8}, "the encoded images are not there"),
        (lambda s: {"soft_labels": None}, "label_kind is 'learned', but soft labels are absent"),
        (lambda s: {"soft_labels": s.soft_labels.float()}, "soft labels are torch.float32"),
        (lambda s: {"soft_labels": s.soft_labels[:4]}, "a row per view"),
    ],
)
def test_parts_that_contradict_what_was_learned_are_refused(
    bold: DistilledSet, change: Callable[[DistilledSet], dict[str, Any]], words: str
) -> None:
    with pytest.raises(StillroomError, match=words):
        replace(bold, **change(bold))


def test_float_images_are_kept_and_no_choice_of_encoding_cuts_them(
    bold: DistilledSet, toy: RealData, plan: Plan
) -> None:
    assert bold.with_image_encoding("auto") is bold
    with pytest.raises(StillroomError, match="float16 pixels, which jpeg95 would cut and round"):
        bold.with_image_encoding("jpeg95")
    plain = distill_random(toy, [], 2, RandomConfig(), 0, plan, Run())
    with pytest.raises(StillroomError, match=r"image_encoding 'float16' is not known"):
        plain.with_image_encoding("float16")  # type: ignore[arg-type]
    learned = plain.with_labels(bold.soft_labels, "learned").with_image_encoding("jpeg95")
    assert learned.manifest.label_kind == "learned"
    assert bits(learned.soft_labels) == bits(bold.soft_labels)
    assert not torch.equal(learned.images, plain.images)


def test_what_was_learned_is_part_of_the_fingerprint_and_other_labels_are_not(bold: DistilledSet) -> None:
    assert bold.soft_labels is not None
    other = bold.with_labels(bold.soft_labels + 1, "learned")
    slower = replace(bold, manifest=replace(bold.manifest, extra={"learning_rate": RATE / 2}))
    pixel = bold.images.clone()
    pixel[1, 2, 3, 4] += 1
    hard, static = bold.with_labels(None), bold.with_labels(bold.soft_labels)
    assert len({s.fingerprint for s in (bold, other, slower, replace(bold, images=pixel), hard)}) == 5
    assert hard.fingerprint == static.fingerprint == static.with_labels(bold.soft_labels + 1).fingerprint


def test_exports_say_what_they_lose(bold: DistilledSet, tmp_path: Path) -> None:
    lost = "the learned learning rate, 0.03, was not written"
    order = bold.labels.argsort(stable=True)
    cut, _, last = export_set(bold, "folder", tmp_path / "folder")
    assert (cut, last) == ("views are cut to [0, 1] and rounded to 8 bits", lost)
    assert np.array_equal(np.load(tmp_path / "folder/soft_labels.npy"), bold.soft_labels[order].numpy())  # type: ignore[index]
    with Image.open(tmp_path / "folder/north_west/class000_id000.png") as picture:
        first = np.asarray(picture).transpose(2, 0, 1)
    assert np.array_equal(first, (bold.images[order[0]].float().numpy().clip(0, 1) * 255).round())
    assert export_set(bold, "infer", tmp_path / "infer")[0] == "pixels are cut to [0, 1] and rounded down to 8 bits"
    assert export_set(bold, "npz", tmp_path / "views.npz")[-1] == lost
    with np.load(tmp_path / "views.npz") as arrays:
        assert np.array_equal(arrays["train_images"], bold.images[order].float().numpy())
    export_set(bold, "ddranking", tmp_path / "ddranking")
    views = torch.load(tmp_path / "ddranking/images.pt")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in dataclasses.astuple(bold.manifest.normalization))
    assert torch.allclose(views, (bold.images[order].float() - mean) / std)


# ---- labels and students


def test_learned_labels_are_kept_where_they_are_asked_for_and_made_anew_for_other_kinds(
    bold: DistilledSet, toy_teachers: list[Teacher], plan: Plan
) -> None:
    assert attach_labels(bold, "learned", [], plan, Run()) is bold
    static = attach_labels(bold, "static", toy_teachers, plan, Run())
    assert static.manifest.label_kind == "static"
    assert not torch.equal(static.soft_labels, bold.soft_labels)  # type: ignore[arg-type]
    with pytest.raises(StillroomError, match="of 'bold' holds none, its labels are static"):
        attach_labels(static, "learned", toy_teachers, plan, Run())


def test_students_are_trained_on_learned_labels_as_on_static_ones(
    bold: DistilledSet, toy: RealData, plan: Plan, toynet: str
) -> None:
    rows = torch.tensor([6, 1, 3])
    images, targets = build_draws(bold, TRAIN, [], plan)(rows, torch.Generator())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (toy.mean, toy.std))
    assert torch.allclose(images, (bold.images[rows].float() - mean) / std, atol=1e-5)
    assert torch.equal(targets, bold.soft_labels[rows].float())  # type: ignore[index]
    config = StudentConfig(toynet, replace(TRAIN, epochs=15), temperature=1.0)
    result = evaluate(bold, toy, config, (0,), plan, Run())
    assert (result.labels, result.label_bytes) == ("learned", 8 * TOY_CLASSES * 2)
    assert result.top1 == evaluate(bold.with_labels(bold.soft_labels), toy, config, (0,), plan, Run()).top1
    assert result.mean > 0.5


def test_the_learned_rate_is_taken_where_it_is_asked_for_and_there_is_one(
    bold: DistilledSet, toy: RealData, plan: Plan, toynet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def record(model: torch.nn.Module, config: TrainConfig, *_: object, **__: object) -> list[dict[str, float]]:
        rates.append(config.learning_rate)
        return [{"top1": 0.0, "top5": 0.0, "seconds": 0.0}]

    monkeypatch.setattr(students, "fit", record)
    without = replace(bold, manifest=replace(bold.manifest, extra={}))
    for distilled, learned_rate in ((bold, True), (bold, False), (without, True)):
        evaluate(distilled, toy, StudentConfig(toynet, TRAIN, learned_rate=learned_rate), (0,), plan, Run())
    assert rates == [RATE, 1e-2, 1e-2]


# ---- a run, and a comparison


def test_a_run_without_teachers_keeps_trains_on_and_compares_what_was_learned(
    bold_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "fit", lambda *_, **__: pytest.fail("a teacher was trained"))
    with Run(tmp_path / "run") as run:
        results = run_recipe(bold_recipe, run)
    rows = [(row["set"], row["labels"], row["budget"]) for row in results["cells"]]
    assert rows == [("bold", "learned", "own"), ("random", "hard", "equal epochs (learned), equal steps (learned)")]
    real = load_real(bold_recipe.data)
    made = distill_bold(real, [], 4, BoldConfig(), 0, None, Run())  # type: ignore[arg-type]
    stored = load_distilled(tmp_path / "run/distilled")
    assert (bits(stored.images), bits(stored.soft_labels)) == (bits(made.images), bits(made.soft_labels))
    assert stored.manifest.learning_rate == RATE
    with Run(tmp_path / "run") as run:
        assert run_recipe(bold_recipe, run)["cells"] == results["cells"]
    stages = {stage.name: stage.kept for stage in estimate_recipe(bold_recipe)[0]}
    assert stages["images"] == results["bytes"]["raw"]["images"] == 2 * 16 * 3 * TOY_SIZE**2
    assert stages["learned labels"] == results["bytes"]["raw"]["labels"] == 16 * TOY_CLASSES * 2


def test_a_set_keeps_its_learned_labels_though_others_are_asked_for(bold_recipe: Recipe, tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        results = run_recipe(replace(bold_recipe, labels=("static", "hard")), run)
    assert [row["labels"] for row in results["cells"] if row["set"] == "bold"] == ["static", "hard"]
    assert load_distilled(tmp_path / "run/distilled").manifest.label_kind == "learned"


@pytest.mark.parametrize("method", ["random", "infer"])
def test_learned_labels_of_a_method_that_learns_none_are_refused_before_any_work(
    bold_recipe: Recipe, tmp_path: Path, method: Any
) -> None:
    with Run(tmp_path / "run") as run, pytest.raises(StillroomError, match=f"'learned', but '{method}' learns none"):
        run_recipe(replace(bold_recipe, method=method), run)
    assert not (tmp_path / "run/config.json").exists()


def test_a_method_that_says_less_than_it_learns_is_refused(
    bold_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in ({"image_bits": 8}, {"learned_labels": False}):
        said = lambda *given, change=change: replace(bold_content(*given), **change)  # noqa: E731
        monkeypatch.setitem(METHODS, "bold", replace(METHODS["bold"], content=said))
        with pytest.raises(StillroomError, match=r"image_bits=16, learned_labels=True\), but by its content"):
            run_recipe(replace(bold_recipe, labels=("hard",)), Run())


def test_a_comparison_foretells_the_bytes_of_what_was_learned_exactly(bold_recipe: Recipe, tmp_path: Path) -> None:
    kinds = ("hard", "static", "learned")
    recipe = replace(bold_recipe, labels=kinds)
    with Run(tmp_path / "run") as run:
        results = compare.compare(comparison_of(recipe, Grid(methods=("random", "bold"))), run, "toy")
    rows = {(row["method"], row["labels"]): row for row in results["rows"]}
    assert list(rows) == [("random", "hard"), ("random", "static"), *(("bold", kind) for kind in kinds)]
    assert not [row["error"] for row in rows.values() if "error" in row]
    assert set(rows["bold", "learned"]["differences"]) == {"random + hard, equal epochs", "random + hard, equal steps"}
    real = load_real(recipe.data)
    for (method, kind), row in rows.items():
        foretold = grid.raw_bytes(grid.read_method(method, recipe), real, kind)  # type: ignore[arg-type]
        assert sum(row["bytes"]["raw"].values()) == foretold


def test_a_set_that_is_there_is_compared_by_the_labels_that_its_method_learned(
    bold_recipe: Recipe, bold: DistilledSet, plan: Plan, tmp_path: Path
) -> None:
    real = load_real(bold_recipe.data)
    distill_bold(real, [], 2, BoldConfig(), 0, plan, Run()).save(tmp_path / "bold")
    distill_random(real, [], 2, RandomConfig(), 0, plan, Run()).save(tmp_path / "plain")
    folders = tuple(f"{grid.FOLDER}{tmp_path / name}" for name in ("bold", "plain"))
    entries, refused = grid.plan_entries(comparison_of(bold_recipe, Grid(methods=folders)), real)
    assert [entry.recipe.labels for entry in entries] == [("learned",)]
    assert len(refused) == 1
    assert refused[0].endswith("plain: it has no learned labels; give --labels static, too")
    with Run(tmp_path / "run") as run:
        work = compare.Work(bold_recipe, real, [], plan, run, {}, bold_recipe.student, bold_recipe)  # type: ignore[arg-type]
        made, _ = compare.make_set(entries[0], work)
    assert made.manifest.label_kind == "learned"


def test_at_equal_bytes_images_of_16_bits_are_half_as_many(bold_recipe: Recipe) -> None:
    real, recipe = load_real(bold_recipe.data), replace(bold_recipe, ipc=8)
    assert grid.match_bytes(recipe, real, "hard") == 4
    assert grid.match_bytes(recipe, real, "learned") == 4
