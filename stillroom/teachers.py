"""Teachers (squeeze): networks trained on the real data, cached by the hash of everything that made them, frozen.

    teachers = load_teachers(real, TeachersConfig(networks=("resnet18", "convnet")), plan, run)

Every teacher is measured on the real test split before it is used; one near chance stops the run. The cache is the
folder `TeachersConfig.cache`, or else the environment variable STILLROOM_CACHE, or else ~/.cache/stillroom.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.compute import Plan
from stillroom.data import LazyImages, RealData
from stillroom.errors import StillroomError, check_choices
from stillroom.events import read_events
from stillroom.files import (
    LOOKS,
    cache_root,
    hash_tensors,
    load_tensors,
    load_torch,
    open_unlinked,
    read_sealed,
    save_tensors,
    seal,
    write_json,
)
from stillroom.networks import build_network, load_pretrained_imagenet
from stillroom.run import Checkpoint, Run
from stillroom.train import (
    Epochs,
    TrainConfig,
    apply_normalization,
    augment_images,
    fit,
    measure_accuracy,
)
from stillroom.workers import LOOK_SECONDS

# A teacher must be better than guessing would be in all but this share of tries.
GUESSING = 0.02

TEACHER_FORMAT = 1  # changes when training changes in a way that the settings do not show
STUDENT_SETTINGS = ("cosine_slowdown", "shuffle_patches")  # of training, which all teachers leave as they are

# The recipe that the field trains CIFAR teachers with (SRe2L, INFER): ResNet-18 reaches 78.7 % on CIFAR-100.
FIELD = TrainConfig(epochs=200, batch_size=128, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4)

# Ours: a tenth of the epochs. Orthogonal steps go further than gradients do, a learning rate that rises and falls once
# needs no plateau, and a decay this strong makes up for few epochs. benchmarks/teacher_recipes.py compares the two.
FAST = TrainConfig(
    epochs=20,
    batch_size=128,
    optimizer="muon",
    learning_rate=4e-3,
    weight_decay=0.25,
    momentum=0.95,
    schedule="one_cycle",
    decay_norms=False,
)
TEACHER_RECIPES = {"field": FIELD, "fast": FAST}


@dataclass(frozen=True)
class TeachersConfig:
    """Which teachers there are and how they come to be."""

    networks: tuple[str, ...] = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2")
    recipe: Literal["field", "fast"] = "field"
    epochs: int | None = None  # in place of the recipe's
    batch_size: int | None = None
    learning_rate: float | None = None
    least_steps: int = 0  # train on past the epochs until as many steps: a few hundred images make an epoch of one step
    source: Literal["train", "imagenet"] = "train"  # imagenet: torchvision's IMAGENET1K_V1 weights
    equal_norms: bool = False  # scale logits to the mean norm of all teachers' before their mean is a label (G-VBSM)
    checkpoints: tuple[str, ...] = ()  # NETWORK=FILE: your weights (safetensors, or a state_dict saved by torch)
    seed: int = 0
    cache: str | None = None  # folder of trained teachers; None: $STILLROOM_CACHE, or else ~/.cache/stillroom

    def __post_init__(self) -> None:
        check_choices(self, "teachers")
        _ = self.train  # refuses overrides that are out of range
        if self.least_steps < 0:
            raise StillroomError(f"teachers.least_steps is {self.least_steps}; give 0 or more")

    @property
    def train(self) -> TrainConfig:
        """The recipe with its overrides."""
        given = {k: getattr(self, k) for k in ("epochs", "batch_size", "learning_rate") if getattr(self, k) is not None}
        return replace(TEACHER_RECIPES[self.recipe], **given)

    def steps_for(self, images: int) -> int:
        """The optimiser steps in which a teacher is trained on so many images."""
        train = self.train
        return max(self.least_steps, train.epochs * (images // min(train.batch_size, images)))


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen network in eval mode, on the plan's device.

    accuracy: {"top1", "top5"}, shares in [0, 1] on the real test split; hash: sha256 of the weights; equal_norms:
    whether its logits are scaled where it labels with others, as `labels.ensemble_logits` says.
    """

    name: str
    model: nn.Module
    accuracy: dict[str, float]
    hash: str
    source: str
    equal_norms: bool = False

    def facts(self) -> dict[str, Any]:
        """What the artifact's manifest keeps of the teacher."""
        return {"name": self.name, "accuracy": self.accuracy, "hash": self.hash, "source": self.source}


def load_teachers(
    real: RealData, config: TeachersConfig, plan: Plan, run: Run, hashes: Mapping[str, str] = MappingProxyType({})
) -> list[Teacher]:
    """Return the configured teachers of `real`, training those that are not in the cache.

    A network that `hashes` names has those weights, however they were trained, and is never trained in their place.
    Raises StillroomError for names twice, checkpoints that do not fit, a teacher near chance, and weights that the
    cache lacks; TimeLimitReached where the run is to stop (an unfinished training is kept in the cache and continued).
    """
    check_config(config, real)
    files = _checkpoint_files(config)
    entries = {name: cache_entry(name, real, config, plan) for name in config.networks}
    if config.source == "train":
        known = hashes.keys() & (set(config.networks) - set(files))
        entries |= _begun_with(entries, config, run)
        entries |= {name: find_weights(name, hashes[name], config) for name in known}
    teachers: dict[str, Teacher] = {}
    for wait in (False, True):  # first those that no other process is training
        for name in config.networks:
            if name in teachers:
                continue
            if name in files:
                model, source = load_checkpoint(name, files[name], real), f"file {files[name].name}"
                teacher = _finish(name, model, source, real, plan)
            elif config.source == "imagenet":
                teacher = _finish(name, load_pretrained_imagenet(name), "torchvision IMAGENET1K_V1", real, plan)
            else:
                with _entry_lock(entries[name], run, wait) as locked:
                    if not locked:
                        continue
                    teacher = _train_or_load(name, entries[name], real, config, plan, run)
            check_above_chance(teacher, real)
            run.event("teacher", **teacher.facts())
            teachers[name] = replace(teacher, equal_norms=config.equal_norms)
    return [teachers[name] for name in config.networks]


def check_config(config: TeachersConfig, real: RealData) -> None:
    """Raise StillroomError for names twice or none, checkpoints that are not there, and ImageNet's for other data."""
    if not config.networks:
        raise StillroomError("teachers.networks is empty; name at least one network, such as resnet18")
    for name in config.networks:
        if config.networks.count(name) > 1:
            raise StillroomError(f"teachers.networks names {name!r} twice; name each network once")
    files = _checkpoint_files(config)
    if config.source == "imagenet" and real.classes != 1000 and set(config.networks) - set(files):
        raise StillroomError(
            f"teachers.source is 'imagenet', whose networks know 1000 classes, but {real.name!r} has "
            f"{real.classes}; use --teachers.source train"
        )


def teacher_key(name: str, real: RealData, config: TeachersConfig, plan: Plan) -> dict[str, Any]:
    """Return everything that decides the weights of a trained teacher; its hash names the cache entry."""
    return {
        "format": TEACHER_FORMAT,
        "network": name,
        "data": real.fingerprint,
        "image_size": real.image_size,
        "mean": real.mean,
        "std": real.std,
        "flip": real.flip,
        # Without what came later and no teacher has: one that was trained before would be trained again.
        "train": {k: v for k, v in asdict(config.train).items() if k not in STUDENT_SETTINGS},
        "steps": config.steps_for(len(real.train)),
        "seed": config.seed,
        # Not how recoveries are cut, nor which of several cards: `processor` names the kind.
        "plan": {
            k: v
            for k, v in plan.as_dict().items()
            if k not in ("pack_slots", "chunk_images") and (k, v) != ("processes", 1)
        }
        | {"device": plan.device.split(":")[0]},
        **{name: importlib.metadata.version(name) for name in ("torchvision", "timm")},
    }


def cache_entry(name: str, real: RealData, config: TeachersConfig, plan: Plan) -> Path:
    """Return the folder that holds this teacher, or will."""
    text = json.dumps(teacher_key(name, real, config, plan), sort_keys=True)
    folder = f"{name.replace(':', '-')}-{Path(real.name).name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return cache_root(config.cache) / "teachers" / folder


def _begun_with(entries: Mapping[str, Path], config: TeachersConfig, run: Run) -> dict[str, Path]:
    """Return the cache entries of teachers that this run went by before, where their own are not there.

    What decides bits, such as the version of torch or the number of processes, may have changed since: teachers that
    are trained anew would be others, and the run's finished units would be refused.
    """
    if run.directory is None:
        return {}
    hashes = {
        event.get("name"): event.get("hash") for event in read_events(run.directory) if event["event"] == "teacher"
    }
    found = {}
    for name, entry in entries.items():
        if name in hashes and not (entry / "teacher.json").exists():
            with contextlib.suppress(StillroomError):  # gone from the cache, too: train it
                found[name] = find_weights(name, str(hashes[name]), config)
    return found


def find_weights(name: str, weights_hash: str, config: TeachersConfig) -> Path:
    """Return the cache entry of these weights of network `name`; raises StillroomError where there is none."""
    folder = cache_root(config.cache) / "teachers"
    for done in sorted(folder.glob(f"{name.replace(':', '-')}-*/teacher.json")):
        if read_sealed(done, ("hash",))["hash"] == weights_hash:
            return done.parent
    raise StillroomError(
        f"the teacher {name!r} that the set was made with (weights {weights_hash[:12]}) is not in the cache {folder}; "
        f"say where it is by --teachers.cache DIR or --teachers.checkpoints {name}=FILE, or label with teachers that "
        f"are trained anew by --teachers.networks {' '.join(config.networks)}"
    )


def untrained_teachers(real: RealData, config: TeachersConfig, plan: Plan) -> list[str]:
    """Return the networks that `load_teachers` would have to train."""
    loaded = config.networks if config.source != "train" else _checkpoint_files(config)
    own = [name for name in config.networks if name not in loaded]
    return [name for name in own if not (cache_entry(name, real, config, plan) / "teacher.json").exists()]


def _train_or_load(name: str, entry: Path, real: RealData, config: TeachersConfig, plan: Plan, run: Run) -> Teacher:
    """Return the teacher of a cache entry that is locked: two runs that want the same one train it once."""
    model = build_network(name, real.classes, real.image_size, seed=config.seed)
    if not (entry / "teacher.json").exists():
        history = train_teacher(model, name, real, config, plan, run, Checkpoint(entry / "checkpoint.safetensors"))
        accuracy = {k: history[-1][k] for k in ("top1", "top5")}
        save_tensors(entry / "weights.safetensors", _weights(model), {})
        key = teacher_key(name, real, config, plan)
        made = {"accuracy": accuracy, "hash": hash_weights(model), "key": key, "history": history}
        write_json(entry / "teacher.json", seal(made, {}, entry / "teacher.json"))
        (entry / "checkpoint.safetensors").unlink(missing_ok=True)
        run.check_time()
    facts = read_sealed(entry / "teacher.json", ("accuracy", "hash"))
    tensors, _ = load_tensors(entry / "weights.safetensors")
    try:
        model.load_state_dict(tensors)
        fits = hash_weights(model) == facts["hash"]
    except RuntimeError:  # other names or shapes
        fits = False
    if not fits:
        raise StillroomError(
            f"cached teacher {str(entry)!r} is damaged (its weights' hash differs); delete that folder"
        )
    return Teacher(name, _freeze(model, plan), facts["accuracy"], facts["hash"], f"trained, {config.recipe} recipe")


def train_teacher(
    model: nn.Module,
    name: str,
    real: RealData,
    config: TeachersConfig,
    plan: Plan,
    run: Run,
    checkpoint: Checkpoint,
) -> list[dict[str, float]]:
    """Train `model` in place on the real training split; return one row per epoch, the last with the test accuracy."""
    train = config.train
    images = real.train.to(plan.device)
    labels = real.train.labels.to(plan.device)

    def draw_batch(rows: Tensor, generator: torch.Generator, drawn_step: int) -> tuple[Tensor, Tensor]:
        batch = augment_images(images.batch(rows).to(plan.device, non_blocking=True), train, real.flip, generator)
        return apply_normalization(batch, real.mean, real.std), labels[rows.to(plan.device, non_blocking=True)]

    return fit(
        model,
        train,
        Epochs(len(real.train), train.batch_size, config.seed, ("teacher", name)),
        draw_batch,
        nn.functional.cross_entropy,
        plan,
        run,
        checkpoint,
        label=f"teacher {name}",
        total_steps=config.steps_for(len(real.train)),
        measure=lambda m: measure_accuracy(m, real.test, real.mean, real.std, plan),
        ahead=isinstance(real.train, LazyImages),
    )


def load_checkpoint(name: str, path: Path, real: RealData) -> nn.Module:
    """Return network `name` with the weights of `path`: a .safetensors file, or a state_dict saved by torch.

    Only tensors are read (``weights_only``), never pickled code. A dictionary with ``state_dict`` and keys that begin
    with ``module.``, as INFER's published teachers have, is accepted. Raises StillroomError where the file cannot be
    read or its keys and shapes are not the network's, listing them: weights are never half loaded.
    """
    if path.suffix == ".safetensors":
        state: Any = load_tensors(path)[0]
    else:
        try:
            state = load_torch(path)
        except Exception as error:  # torch raises many kinds for a bad file
            raise StillroomError(
                f"checkpoint {str(path)!r} cannot be read as weights ({str(error).splitlines()[0]}); save the "
                "network's state_dict alone: torch.save(model.state_dict(), path)"
            ) from error
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise StillroomError(f"checkpoint {str(path)!r} holds no state_dict; save torch.save(model.state_dict(), path)")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    model = build_network(name, real.classes, real.image_size)
    own = model.state_dict()
    problems = [f"missing {key}" for key in own.keys() - state.keys()]
    problems += [f"unexpected {key}" for key in state.keys() - own.keys()]
    problems += [
        f"{key} is {list(state[key].shape)}, the network's {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise StillroomError(
            f"checkpoint {str(path)!r} does not fit {name} for {real.classes} classes at {real.image_size} px:\n"
            f"  {shown}{more}"
        )
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise StillroomError(f"checkpoint {str(path)!r} has values that are not finite in {', '.join(bad[:5])}")
    model.load_state_dict(state)
    return model


def check_above_chance(teacher: Teacher, real: RealData) -> None:
    """Raise StillroomError for a teacher whose test accuracy guessing would reach too, in one of fifty tries or more.

    A test split so small that guessing could be right throughout cannot tell, and lets every teacher pass.
    """
    count, chance = len(real.test), 1 / real.classes
    right = round(teacher.accuracy["top1"] * count)
    if chance_of_guessing(count, count, chance) < GUESSING <= chance_of_guessing(right, count, chance):
        classes = ", ".join(real.class_names[:3]) + (", ..." if real.classes > 3 else "")
        raise StillroomError(
            f"teacher {teacher.name!r} ({teacher.source}) is right on {right} of {count} test images of {real.name!r}, "
            f"which guessing among {real.classes} classes may reach too: near chance. Train it longer "
            f"(--teachers.epochs, --teachers.least-steps), or check the order of the labels (class names: {classes}), "
            f"the normalisation (mean {_short(real.mean)}, std {_short(real.std)}) and the architecture"
        )


def _short(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def chance_of_guessing(right: int, count: int, chance: float) -> float:
    """Return the probability that guessing is right `right` times or more in `count` (a binomial tail)."""

    def log_probability(k: int) -> float:
        ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        return ways + k * math.log(chance) + (count - k) * math.log1p(-chance)

    return min(1.0, sum(math.exp(log_probability(k)) for k in range(right, count + 1)))


def list_cache(cache: str | None = None) -> list[tuple[Path, int, str]]:
    """Return (folder, bytes, what it is) of every cached teacher, finished or not."""
    rows = []
    for entry in sorted((cache_root(cache) / "teachers").glob("*/")):
        size = 0
        for file in entry.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process replaces its checkpoint meanwhile
                size += file.stat().st_size
        done = entry / "teacher.json"
        text = "unfinished"
        if done.exists():
            try:
                text = f"top-1 {read_sealed(done, ('accuracy',))['accuracy']['top1']:.1%}"
            except StillroomError:
                text = "damaged"
        rows.append((entry, size, text))
    return rows


def empty_cache(cache: str | None = None) -> tuple[list[Path], list[Path]]:
    """Delete every cached teacher but those that another process is training; return the folders deleted and kept.

    What `files.remembered` keeps there goes, too.
    """
    deleted, kept = [], []
    shutil.rmtree(cache_root(cache) / LOOKS, ignore_errors=True)
    for entry, _, _ in list_cache(cache):
        lock = _try_lock(entry, alone=True)
        if lock is None:
            kept.append(entry)
            continue
        try:
            with lock:
                # Out of the way at once: who waits for the lock begins anew in a folder that nobody is deleting.
                shutil.rmtree(entry.rename(entry.with_name(f"{entry.name}.{secrets.token_hex(4)}.deleted")))
        except OSError as error:
            raise _not_writable(entry.parent, error) from error
        deleted.append(entry)
    return deleted, kept


def hash_weights(model: nn.Module) -> str:
    """Return the sha256 of names, dtypes, shapes and bytes of all parameters and buffers."""
    return hash_tensors(model.state_dict())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def _finish(name: str, model: nn.Module, source: str, real: RealData, plan: Plan) -> Teacher:
    weights_hash = hash_weights(model)
    model = _freeze(model, plan)
    return Teacher(name, model, measure_accuracy(model, real.test, real.mean, real.std, plan), weights_hash, source)


def _freeze(model: nn.Module, plan: Plan) -> nn.Module:
    return plan.place(model).eval().requires_grad_(False)


def _checkpoint_files(config: TeachersConfig) -> dict[str, Path]:
    files = {}
    for text in config.checkpoints:
        name, equals, path = text.partition("=")
        if not equals or name not in config.networks:
            raise StillroomError(
                f"teachers.checkpoints has {text!r}; give NETWORK=FILE with a network of teachers.networks "
                f"({', '.join(config.networks)})"
            )
        files[name] = Path(path).expanduser()
        if not files[name].is_file():
            raise StillroomError(f"teachers.checkpoints has {text!r}, but {str(files[name])!r} is not a file")
    return files


@contextlib.contextmanager
def _entry_lock(entry: Path, run: Run, wait: bool = True) -> Iterator[bool]:
    """Keep other processes from training or deleting the cache entry; wait for one that does, or yield False.

    A finished teacher is only kept from being deleted: several may load it at once.
    """
    waited = False
    while (lock := _try_lock(entry, alone=False)) is None:
        if not wait:
            yield False
            return
        if not waited:
            run.notice(f"waiting for another process that trains teacher {entry.name}")
        waited = True
        run.check_time()
        time.sleep(LOOK_SECONDS)
    with lock:
        yield True


def _try_lock(entry: Path, alone: bool) -> contextlib.AbstractContextManager[Any] | None:
    """Return the lock of the cache entry, whose folder is made if need be, or None where another process holds it.

    alone: whether to hold it alone also where the teacher is finished.

    A finished teacher in a cache that can only be read needs no lock, since nobody can change it. Raises StillroomError
    for an unfinished one there.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two runs at once may both train it; the later result replaces the equal earlier
        return contextlib.nullcontext()
    while True:
        try:
            entry.mkdir(parents=True, exist_ok=True)
            lock = open(entry / ".lock", "a+", opener=open_unlinked)  # noqa: SIM115 - kept open for as long as it is held
        except OSError as error:
            if isinstance(error, FileNotFoundError) and entry.parent.is_dir():
                continue  # deleted in between
            if (entry / "teacher.json").exists():
                return contextlib.nullcontext()
            raise _not_writable(entry.parent, error) from error
        with contextlib.ExitStack() as opened, contextlib.suppress(FileNotFoundError):
            opened.enter_context(lock)
            try:
                shared = not alone and (entry / "teacher.json").exists()
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            # Deleted since it was opened, it would keep nobody out.
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(entry / ".lock")):
                return opened.pop_all()


def _not_writable(folder: Path, error: OSError) -> StillroomError:
    return StillroomError(
        f"the teacher cache {folder} cannot be written ({error.strerror}); name another by --teachers.cache (clean: "
        "--cache), or change its permissions"
    )
