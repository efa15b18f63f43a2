"""Shared by all tests: one thread (two test processes on two cores would starve each other), and a toy world."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stillroom import cli, evaluate_command, settings
from stillroom.compute import ComputeConfig, Plan, resolve_plan
from stillroom.data import DataConfig, MemoryImages, RealData
from stillroom.errors import TimeLimitReached
from stillroom.methods.infer import InferConfig
from stillroom.methods.sre2l import Sre2lConfig
from stillroom.networks import NETWORKS, Network
from stillroom.recipes import RECIPES, Recipe
from stillroom.run import Run
from stillroom.students import StudentConfig
from stillroom.teachers import Teacher, TeachersConfig, hash_weights
from stillroom.train import TrainConfig

torch.set_num_threads(1)

EXAMPLES = Path(__file__).parents[1] / "examples"

TOY_CLASSES = 4
TOY_SIZE = 8


def load_example(name: str) -> ModuleType:
    """One of the scripts in examples/, as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fenced(text: str, language: str) -> list[str]:
    """The blocks of one language in a Markdown page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


RECIPE = re.compile(r"stillroom (run|distill|squeeze|compare) [a-z]")


def commands_of(text: str) -> list[str]:
    """Lines of a page's shell blocks, continued ones joined, that call stillroom."""
    lines = [line for block in fenced(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.search(r"\bstillroom [a-z]", line.partition("#")[0])]


def words_of(line: str) -> list[str]:
    words = shlex.split(line.partition(">")[0], comments=True)
    return words[words.index("stillroom") + 1 :]


def without_units(err: str) -> str:
    """What was said on standard error, less the lines that tell of finished units where there is no terminal."""
    return re.sub(r"^[\d:]+ finished .*\n", "", err, flags=re.MULTILINE)


class UnderstoodError(Exception):
    """A command's words were understood; no work follows."""


def understand(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command of a page, which begins no recipe, as `stillroom` would, and do nothing."""
    parse = settings.tyro.cli

    def stop(*args: object, **options: object) -> None:
        parse(*args, **options)
        raise UnderstoodError

    monkeypatch.setattr(evaluate_command, "_as_its_run", evaluate_command.EvaluateCommand)
    monkeypatch.setattr(settings.tyro, "cli", stop)
    with contextlib.suppress(UnderstoodError):
        assert cli.main(words_of(line)) == 0  # of those without words, which only show something


def resolved(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The settings that a recipe's command of a page would run with; a file of settings that it names is made here, and
    so are the images that `own` looks at."""
    words = words_of(line)
    if "own" in words:
        for number in range(4):
            folder = Path(words[words.index("--data.source") + 1]) / f"class {number}"
            folder.mkdir(parents=True)
            for image in range(60):
                Image.new("RGB", (8, 8)).save(folder / f"{image}.png")
    if "--config" in words:
        Path(words[words.index("--config") + 1]).write_text("ipc: 10\n")
    words = [word for word in words if word not in ("--dry-run", "--print-config")]
    assert cli.main([*words, "--print-config"]) == 0
    return capsys.readouterr().out


def build_toy(train_per_class: int = 24, test_per_class: int = 10) -> RealData:
    """Four classes of 8x8 blobs: a bright corner each, in noise."""
    generator = torch.Generator().manual_seed(7)

    def split(per_class: int) -> MemoryImages:
        labels = torch.arange(TOY_CLASSES).repeat(per_class)
        images = torch.randint(0, 120, (len(labels), 3, TOY_SIZE, TOY_SIZE), generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            top, left = 4 * (label // 2), 4 * (label % 2)
            image[:, top : top + 4, left : left + 4] += 110
        return MemoryImages(images.to(torch.uint8), labels)

    train, test = split(train_per_class), split(test_per_class)
    pixels = train.images.double() / 255
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()
    return RealData(
        name="toy",
        class_names=("north west", "north east", "south west", "süd/ost"),
        train=train,
        test=test,
        mean=tuple(mean),
        std=tuple(std),
        image_size=TOY_SIZE,
        flip=False,
        skipped_images=(),
        raw_bytes=train.images.numel(),
        stored_bytes=train.images.numel(),
    )


class ToyNet(nn.Sequential):
    """Two layers with BatchNorm, running statistics away from their start, in float32 on the CPU."""

    def __init__(self, seed: int, width: int = 6) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                nn.Conv2d(3, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(width * (TOY_SIZE // 2) ** 2, TOY_CLASSES),
            )
            for module in self:
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean, 0.0, 0.5)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias)


TOYNET_ROW = Network(lambda classes, image_size, channels: ToyNet(torch.initial_seed()), (4, 4, 4))


def build_toy_teacher(seed: int = 0, name: str | None = None) -> Teacher:
    model = ToyNet(seed).eval().requires_grad_(False)
    return Teacher(name or f"toynet{seed}", model, {"top1": 0.9, "top5": 1.0}, hash_weights(model), "made for a test")


@pytest.fixture
def toy() -> RealData:
    return build_toy()


@pytest.fixture
def toy_teachers() -> list[Teacher]:
    return [build_toy_teacher(0), build_toy_teacher(1)]


@pytest.fixture
def toynet(monkeypatch: pytest.MonkeyPatch) -> str:
    """ToyNet as a row of the table, so that configurations can name it."""
    monkeypatch.setitem(NETWORKS, "toynet", TOYNET_ROW)
    return "toynet"


TOY_COLOURS = ("red", "green", "blue sky", "süd/ost")


def draw_toy_colours(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one channel raised, or none: classes that survive the crops and flips of any recipe."""
    labels = np.arange(TOY_CLASSES).repeat(per_class)
    images = np.random.default_rng(seed).integers(0, 150, (len(labels), TOY_SIZE, TOY_SIZE, 3))
    for image, label in zip(images, labels, strict=True):
        image[..., label : label + 1] += 80
    return images.astype(np.uint8), labels


def write_toy_npz(path: Path, **changes: np.ndarray) -> Path:
    """A toy world of colours as a file that the command line can be given."""
    arrays = {"class_names": np.array(TOY_COLOURS)}
    for split, per_class, seed in (("train", 24, 1), ("test", 10, 2)):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = draw_toy_colours(per_class, seed)
    np.savez(path, **(arrays | changes))
    return path


def build_toy_recipe(npz: Path) -> Recipe:
    """Every stage in a moment: one teacher, three slots of four classes, 24 views in batches of 8."""
    train = TrainConfig(epochs=2, batch_size=8, optimizer="adamw", learning_rate=0.01, crop_padding=1, mixup_beta=0.8)
    return Recipe(
        data=DataConfig(str(npz)),
        teachers=TeachersConfig(("toynet",), recipe="fast", epochs=4, batch_size=16, learning_rate=0.05),
        ipc=4,
        infer=InferConfig(steps=4, shift_limit=1),
        labels=("static", "dynamic"),
        student=StudentConfig("toynet", train, dynamic_epochs=1),
        seeds=(0, 1),
        compute=ComputeConfig("cpu", "float32", "off", 1, 2),
    )


@pytest.fixture
def toy_recipe(tmp_path: Path, toynet: str, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe "toy", which the command line knows by that name."""
    recipe = build_toy_recipe(write_toy_npz(tmp_path / "toy.npz"))
    monkeypatch.setitem(RECIPES, "toy", recipe)
    return recipe


@dataclass(frozen=True)
class Finished:
    """An undisturbed `stillroom run toy`: not to be changed, but copied."""

    recipe: Recipe
    directory: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    recipe = build_toy_recipe(write_toy_npz(folder / "toy.npz"))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(folder / "cache"))
        patch.setitem(NETWORKS, "toynet", TOYNET_ROW)
        patch.setitem(RECIPES, "toy", recipe)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["run", "toy", "--out", str(folder / "run")])
    return Finished(recipe, folder / "run", code, out.getvalue(), without_units(err.getvalue()))


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An undisturbed `stillroom compare` of three methods at two budgets: not to be changed, but copied."""
    folder = tmp_path_factory.mktemp("compared")
    recipe = build_toy_recipe(write_toy_npz(folder / "toy.npz"))
    student = replace(recipe.student, train=replace(recipe.student.train, epochs=10))  # enough to tell students apart
    recipe = replace(recipe, labels=("static",), sre2l=Sre2lConfig(steps=3, shift_limit=1), student=student)
    words = ["compare", "toy", "--out", str(folder / "run"), "--grid.methods", "random", "sre2l", "infer"]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLROOM_CACHE", str(folder / "cache"))
        patch.setitem(NETWORKS, "toynet", TOYNET_ROW)
        patch.setitem(RECIPES, "toy", recipe)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([*words, "--grid.ipc", "3", "4"])
    return Finished(recipe, folder / "run", code, out.getvalue(), without_units(err.getvalue()))


@pytest.fixture
def plan() -> Plan:
    """Float32, eager, one thread: what the references are compared with."""
    return resolve_plan(ComputeConfig(device="cpu", precision="float32", compile="off", threads=1))


Made = TypeVar("Made")


def stopping_again_and_again(directory: Path, work: Callable[[Run], Made], looks: int = 3) -> tuple[Made, int]:
    """Do `work` in processes that each stop after some looks at the clock, within units and between them.

    Returns what the last one made, and how many were stopped.
    """
    stops = 0
    while True:
        with Run(directory) as run, pytest.MonkeyPatch.context() as patch:
            looked = iter(range(10**6))
            patch.setattr(Run, "stopping", property(lambda self, looked=looked: next(looked) >= looks))
            try:
                return work(run), stops
            except TimeLimitReached:
                stops += 1


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's teacher cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("STILLROOM_CACHE", str(cache))
    return cache
