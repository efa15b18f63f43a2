"""What networks see in sets: duplication by budget (Figure 4, left), boundaries between classes (Figure 2, right)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from stillroom.analysis.duplication import FEATURE_BATCH, compute_features, feature_duplication, mean_over_classes
from stillroom.arrays import Boundaries, Duplication
from stillroom.compute import build_generator, derive_seed
from stillroom.errors import StillroomError
from stillroom.images import Images
from stillroom.methods.select import rows_by_class
from stillroom.study import NATURALS, REAL, Study
from stillroom.train import apply_normalization, fit_batch

REAL_PER_CLASS = 50  # real images of a class that duplication is measured on
CLASSES = 7  # as in the paper's figure
PER_CLASS = 50  # test images of each, at most
NEIGHBOURS = 15
GRID = 50  # points a side
MARGIN = 0.03  # around the images, in which nothing is cut off
PERPLEXITY = 30.0


def measure_duplication(study: Study) -> Duplication:
    """Return the mean cosine similarity of two views of a class for every set of the runs, and of two real images.

    Of the penultimate features of the first teacher. Raises StillroomError where all sets have one budget.
    """
    wanted = [m for m in study.made if m.method in study.config.sets or not set(study.config.sets) - {REAL, NATURALS}]
    if len({made.ipc for made in wanted}) < 2:
        raise StillroomError(
            f"{', '.join(map(str, study.runs))} has sets of one budget alone, but duplication is drawn against ipc; "
            "give several runs, or make a comparison: stillroom compare RECIPE --grid.methods random sre2l infer "
            "--grid.ipc 5 10"
        )
    teacher, real = study.teachers[0], study.real
    rows = torch.cat([own[:REAL_PER_CLASS] for own in rows_by_class(real, 1)])
    features = features_of(study, teacher.model, real.train, rows)
    return Duplication(
        dataset=real.name,
        teacher=teacher.name,
        real=_or_nan(mean_over_classes(features, real.train.labels[rows])),
        real_per_class=min(REAL_PER_CLASS, int(real.train.labels.bincount().max())),
        method=np.array([made.method for made in wanted]),
        ipc=np.array([made.ipc for made in wanted]),
        similarity=np.array([_or_nan(feature_duplication(made.distilled, teacher, study.plan)) for made in wanted]),
    )


def _or_nan(value: float | None) -> float:
    """Return a number that is not drawn where there is none: of one view a class."""
    return float("nan") if value is None else value


def map_boundaries(study: Study) -> Boundaries:
    """Return test images of seven random classes as students see them in a plane, and what is predicted around them.

    Confessed: the paper does not say how its boundaries are drawn into t-SNE's plane. Here each point of it belongs to
    the class that most of its nearest images are predicted as, by the student and among these classes alone.
    """
    real, config = study.real, study.config
    names = study.shown
    order = torch.randperm(real.classes, generator=build_generator(config.draw, "figure", "classes"))
    classes = order[:CLASSES].sort().values
    rows = torch.cat([(real.test.labels == index).nonzero().flatten()[:PER_CLASS] for index in classes])
    true = torch.searchsorted(classes, real.test.labels[rows]).numpy()
    seed = derive_seed(config.draw, "figure", "t-sne") % 2**31
    planes, predictions, regions = [], [], []
    line = (np.arange(GRID) + 0.5) / GRID
    for name in names:
        model = study.student(name, config.seeds[0])
        predicted = study.predict(model, real.test, rows)[:, classes].argmax(1).numpy()
        plane = embed(features_of(study, model, real.test, rows).numpy(), seed)
        planes.append(plane)
        predictions.append(predicted)
        regions.append(classify_plane(plane, predicted, line, line))
    return Boundaries(
        dataset=real.name,
        student=study.student_config.network,
        labels=study.labels,
        neighbours=min(NEIGHBOURS, len(rows)),
        set=np.array(names),
        steps=np.array([study.steps(name) for name in names]),
        accuracy=np.array([(predicted == true).mean() for predicted in predictions]),
        name=np.array([real.class_names[index] for index in classes]),
        true=true,
        x=np.stack([plane[:, 0] for plane in planes]),
        y=np.stack([plane[:, 1] for plane in planes]),
        predicted=np.stack(predictions),
        down=line,
        across=line,
        region=np.stack(regions),
    )


def features_of(study: Study, model: nn.Module, images: Images, rows: Tensor) -> Tensor:
    """Return a network's penultimate features of `rows` of real images, float32 [rows, features], on the CPU."""

    def form(some: Tensor) -> Tensor:
        return apply_normalization(images.batch(rows[some]).to(study.plan.device), study.real.mean, study.real.std)

    return compute_features(model, form, len(rows), fit_batch(FEATURE_BATCH, study.real.image_size))


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """Return t-SNE's plane of features [n, d], scaled to lie within [0, 1] with a margin: float64 [n, 2]."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    plane = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features.astype(np.float64))
    low, high = plane.min(0), plane.max(0)
    scaled = (plane - low) / np.where(high > low, high - low, 1.0)
    return np.asarray(MARGIN + (1 - 2 * MARGIN) * scaled, dtype=np.float64)


def classify_plane(plane: np.ndarray, predicted: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Return the class that most of the nearest images [n, 2] are predicted as, int64 [down, across]."""
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(min(NEIGHBOURS, len(plane))).fit(plane, predicted)
    x, y = np.meshgrid(across, down)
    return np.asarray(classifier.predict(np.stack([x.ravel(), y.ravel()], axis=1)).reshape(x.shape), dtype=np.int64)
