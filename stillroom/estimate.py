"""What a recipe will take, before it starts: a few steps of each stage are timed on this machine and multiplied.

Steps run without torch.compile, so compiled stages come out faster. Images that are decoded by the batch are timed by a
few dozen of them (costs.py). Memory is what a step takes at its peak, where the system tells it, and else what it keeps
for its backward pass; of a teacher its weights, of a set what is held of it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stillroom import augment
from stillroom.artifact import can_hold
from stillroom.compute import Plan, build_generator, peak_memory, resident_memory, resolve_plan
from stillroom.costs import TIMED_READS, Cost, ImageCosts, overlap, time_images
from stillroom.data import LazyImages, RealData, load_real
from stillroom.distilled import choose_encoding, load_distilled
from stillroom.grid import Comparison, Entry, check_grid, doubt_grid, random_entry, set_name
from stillroom.labels import LABEL_BATCH, count_label_bytes, dynamic_label_bytes
from stillroom.methods import METHODS, gvbsm
from stillroom.methods.infer import makers_of, slot_count
from stillroom.methods.pixels import class_blocks, pack_blocks, slot_blocks
from stillroom.methods.recover import build_objective
from stillroom.methods.select import SCORING_BATCH, Content
from stillroom.networks import build_network
from stillroom.pipeline import check_recipe, doubt_budget
from stillroom.recipes import Recipe
from stillroom.students import soft_label_loss
from stillroom.teachers import cache_entry
from stillroom.train import (
    TrainConfig,
    apply_normalization,
    augment_images,
    build_optimizer,
    draw_mixing,
    fit_batch,
    mix_images,
)

TIMED_STEPS = 3
FRAGMENTED = 1.6  # memory that a run takes of a step's peak, since blocks freed by other stages do not all fit again
TAKEN = ("infer", "random", "herding", "k_center")  # real images, held as their files where many; others are pixels
IF_STORED = "  its labels, if stored"  # a remark: no memory is taken
TIMED_SCORES = 64  # images of a pass that is timed in place of SCORING_BATCH


@dataclass(frozen=True)
class Stage:
    """One line of the plan: seconds of work, bytes of peak memory, bytes kept on disk."""

    name: str
    work: str
    seconds: float
    memory: int
    kept: int
    held: bool = False  # whether its memory stays taken: not what a step takes, but weights, images or labels


Training = tuple[str, str, int, str]  # set, kind of label, steps and network: what is trained once however often named


def estimate_recipe(recipe: Recipe, last: str = "students") -> tuple[list[Stage], list[str]]:
    """Return the stages of `recipe` on this machine up to `last` (teachers, set or students), and remarks on them.

    Loads the data and refuses what `stillroom run` would refuse; trains and writes nothing. Cached teachers cost
    nothing and are named in the remarks.
    """
    notes: list[str] = []
    here, stages = _open(recipe, notes)
    real, plan = here.real, here.plan
    check_recipe(recipe, real)
    begun_with = resident_memory()
    if recipe.needs_teachers or last == "teachers":
        stages += _teacher_stages(recipe, here, notes)
    if last != "teachers":
        stages += _distill_stages(recipe, here)
        notes += doubt_budget(recipe, real, "set" if last == "set" else "students")
    if last == "students":
        stages += _student_stages(recipe, here, set())
    if plan.device == "cpu" and begun_with:
        held = begun_with + sum(stage.memory for stage in stages if stage.held)
        passing = (stage.memory for stage in stages if not (stage.held or stage.name == IF_STORED))
        most = held + FRAGMENTED * max(passing, default=0)
        notes.append(f"memory: {most / 2**30:.1f} GiB at most, {begun_with / 2**30:.1f} of them libraries and data")
    return stages, notes


def estimate_comparison(comparison: Comparison) -> tuple[list[Stage], list[str]]:
    """Return the stages of the whole grid on this machine, and remarks on them: as estimate_recipe does.

    What cells share is counted once; what a run directory holds already is counted too. Trainings for scores are not.
    """
    notes: list[str] = []
    here, stages = _open(comparison, notes)
    entries = check_grid(comparison, here.real)
    needed = any(entry.needs_teachers for entry in entries)
    stages += _teacher_stages(comparison, here, notes) if needed else []
    if comparison.grid.real or comparison.grid.scores:
        students = comparison.grid.students or (comparison.student.network,)
        networks = tuple(n for n in students if n not in comparison.teachers.networks or not needed)
        on_real = replace(comparison.teachers, networks=networks, source="train", checkpoints=())
        asked = replace(comparison, teachers=on_real, labelled_by=None)
        found = _teacher_stages(asked, here, notes) if networks else []
        stages += [replace(stage, name=stage.name.replace("teacher", "on all real images,")) for stage in found]
    known: set[Training] = set()
    made: set[str] = set()
    for entry in entries:
        there = entry.folder is not None or set_name(entry) in made
        made.add(set_name(entry))
        own = [] if there else _distill_stages(entry.recipe, here)
        for network in comparison.grid.students or (comparison.student.network,):
            recipe = replace(entry.recipe, student=replace(comparison.student, network=network))
            found = _student_stages(recipe, here, known, entry, comparison.distill_seed)
            own += [replace(stage, name=f"{stage.name}, {network}") for stage in found]
        name = set_name(entry) if entry.folder is None else entry.name
        stages += [replace(stage, name=f"{name}: {stage.name.strip()}") for stage in own]
    notes += doubt_grid(entries, here.real)
    if comparison.grid.scores:
        notes.append("the trainings that scores are made of are not counted")
    return stages, notes


@dataclass(frozen=True, eq=False)
class Here:
    """What every stage is timed with: the data, the plan, and what an image of them takes."""

    real: RealData
    plan: Plan
    costs: ImageCosts


def _open(recipe: Recipe, notes: list[str]) -> tuple[Here, list[Stage]]:
    resolve_plan(recipe.compute)  # a device that is not there is refused before the data is read
    begun = time.perf_counter()
    real = load_real(recipe.data)
    _ = real.fingerprint  # as a run begins; of images that are decoded by the batch it is remembered for that run
    seconds = time.perf_counter() - begun
    plan = resolve_plan(recipe.compute, notes.append, (real.classes, real.image_size))
    plan.activate()
    chunks = f", {plan.chunk_images} images of a slot at a time" if plan.chunk_images else ""
    counts = real.train.labels.bincount(minlength=real.classes).tolist()
    each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    notes.append(f"data: {len(real.train):,} training images, {each} of a class, {len(real.test):,} test images")
    notes.append(
        f"plan: {plan.device}, {plan.precision}, {plan.threads} threads, compile {plan.compile} (times are "
        f"without it), {plan.pack_slots} slots per step{chunks}"
    )
    costs = time_images(real, choose_encoding(recipe.image_encoding, real.image_size))
    work = f"{len(real.train) + len(real.test):,} images"
    if isinstance(real.train, LazyImages):
        seconds, work = 0.0, "decoded by the batch"
        train, test = (min(TIMED_READS, len(split)) for split in (real.train, real.test))
        notes.append(
            f"reading: {train} training images drawn at random took {1000 * costs.train.seconds:.1f} ms each, {test} "
            f"test images in a row {1000 * costs.test.seconds:.1f}; teachers draw a batch while a step runs"
        )
    return Here(real, plan, costs), [Stage("data", work, seconds, 0, 0)]


def _teacher_stages(recipe: Recipe, here: Here, notes: list[str]) -> list[Stage]:
    stages, real, plan = [], here.real, here.plan
    train = recipe.teachers.train
    batch = min(train.batch_size, len(real.train))
    steps = recipe.teachers.steps_for(len(real.train))
    given = {text.partition("=")[0] for text in recipe.teachers.checkpoints}
    for name in recipe.teachers.networks:
        model = build_network(name, real.classes, real.image_size)
        weights = sum(value.nbytes for value in model.state_dict().values())
        if name in given or recipe.teachers.source != "train":
            seconds = _time_accuracy(name, here)
            stages.append(Stage(f"teacher {name}", "loaded, measured", seconds, weights, 0, held=True))
        elif (cache_entry(name, real, recipe.teachers, plan) / "teacher.json").exists():
            notes.append(f"teacher {name} is in the cache")
            stages.append(Stage(f"teacher {name}", "cached", 0.0, weights, 0, held=True))
        else:
            step, drawing, memory = _time_training(model, train, batch, real, plan)
            drawing += here.costs.train * batch
            each = _each(step, drawing, isinstance(real.train, LazyImages), plan)
            seconds = each * steps + _time_accuracy(name, here)
            stages.append(Stage(f"teacher {name}", f"{steps:,} steps of {batch}", seconds, memory, weights))
    return stages


def _distill_stages(recipe: Recipe, here: Here) -> list[Stage]:
    real, plan, costs = here.real, here.plan, here.costs
    content, pixels = _content(recipe, real), 3 * real.image_size**2
    stages: list[Stage] = []
    if recipe.method == "infer":
        stages = _compensator_stages(recipe, here)
    elif recipe.method in ("sre2l", "cda", "gvbsm"):
        stages = _pixel_stages(recipe, here)
    elif recipe.method in ("rded", "herding", "k_center"):
        stages = [_score_stage(recipe, here)]
    elif recipe.method != "random":
        stages = [Stage(recipe.method, "not timed, not counted", 0.0, 0, 0)]
    kept = content.images * pixels * content.image_bits // 8
    if recipe.method in TAKEN and not can_hold(kept):  # as their files
        kept = int(content.images * costs.file_bytes)
    of_control = recipe.controls and recipe.method != "random"
    seconds = _image_seconds(recipe, content, here)
    stages.append(Stage("images", f"{content.images:,} images", seconds, kept * (1 + of_control), kept, held=True))
    train, exact = recipe.student.train, replace(plan, precision="float32")  # as labels that are stored are made
    labelled = [content.views]  # of each set: its own, random images, INFER's naturals without compensators
    labelled += [recipe.ipc * real.classes] if of_control else []
    labelled += [content.images] if recipe.controls and content.compensators else []
    if content.learned_labels:
        kept = count_label_bytes("learned", content.views, real.classes, recipe.pool, train.batch_size)
        stages.append(Stage("learned labels", f"{content.views:,} views", 0.0, kept, kept, held=True))
    for kind in ("static", "replayed"):
        if kind not in recipe.labels:
            continue
        sizes = [count_label_bytes(kind, n, real.classes, recipe.pool, train.batch_size) for n in labelled]
        passes = sum(labelled)
        if kind == "replayed":
            passes = sum(recipe.pool.epochs * (n // (batch := min(train.batch_size, n))) * batch for n in labelled)
        seconds = _time_views(recipe.labelled_by or recipe.teachers.networks, passes, real, exact)
        seconds += (_decoding(content, here) * passes).seconds
        stages.append(Stage(f"{kind} labels", f"{passes:,} views", seconds, sum(sizes), sizes[0], held=True))
    return stages


def _content(recipe: Recipe, real: RealData, entry: Entry | None = None) -> Content:
    if entry is not None and entry.folder is not None:
        distilled = load_distilled(entry.folder)
        compensators = 0 if distilled.compensators is None else distilled.compensators.codes[:, :, 0, 0, 0].numel()
        return Content(len(distilled.images), compensators, 16, distilled.view_count)
    return METHODS[recipe.method].content(real, len(recipe.teachers.networks), recipe.ipc, recipe.method_config)


def _is_stored(content: Content, real: RealData) -> bool:
    """Whether the set's images are held as their files, and decoded by the batch."""
    return content.image_bits == 8 and not can_hold(content.images * 3 * real.image_size**2)


def _decoding(content: Content, here: Here) -> Cost:
    """What decoding a view of the set takes, whose images are held as pixels where these are few."""
    return here.costs.decode if _is_stored(content, here.real) else Cost()


def _image_seconds(recipe: Recipe, content: Content, here: Here) -> float:
    """Seconds in which the images of the set and of its random control are read, encoded, and decoded again."""
    real, costs = here.real, here.costs
    reads = 0
    if recipe.method == "infer" and recipe.infer.naturals is None:
        reads = content.images * (2 if _is_stored(content, real) else 1)  # to hash them, and to encode them
    elif recipe.method in ("random", "herding", "k_center"):
        reads = content.images
    elif recipe.method == "rded":
        reads = content.images * recipe.rded.factor**2  # an image for each tile
    # Encoded once, and decoded as they are encoded and as the set is read back (or, of many, for its fingerprints).
    anew = content.images if content.image_bits == 8 else 0
    if recipe.controls and recipe.method != "random":
        control = recipe.ipc * real.classes
        reads += control
        if choose_encoding(recipe.image_encoding, real.image_size) != "png":  # the control is not saved
            anew += control
    return reads * costs.train.seconds + anew * (costs.encode.seconds + 2 * costs.decode.seconds)


def _compensator_stages(recipe: Recipe, here: Here) -> list[Stage]:
    config, real, plan = recipe.infer, here.real, here.plan
    stages: list[Stage] = []
    makers = makers_of(recipe.teachers.networks, config)
    slots = slot_count(recipe.ipc, real.classes, len(makers))
    pack = min(plan.pack_slots, slots)
    for name in makers if config.compensators else ():
        model = build_network(name, real.classes, real.image_size).eval()
        seconds, memory = _time_recovery(model, pack, real.classes, config, real, plan)
        work = f"{slots} slots x {config.steps:,} steps of {real.classes}"
        kept = slots * 3 * real.image_size**2 * config.compensator_bits // 8
        seconds *= config.steps * slots / pack
        if config.naturals is None and _is_stored(_content(recipe, real), real):
            seconds += slots * real.classes * here.costs.train.seconds
        stages.append(Stage(f"compensators {name}", work, seconds, memory, kept))
    return stages


def _score_stage(recipe: Recipe, here: Here) -> Stage:
    """What the first teacher looks at, in float32, before anything is chosen: every image, or RDED's crops."""
    real, plan = here.real, here.plan
    read, each, what = len(real.train), 1, "images"
    if recipe.method == "rded":
        counts = real.train.labels.bincount(minlength=real.classes)
        read, each = int(counts.clamp(max=recipe.rded.candidates).sum()), recipe.rded.crops_per_image
        what = "crops"
    looks = read * each
    name = recipe.teachers.networks[0]
    model = plan.place(build_network(name, real.classes, real.image_size).eval())
    images = _images(min(TIMED_SCORES, looks), real, plan)
    with torch.no_grad():
        seconds = _median_time(functools.partial(model, images), plan) / len(images)
    if recipe.method == "rded":
        sides, scale = (real.image_size, real.image_size), recipe.rded.crop_scale
        boxes = augment.draw_resized_crops(build_generator(0), len(images), *sides, scale=scale, ratio=(1.0, 1.0))
        crop = functools.partial(augment.apply_resized_crops, images, boxes, real.image_size // recipe.rded.factor)
        seconds += _median_time(crop, plan) / len(images)
    seconds = seconds * looks + read * here.costs.train.seconds
    memory = sum(value.nbytes for value in model.state_dict().values()) + SCORING_BATCH * images[0].nbytes
    return Stage(f"scores {name}", f"{looks:,} {what}", seconds, memory, 0)


def _pixel_stages(recipe: Recipe, here: Here) -> list[Stage]:
    """The stages of a method that recovers every pixel: SRe2L, CDA, G-VBSM."""
    stages, real, plan = [], here.real, here.plan
    if recipe.method == "gvbsm":
        blocks, names = class_blocks(recipe.ipc, real.classes, recipe.gvbsm.images_per_batch), recipe.teachers.networks
    else:
        config = recipe.method_config
        blocks, names = slot_blocks(recipe.ipc, real.classes, config.classes_per_batch), recipe.teachers.networks[:1]
    steps = recipe.method_config.steps
    packs = pack_blocks(blocks, real.classes, plan.pack_slots)
    size, packed = len(blocks[0]), len(packs[0])
    labels = torch.zeros(packed * size, dtype=torch.int64, device=plan.device)
    for name in names:
        model = plan.place(build_network(name, real.classes, real.image_size).eval())
        if recipe.method == "gvbsm":
            pixels = _images(len(labels), real, plan).requires_grad_()
            seconds, memory = _time_steps(_matching(model, packed, labels, recipe.gvbsm, real, plan), pixels, plan)
            images = _images(gvbsm.GATHER_BATCH, real, plan)
            with torch.no_grad():
                matcher = gvbsm.Matcher(model, 1, recipe.gvbsm.patch_side)
                once = _median_time(functools.partial(matcher, images), plan)
            batches = -(-len(real.train) // gvbsm.GATHER_BATCH)
            once = once * batches + len(real.train) * here.costs.train.seconds
            stages.append(Stage(f"statistics {name}", f"{len(real.train):,} images", once, 0, 0))
        else:
            seconds, memory = _time_recovery(model, packed, size, recipe.method_config, real, plan)
        share = steps / len(names)  # teachers take turns
        work = f"{len(blocks)} batches x {share:,.0f} steps of {size}"
        stages.append(Stage(f"images {name}", work, seconds * share * len(blocks) / packed, memory, 0))
    return stages


def _matching(
    model: nn.Module, groups: int, labels: Tensor, config: gvbsm.GvbsmConfig, real: RealData, plan: Plan
) -> Callable[[Tensor], Tensor]:
    total = gvbsm.Matcher(model, 1, config.patch_side).find_layout(real.image_size).known.nan_to_num()
    eager = replace(plan, compile="off")
    matching, layout = gvbsm.build_matching(model, total, groups, real.image_size, config, eager, 1)
    keep = torch.ones(groups, len(layout.convolutions), device=plan.device)

    def loss(views: Tensor) -> Tensor:
        label_loss, statistics_loss, _ = matching(views, labels, total.expand(groups, -1), keep)
        return (label_loss + statistics_loss).sum()

    return loss


def _time_recovery(
    model: nn.Module, groups: int, images: int, config: Any, real: RealData, plan: Plan
) -> tuple[float, int]:
    """Seconds and bytes of a step on `groups` slots of so many images; of a step in chunks, one chunk is timed.

    Memory is that of a chunk's activations and of the slots' images, uint8.
    """
    chunk = min(plan.chunk_images or images, images)
    labels = torch.zeros(groups, chunk, dtype=torch.int64, device=plan.device)
    loss = _objective(model, labels, config, replace(plan, chunk_images=0))
    pixels = _images(labels.numel(), real, plan).requires_grad_()
    seconds, memory = _time_steps(loss, pixels, plan)
    if chunk < images:  # whose chunks pass twice
        seconds, _ = _time_steps(_objective(model, labels, config, plan), pixels, plan)
    return seconds * images / chunk, memory + groups * images * 3 * real.image_size**2


def _objective(model: nn.Module, labels: Tensor, config: Any, plan: Plan) -> Callable[[Tensor], Tensor]:
    """The loss of a recovery's step as a function of its views [groups * images, 3, height, width]."""
    groups, eager = len(labels), replace(plan, compile="off")
    objective = build_objective(
        plan.place(model), groups, config.first_layer_weight, config.statistics_weight, eager, calls=1
    )

    def form(views: Tensor, rows: slice) -> Tensor:
        return views.unflatten(0, (groups, -1))[:, rows].flatten(0, 1)

    return lambda views: torch.stack(objective(views, form, labels)).sum()


def _student_stages(
    recipe: Recipe, here: Here, known: set[Training], entry: Entry | None = None, usual_seed: int = 0
) -> list[Stage]:
    """The stages of students that are not among `known`, which they join; `entry`: of a grid, whose sets these are, and
    whose distill_seed is `usual_seed`."""
    real, plan = here.real, here.plan
    content, network = _content(recipe, real, entry), recipe.student.network
    if entry is None:
        entry, usual_seed = Entry(recipe.method, recipe.method, recipe.ipc, recipe), recipe.distill_seed
    random, of_random = set_name(random_entry(entry, usual_seed)), entry.budget_ipc * real.classes
    # Naturals that are drawn are random images, and trained on once as both.
    drawn = replace(entry, budget_ipc=content.images // real.classes)
    naturals = set_name(random_entry(drawn, usual_seed)) if recipe.infer.naturals is None else f"its {set_name(entry)}"
    own = set_name(entry) if entry.folder is None else entry.name
    if recipe.method == "infer" and not recipe.infer.compensators and entry.folder is None:
        own = naturals
    by = "" if recipe.labelled_by is None else f" by {' '.join(recipe.labelled_by)}"
    config = recipe.student
    batch = min(config.train.batch_size, content.views)
    model = build_network(network, real.classes, real.image_size)
    step, forming, memory = _time_training(model, config.train, batch, real, plan)
    forming += _decoding(content, here) * batch
    looking, ahead = _time_accuracy(network, here), _is_stored(content, real)
    stages = []
    for labels in recipe.labels:
        epochs = config.train_for(labels).epochs
        steps = round(epochs * content.views / batch)
        cells: set[Training] = {(own, _kind(labels, by), steps, network)}
        if recipe.controls:  # those of pipeline.build_cells, at both budgets
            controls = [(random, "hard", of_random), (random, labels, of_random)] if recipe.method != "random" else []
            controls += [(naturals, labels, content.images)] if content.compensators else []
            for name, kind, count in controls:
                if kind != "learned":
                    alone = round(epochs * count / min(batch, count))
                    cells |= {(name, _kind(kind, by), total, network) for total in (steps, alone)}
        labellers = recipe.labelled_by or recipe.teachers.networks
        labelling = Cost()
        if labels == "dynamic":
            labelling = Cost.computed(_time_views(labellers, batch, real, plan), plan)
        hard, soft = (_each(step, drawing, ahead, plan) for drawing in (forming, forming + labelling))
        looks = -(-epochs // config.measure_every_epochs) if config.measure_every_epochs else 1
        new = cells - known
        each = sum(count * (hard if kind == "hard" else soft) for _, kind, count, _ in new) + len(new) * looks * looking
        work = f"{len(recipe.seeds)} seeds x {steps:,} steps of {batch}" + (" and controls" if len(cells) > 1 else "")
        stages.append(Stage(f"students, {labels}", work, each * len(recipe.seeds), memory, 0))
        known |= cells
        if labels == "dynamic":
            stored = dynamic_label_bytes(batch, steps, real.classes)
            stages.append(Stage(IF_STORED, f"{batch * steps:,} rows", 0.0, stored, 0))
    return stages


def _kind(labels: str, by: str) -> str:
    return labels if labels in ("hard", "learned") else labels + by


def _each(step: float, drawing: Cost, ahead: bool, plan: Plan) -> float:
    """Seconds of a training's step and of drawing its batch, meanwhile where it is drawn ahead."""
    return overlap(step, drawing, plan) if ahead else step + drawing.seconds


def _time_training(
    model: nn.Module, train: TrainConfig, batch: int, real: RealData, plan: Plan
) -> tuple[float, Cost, int]:
    """Seconds of a step, what forming its batch of pixels takes (cropped, flipped, mixed), and bytes of memory."""
    model = plan.place(model).train()
    targets = torch.zeros(batch, real.classes, device=plan.device)
    images = _images(batch, real, plan)
    seconds, memory = _time_steps(lambda images: soft_label_loss(model(images).float(), targets, 1.0), images, plan)
    seconds += _median_time(build_optimizer(model, train, plan.dtype).step, plan)
    pixels, generator = images.to(torch.uint8), build_generator(0)

    def form() -> Tensor:
        formed = apply_normalization(augment_images(pixels, train, real.flip, generator), real.mean, real.std)
        return mix_images(formed, draw_mixing(train, formed, generator))

    weights = sum(parameter.nbytes for parameter in model.parameters())
    # Weights, gradients, at most two moments.
    return seconds, Cost.computed(_median_time(form, plan), plan), memory + 4 * weights


def _time_accuracy(network: str, here: Here) -> float:
    """Seconds in which a network is measured on the test split."""
    count = len(here.real.test)
    return _time_views([network], count, here.real, here.plan) + count * here.costs.test.seconds


def _time_views(networks: Sequence[str], views: int, real: RealData, plan: Plan) -> float:
    """Seconds in which all `networks` pass so many images, of which a few are timed."""
    images = _images(min(TIMED_SCORES, fit_batch(LABEL_BATCH, real.image_size), views), real, plan)
    together = 0.0
    for name in networks:
        model = plan.place(build_network(name, real.classes, real.image_size).eval())
        with torch.no_grad(), plan.autocast():
            together += _median_time(functools.partial(model, images), plan)
    return together * views / len(images)


def _time_steps(loss: Callable[[Tensor], Tensor], images: Tensor, plan: Plan) -> tuple[float, int]:
    """Return seconds per forward and backward pass, and the bytes that these take: at their peak, where that is told,
    and else what the forward pass keeps for the backward one."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step() -> None:
        with plan.autocast():
            value = loss(images)
        value.backward()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        step()
    peak = peak_memory(step, plan.device)
    return _median_time(step, plan), max(sum(kept.values()), peak or 0)


def _median_time(work: Callable[[], object], plan: Plan) -> float:
    times = []
    for _ in range(TIMED_STEPS):
        begun = time.perf_counter()
        work()
        if plan.device.startswith("cuda"):
            torch.cuda.synchronize(plan.device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _images(batch: int, real: RealData, plan: Plan) -> Tensor:
    images = torch.zeros(batch, 3, real.image_size, real.image_size, device=plan.device)
    return images.contiguous(memory_format=plan.memory_format)
