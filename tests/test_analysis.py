"""The numbers behind figures, against references written anew in NumPy, and students that are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished, build_toy, build_toy_teacher
from torch import nn

from stillroom import study as studies
from stillroom.analysis import divergence, features, predictions, recovery, results
from stillroom.distilled import dequantize_compensators, load_distilled
from stillroom.errors import StillroomError
from stillroom.files import load_tensors, read_json, write_json
from stillroom.networks import batchnorm_layers
from stillroom.run import Run
from stillroom.study import Place, Study, StudyConfig, TeacherPlace

Opened = Callable[..., Study]


@pytest.fixture
def opened(toynet: str, tmp_path: Path) -> Iterator[Opened]:
    """Open a finished run for study, what is kept in a folder of the test."""
    kept: list[Run] = []

    def build(run: Finished, *others: Path, **settings: Any) -> Study:
        folder = run.directory.parent
        places: dict[str, Any] = {
            "data": Place(str(folder / "toy.npz")),
            "teachers": TeacherPlace(str(folder / "cache")),
        }
        places |= {"compute": run.recipe.compute}
        for old in kept:
            old.close()
        kept.append(Run(tmp_path / "figures"))
        return Study([run.directory, *others], StudyConfig(**places, **settings), kept[-1])

    yield build
    for old in kept:
        old.close()


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


# -- features ------------------------------------------------------------------------------------------------------


def test_duplication_of_real_images_is_the_mean_cosine_over_pairs_of_a_class(
    compared: Finished, opened: Opened
) -> None:
    study = opened(compared)
    found = features.measure_duplication(study)
    model, real = study.teachers[0].model, study.real
    pixels = (real.train.batch(torch.arange(len(real.train))).numpy() / 255).astype(np.float32)
    normal = (pixels - np.reshape(real.mean, (3, 1, 1))) / np.reshape(real.std, (3, 1, 1))
    with torch.no_grad():
        vectors = nn.Sequential(*list(model)[:-1])(torch.tensor(normal, dtype=torch.float32)).numpy()  # type: ignore[call-overload]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = []
    for index in range(4):
        own = vectors[real.train.labels.numpy() == index]
        pairs = [own[i] @ own[j] for i in range(len(own)) for j in range(len(own)) if i < j]
        cosines.append(np.mean(pairs))
    assert found.real == pytest.approx(np.mean(cosines), abs=1e-4)
    rows = read_json(compared.directory / "comparison.json")["rows"]
    kept = {(row["method"], row["ipc"]): row["duplication"] for row in rows}
    assert {(m, i): s for m, i, s in zip(found.method, found.ipc, found.similarity, strict=True)} == pytest.approx(kept)


def test_the_plane_belongs_to_the_nearest_images_predictions() -> None:
    generator = np.random.default_rng(0)
    plane, predicted = generator.random((60, 2)), generator.integers(0, 3, 60)
    line = (np.arange(9) + 0.5) / 9
    region = features.classify_plane(plane, predicted, line, line)
    for down in range(9):
        for across in range(9):
            distances = np.hypot(plane[:, 0] - line[across], plane[:, 1] - line[down])
            votes = np.bincount(predicted[np.argsort(distances)[: features.NEIGHBOURS]], minlength=3)
            assert votes[region[down, across]] == votes.max()


def test_boundaries_show_the_students_own_predictions(compared: Finished, opened: Opened) -> None:
    study = opened(compared, sets=("real", "infer"), ipc=4)
    found = features.map_boundaries(study)
    logits = study.logits("infer", 0)
    rows = torch.cat([(study.real.test.labels == index).nonzero().flatten() for index in range(4)])
    np.testing.assert_array_equal(found.predicted[1], logits[rows].argmax(1).numpy())
    assert found.accuracy[1] == pytest.approx((logits.argmax(1) == study.real.test.labels).float().mean().item())
    assert (found.x.min(), found.x.max()) == pytest.approx((features.MARGIN, 1 - features.MARGIN))


# -- predictions ---------------------------------------------------------------------------------------------------


def test_a_landscape_is_the_loss_at_its_centre_and_at_the_images_it_leads_to() -> None:
    real, model = build_toy(), build_toy_teacher(2).model
    starts, firsts, seconds = predictions.draw_triplets(real.test.labels, 6, 0)
    classes = [real.test.labels[rows] for rows in (starts, firsts, seconds)]
    assert all((classes[a] != classes[b]).all() for a, b in ((0, 1), (0, 2), (1, 2)))
    images = [real.test.batch(rows).double().float() / 255 for rows in (starts, firsts, seconds)]
    offsets = torch.tensor([-1.0, 0.0, 1.0])
    loss = predictions.plane_loss(model, images[0], images[1] - images[0], images[2] - images[0], classes[0], offsets)

    def reference(pixels: torch.Tensor) -> float:
        probabilities = softmax(model(pixels).numpy())
        return float(np.mean([-np.log(row[label]) for row, label in zip(probabilities, classes[0], strict=True)]))

    assert loss[1, 1] == pytest.approx(reference(images[0]), rel=1e-5)
    assert loss[2, 1] == pytest.approx(reference(images[1]), rel=1e-5)
    assert loss[1, 2] == pytest.approx(reference(images[2]), rel=1e-5)
    assert loss[0, 2] == pytest.approx(reference(images[0] - images[1] + images[2]), rel=1e-5)


def test_two_classes_have_a_landscape_too() -> None:
    starts, firsts, seconds = predictions.draw_triplets(torch.tensor([0, 0, 0, 1, 1]), 4, 0)
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert (labels[starts] != labels[firsts]).all()
    assert (labels[starts] != labels[seconds]).all()


def test_calibration_is_the_gap_between_confidence_and_accuracy_by_interval() -> None:
    generator = np.random.default_rng(1)
    probabilities = softmax(3 * generator.normal(size=(300, 4)))
    labels = generator.integers(0, 4, 300)
    confidence, accuracy, count = predictions.calibrate(probabilities, labels)
    expected, found = 0.0, 0.0
    for interval in range(10):
        inside = [row for row in range(300) if interval / 10 < probabilities[row].max() <= (interval + 1) / 10]
        assert count[interval] == len(inside)
        if inside:
            sure = np.mean([probabilities[row].max() for row in inside])
            right = np.mean([probabilities[row].argmax() == labels[row] for row in inside])
            assert (confidence[interval], accuracy[interval]) == pytest.approx((sure, right))
            expected += len(inside) / 300 * abs(sure - right)
            found += count[interval] / 300 * abs(confidence[interval] - accuracy[interval])
    assert found == pytest.approx(expected)
    assert np.isnan(confidence[0])  # of four classes none is below a quarter


def test_certain_and_right_is_calibrated(compared: Finished, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    study = opened(compared, sets=("infer",), ipc=4)
    sure = 100.0 * nn.functional.one_hot(study.real.test.labels, 4).float()
    monkeypatch.setattr(study, "logits", lambda name, seed: sure)
    assert predictions.measure_calibration(study).error.tolist() == [[0.0]]
    assert predictions.measure_classes(study).accuracy.tolist() == [[[1.0] * 4]]
    monkeypatch.setattr(study, "logits", lambda name, seed: -sure)
    assert predictions.measure_calibration(study).error[0, 0] == pytest.approx(1 / 3, abs=1e-6)


def test_intervals_of_difficulty_hold_all_images_easy_ones_first(compared: Finished, opened: Opened) -> None:
    study = opened(compared, sets=("real", "infer"), seeds=(0, 1), ipc=4)
    found = predictions.measure_difficulty(study)
    assert found.count.sum() == len(study.real.test)
    assert (found.high[:-1] <= found.low[1:]).all()
    right = (study.logits("infer", 1).argmax(1) == study.real.test.labels).sum().item()
    assert found.right[1, 1].sum() == right
    assert found.right.shape == (2, 2, 10)


# -- labels --------------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    generator = np.random.default_rng(2)
    of, against = generator.normal(size=(2, 7, 5))
    p, q = softmax(of), softmax(against)
    expected = [sum(a * np.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    assert divergence.divergence_of(torch.tensor(of), torch.tensor(against)).numpy() == pytest.approx(expected)
    assert divergence.divergence_of(torch.tensor(of), torch.tensor(of)).abs().max() < 1e-12


def test_where_nothing_is_augmented_a_dynamic_label_is_the_static_one(
    compared: Finished, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "IMAGES", 48)
    study = opened(compared, ipc=4)
    train = replace(study.student_config.train, crop_padding=0, flip=False, mixup_beta=0.0)
    study.student_config = replace(study.student_config, train=train)
    static, dynamic = divergence.label_both_ways(study, "infer")
    assert len(static) >= divergence.IMAGES
    torch.testing.assert_close(static, dynamic, atol=5e-3, rtol=1e-2)  # stored in 16 bits
    found = divergence.measure_divergence(study)
    assert "real" not in found.set
    assert found.temperature.tolist() == [1, 30]
    assert found.divergence.max() < 1e-3


# -- compensators --------------------------------------------------------------------------------------------------


def test_losses_are_those_that_the_run_kept(finished: Finished, opened: Opened) -> None:
    found = recovery.read_losses(opened(finished))
    for path in (finished.directory / "units").glob("compensators-*"):
        tensors, _ = load_tensors(path)
        start, stop = map(int, path.stem.split("-")[-2:])
        np.testing.assert_allclose(found.label[0, start:stop], tensors["losses"][:, 0].T, rtol=1e-6)
        np.testing.assert_allclose(found.statistics[0, start:stop], tensors["losses"][:, 1].T, rtol=1e-6)
    assert found.label.shape == (1, 3, 4)


def test_layers_add_up_to_the_statistics_loss_of_naturals_and_views(finished: Finished, opened: Opened) -> None:
    study = opened(finished)
    found = recovery.measure_layers(study)
    distilled = load_distilled(finished.directory / "distilled")
    model, offsets = study.teachers[0].model, dequantize_compensators(distilled.compensators)  # type: ignore[arg-type]
    normalization = distilled.manifest.normalization
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalization.mean, normalization.std))
    inputs: list[np.ndarray] = []
    layers = [layer for _, layer in batchnorm_layers(model)]
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].double().numpy()))
    for slot in range(3):
        natural = distilled.images[distilled.slots == slot].float() / 255
        for images, parts in ((natural, found.before), (natural + offsets[0, slot], found.after)):
            inputs.clear()
            model((images - mean) / std)
            for index, (values, layer) in enumerate(zip(inputs, layers, strict=True)):
                weight = 10 if index == 0 else 1
                means = np.linalg.norm(values.mean((0, 2, 3)) - layer.running_mean.numpy())  # type: ignore[union-attr]
                variances = np.linalg.norm(values.var((0, 2, 3)) - layer.running_var.numpy())  # type: ignore[union-attr]
                assert parts[index, slot] == pytest.approx(weight * (means + variances), rel=1e-4)
    assert found.number.tolist() == [1, 2]


def test_a_picture_is_stretched_around_gray() -> None:
    values = torch.zeros(2, 3, 2, 2)
    values[0, 1, 0, 0], values[0, 2, 1, 1] = -0.5, 0.25
    pictures, largest = recovery.stretch(values)
    assert largest.tolist() == [0.5, 0.0]
    assert pictures[0, 1, 0, 0] == 0
    assert pictures[0, 2, 1, 1] == 191
    assert (pictures[1] == 128).all()


# -- results -------------------------------------------------------------------------------------------------------


def test_tradeoff_counts_all_bytes_and_sets_random_images_beside_in_as_many_steps(
    compared: Finished, opened: Opened
) -> None:
    found = results.measure_tradeoff(opened(compared))
    kept = read_json(compared.directory / "comparison.json")
    point = next(i for i in range(len(found.method)) if (found.method[i], found.ipc[i]) == ("infer", 4))
    size = 12 * 3 * 64 + 3 * 3 * 64 * 2 + 24 * 4 * 2  # naturals, compensators in 16 bits, labels of 24 views
    assert found.ratio[point] == pytest.approx(100 * size / (96 * 3 * 64), rel=1e-4)
    row = next(row for row in kept["rows"] if (row["method"], row["ipc"]) == ("infer", 4))
    assert found.top1[point] == pytest.approx(row["mean"])
    matched = found.method.tolist().index("random in as many steps as infer")
    asked = {"set": "random", "labels": "static", "steps": found.steps[matched]}
    trained = [
        pytest.approx(np.mean(training["top1"]), abs=2e-3)
        for training in kept["trainings"].values()
        if asked.items() <= training.items()
    ]
    assert found.top1[matched] in trained


def test_controls_stand_in_the_tradeoff_with_their_own_spread(
    compared: Finished, opened: Opened, tmp_path: Path
) -> None:
    rows = read_json(compared.directory / "comparison.json")["rows"]
    infer = next(row for row in rows if (row["method"], row["ipc"]) == ("infer", 4))
    random = next(row for row in rows if (row["method"], row["ipc"]) == ("random", 4))

    def points_of(folder: Path, **settings: Any) -> dict[str, tuple[float, float, int, float]]:
        found = results.measure_tradeoff(opened(replace(compared, directory=folder), **settings))
        columns = (found.method, found.ipc, found.top1, found.deviation, found.steps, found.ratio)
        return {str(m): values for m, ipc, *values in zip(*columns, strict=True) if ipc == 4}  # type: ignore[misc]

    whole, alone = points_of(compared.directory), points_of(compared.directory, sets=("infer",))
    matched = "random in as many steps as infer"
    for points in (whole, alone):
        kept = infer["controls"]["random + static, equal steps"]
        assert points[matched][:3] == pytest.approx([*kept, infer["steps"]])
        assert points["random"][:3] == pytest.approx([random["mean"], random["std"], random["steps"]])
        size = 4 * 4 * 3 * 64 + 16 * 4 * 2  # images, labels in 16 bits
        assert points["random"][3] == pytest.approx(100 * size / (96 * 3 * 64), rel=1e-4)
        assert points[matched][3] == pytest.approx(points["random"][3])
    assert alone.keys() == {"infer", "random", matched}
    other = tmp_path / "folder alone"  # as a comparison of a set that is there already has it
    other.mkdir()
    shutil.copy(compared.directory / "config.json", other)
    write_json(other / "comparison.json", read_json(compared.directory / "comparison.json") | {"rows": [infer]})
    assert points_of(other) == alone
    infer.pop("controls"), infer.pop("control_costs")  # of an older version
    write_json(other / "comparison.json", read_json(compared.directory / "comparison.json") | {"rows": [infer, random]})
    old = points_of(other)
    assert old[matched][0] == pytest.approx(whole[matched][0], abs=2e-3)
    assert np.isnan(old[matched][1])
    assert old[matched][2:] == whole[matched][2:]


def test_runs_of_the_same_method_and_budget_are_named_apart(compared: Finished, opened: Opened, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(compared.directory, other)
    path = other / "comparison.json"
    kept = read_json(path)
    write_json(path, kept | {"rows": [row | {"top1": row["top1"][:1], "std": None} for row in kept["rows"]]})
    study = opened(compared, other, ipc=4)
    assert study.set_of("run/infer").within == compared.directory
    assert study.set_of("other/infer").within == other
    assert study.shown == [
        "real",
        *(f"{run}/{name}" for name in ("random", "sre2l", "infer") for run in ("run", "other")),
    ]
    with pytest.raises(StillroomError, match=r"no set of 'infer'.*other/infer"):
        study.set_of("infer")
    with pytest.raises(StillroomError, match=r"run/infer .* and other/infer .* choose by --sets"):
        study.compensated()
    assert opened(compared, other, ipc=4, sets=("other/infer",)).compensated().within == other
    found = results.measure_tradeoff(study)
    seeds = {str(name): int(count) for name, count in zip(found.method, found.seeds, strict=True)}
    assert (seeds["run/infer"], seeds["other/infer"]) == (2, 1)
    assert "infer" not in seeds
    gain = results.measure_gain(study)
    assert gain.setting.tolist()[::2] == ["ipc 3, static, run", "ipc 3, static, other"]
    assert gain.seeds.tolist() == [2, 2, 1, 1]
    with pytest.raises(StillroomError, match="names a run twice"):
        opened(compared, compared.directory)


def test_a_set_that_was_there_before_the_comparison_is_found_in_its_folder(
    compared: Finished, opened: Opened, tmp_path: Path
) -> None:
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    run.mkdir()
    shutil.copytree(compared.directory / "sets" / "infer-ipc4", theirs)
    shutil.copy(compared.directory / "config.json", run)
    kept = read_json(compared.directory / "comparison.json")
    row = next(row for row in kept["rows"] if (row["method"], row["ipc"]) == ("infer", 4))
    row |= {"method": "theirs", "set": None, "folder": str(theirs / "distilled")}
    rows = [row, row | {"method": "theirs, its own labels"}]
    write_json(run / "comparison.json", kept | {"rows": rows})
    study = opened(replace(compared, directory=run))
    assert [made.method for made in study.made] == ["theirs"]
    assert study.compensated().ipc == 4
    assert recovery.read_losses(study).label.shape == (1, 3, 4)
    shutil.rmtree(theirs)
    gone = opened(replace(compared, directory=run))
    for look in (gone.compensated, lambda: gone.set_of("theirs"), lambda: gone.shown):
        with pytest.raises(StillroomError, match=r"'theirs' of .* lay in .*/theirs/distilled.* no longer"):
            look()
    assert "theirs" in results.measure_tradeoff(gone).method


def test_dynamic_labels_count_as_if_they_were_stored() -> None:
    row = {
        "name": "m", "top1": [3.0], "labels": "dynamic", "ipc": 1, "steps": 2, "mean": 3.0, "std": None,
        "dynamic_label_bytes": 50,
        "bytes": {"raw": {"images": 100, "compensators": 20, "labels": 0}, "real_raw_bytes": 1000},
    }  # fmt: skip
    assert results._point(row)["ratio"] == 17


def test_gains_are_paired_by_seed() -> None:
    cells = [
        {"set": "infer", "labels": "static", "budget": "own", "top1": [50.0, 54.0, 52.0], "mean": 52.0},
        {"set": "random", "labels": "static", "budget": "equal epochs (static)", "top1": [9.0, 9.0, 9.0]},
        {"set": "naturals", "labels": "static", "budget": "equal epochs (static)", "top1": [40.0, 41.0, 42.0]},
        {"set": "naturals", "labels": "static", "budget": "equal steps (static)", "top1": [53.0, 55.0, 51.0]},
    ]
    (found,) = results._of_run({"ipc": 4, "cells": cells})
    assert (found["method"], found["accuracy"], found["seeds"]) == ("infer", 52.0, 3)
    assert (found["at_epochs"], found["at_epochs_deviation"]) == pytest.approx((11.0, np.std([10, 13, 10], ddof=1)))
    assert (found["at_steps"], found["at_steps_deviation"]) == pytest.approx((-1.0, np.std([-3, -1, 1], ddof=1)))


def test_gains_of_runs_and_comparisons_are_read(finished: Finished, compared: Finished, opened: Opened) -> None:
    found = results.measure_gain(opened(finished))
    assert found.setting.tolist() == ["ipc 4, static", "ipc 4, dynamic"]
    rows = read_json(compared.directory / "comparison.json")["rows"]
    row = next(row for row in rows if (row["method"], row["ipc"]) == ("infer", 4))
    found = results.measure_gain(opened(compared))
    assert found.at_steps[1] == pytest.approx(row["differences"]["naturals + static, equal steps"][0])
    del row["differences"]["naturals + static, equal epochs"]  # of a control that failed
    assert len(list(results._of_comparison({"rows": rows}))) == 1


# -- students that are kept ----------------------------------------------------------------------------------------


def test_a_student_is_the_runs_own_and_trained_once(
    compared: Finished, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_json(compared.directory / "comparison.json")["rows"]
    reached = {(row["method"], row["ipc"]): row["top1"] for row in rows}
    study = opened(compared, sets=("infer",), seeds=(0, 1), ipc=4)
    right = [(study.logits("infer", seed).argmax(1) == study.real.test.labels).float().mean() for seed in (0, 1)]
    assert [100 * float(value) for value in right] == pytest.approx(reached["infer", 4], abs=1e-3)
    assert not torch.equal(study.logits("infer", 0), study.logits("infer", 1))
    monkeypatch.setattr(studies, "train_student", lambda *_, **__: pytest.fail("trained again"))
    again = opened(compared, sets=("infer",), seeds=(0, 1), ipc=4)
    torch.testing.assert_close(again.logits("infer", 1), study.logits("infer", 1))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        opened(compared, sets=("infer",), labels="hard", ipc=4).student("infer", 0)


def test_students_that_are_shown_together_take_as_many_steps(compared: Finished, opened: Opened) -> None:
    rows = read_json(compared.directory / "comparison.json")["rows"]
    epochs = {row["method"]: row["steps"] for row in rows if row["ipc"] == 4}
    study, own = opened(compared, ipc=4), opened(compared, ipc=4, own_steps=True)
    assert epochs["random"] < epochs["infer"]
    assert {study.steps(name) for name in ("random", "sre2l", "infer")} == {epochs["infer"]}
    assert {name: own.steps(name) for name in epochs} == epochs
    assert opened(compared, ipc=4, steps=7).steps("random") == 7
    assert study.steps("real") == 4 * (96 // 16)  # by the teachers' recipe
    opened(compared, ipc=4, own_steps=True).student("random", 0)
    kept = opened(compared, ipc=4)
    before = set((kept.keep.directory or Path()).glob("units/student-*"))
    kept.student("random", 0)
    after = set((kept.keep.directory or Path()).glob("units/student-*"))
    assert (len(before), len(after)) == (1, 2)  # what was trained in other steps is not taken for it
    with pytest.raises(StillroomError, match="own_steps"):
        StudyConfig(steps=7, own_steps=True)


def test_students_of_figures_have_a_kind_of_label_that_the_run_has(
    compared: Finished, opened: Opened, tmp_path: Path
) -> None:
    assert opened(compared).labels == "static"
    assert opened(compared, labels="dynamic").labels == "dynamic"
    shutil.copytree(compared.directory.parent, tmp_path / "hard")
    path = tmp_path / "hard" / "run" / "comparison.json"
    write_json(path, {"rows": [row | {"labels": "hard"} for row in read_json(path)["rows"]]})
    assert opened(replace(compared, directory=path.parent)).labels == "hard"


def test_naturals_are_the_set_without_its_compensators(compared: Finished, opened: Opened) -> None:
    study = opened(compared, ipc=4)
    naturals = study.labelled("naturals", "static")
    assert naturals.compensators is None
    assert naturals.view_count == 12
    assert torch.equal(naturals.images, study.set_of("infer").distilled.images)


def test_a_run_of_another_version_is_read(finished: Finished, opened: Opened, tmp_path: Path) -> None:
    shutil.copytree(finished.directory, tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    stored = json.loads(config.read_text())
    stored["settings"]["student"]["train"]["of_the_future"] = 1
    del stored["settings"]["student"]["loss"]
    stored["settings"]["of_the_future"] = {}
    del stored["sha256"]  # as of before runs were sealed
    config.write_text(json.dumps(stored))
    study = opened(replace(finished, directory=tmp_path / "old"))
    place = {"data": Place(str(finished.directory.parent / "toy.npz"))}
    study.config = replace(study.config, teachers=TeacherPlace(str(finished.directory.parent / "cache")), **place)
    assert study.student_config.network == "toynet"
    assert study.student_config.loss == "kl"
    assert study.student("infer", 0)(torch.zeros(1, 3, 8, 8)).shape == (1, 4)


@pytest.mark.parametrize(
    ("settings", "compute", "said"),
    [
        ({"sets": ("infr",)}, predictions.measure_landscape, "sets has 'infr'.*Did you mean 'infer'"),
        ({"sets": ("random",), "ipc": 4}, recovery.show_compensators, "random has no compensators.*--method infer"),
        ({"sets": ("sre2l",), "ipc": 4}, recovery.read_losses, "sre2l has no compensators"),
        ({}, predictions.measure_classes, "'random' has sets of \\[3, 4\\].*choose one by --ipc"),
        ({"ipc": 7}, predictions.measure_classes, "no set of ipc 7, but of \\[3, 4\\]"),
    ],
)
def test_what_a_figure_lacks_is_said(
    settings: dict[str, Any], compute: Callable[[Study], Any], said: str, compared: Finished, opened: Opened
) -> None:
    with pytest.raises(StillroomError, match=said):
        compute(opened(compared, **settings))


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (features.measure_duplication, "one budget alone.*--grid.ipc 5 10"),
        (results.measure_tradeoff, "no comparison.*stillroom compare RECIPE"),
    ],
)
def test_what_a_single_run_lacks_is_said(
    compute: Callable[[Study], Any], said: str, finished: Finished, opened: Opened
) -> None:
    with pytest.raises(StillroomError, match=said):
        compute(opened(finished))


def test_what_is_no_run_is_refused(tmp_path: Path, finished: Finished, compared: Finished) -> None:
    with pytest.raises(StillroomError, match=r"holds no config\.json"):
        Study([tmp_path], StudyConfig(), Run())
    with pytest.raises(StillroomError, match="runs is empty"):
        Study([], StudyConfig(), Run())
    (tmp_path / "config.json").write_text(json.dumps({"settings": {}, "plan": {}}))
    with pytest.raises(StillroomError, match="no distilled set yet"):
        Study([tmp_path], StudyConfig(), Run())
    for settings, said in (({"seeds": ()}, "seeds is"), ({"seeds": (1, 1)}, "seeds is"), ({"steps": 0}, "steps is 0")):
        with pytest.raises(StillroomError, match=said):
            StudyConfig(**settings)  # type: ignore[arg-type]


def test_runs_of_different_data_are_refused(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.directory, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    stored = json.loads(config.read_text())
    stored["settings"]["data_fingerprint"] = "f"
    config.write_text(json.dumps({"settings": stored["settings"], "plan": {}}))
    with pytest.raises(StillroomError, match="runs of different data"):
        Study([finished.directory, tmp_path / "other"], StudyConfig(), Run())
