"""Pictures of students: boundaries, loss landscapes, right predictions by difficulty, calibration, classes, labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.arrays import Boundaries, Calibration, ClassAccuracy, Difficulty, LabelDivergence, Landscape
from stillroom.figures.style import (
    COLOURS,
    SURFACE,
    bars_of,
    colours_of,
    few_ticks,
    listed,
    markers_of,
    new_figure,
    of_steps,
    panels,
    plain_ticks,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY_CLASSES = 20  # more are drawn as a sorted curve, not by name


def _students(arrays: Boundaries | Landscape | Difficulty | Calibration | ClassAccuracy) -> str:
    """Return whose students these are: network, labels, steps, in a sentence for captions."""
    steps = listed(of_steps(*pair) for pair in zip(arrays.set.tolist(), arrays.steps.tolist(), strict=True))
    return f"Students: {arrays.student}, {arrays.labels} labels, trained on {steps}."


def _in_steps(arrays: Boundaries | Landscape | Difficulty | Calibration | ClassAccuracy) -> str:
    """Return how long these students were trained, to end a sentence."""
    trained = dict(zip(arrays.set.tolist(), arrays.steps.tolist(), strict=True))
    real = trained.pop("real", 0)
    alike = len(set(trained.values())) == 1
    said = f"in {max(trained.values()):,} steps" if alike else listed(of_steps(*pair) for pair in trained.items())
    parts = [] if not trained else [f"students of sets {'trained ' if alike else ''}{said}"]
    parts += [f"that of real images in {real:,}, as teachers are"] if real else []
    return f" ({', '.join(parts)})" if parts else ""


def _seeds(arrays: Difficulty | Calibration | ClassAccuracy, shown: str) -> str:
    """Return how many seeds there are and what is `shown` of them."""
    if len(arrays.seed) == 1:
        return "One seed."
    return f"{shown} {len(arrays.seed)} seeds{'; the student on real images has one' if 'real' in arrays.set else ''}."


def _over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return mean and error bars of values [set, seed, ...] over the seeds; no bars for one seed."""
    return values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else None


@styled
def draw_boundaries(arrays: Boundaries) -> Figure:
    """Figure 2, right: a plane per student; fields are what it predicts, points are test images by their class."""
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D

    caption = (
        f"t-SNE of each student's penultimate features of {len(arrays.true)} test images of {len(arrays.name)} random "
        "classes; distances in it mean little. Points: true class, crosses are predicted wrongly. Fields: what the "
        f"student predicts, among these classes, for most of the {arrays.neighbours} nearest images. "
        f"{_students(arrays)}"
    )
    count = len(arrays.set)
    figure = new_figure(
        f"Decision boundaries of students, {arrays.dataset}", caption, 1 + 2.3 * count, 3.6, square=True
    )
    colours = COLOURS[: len(arrays.name)]
    scale: dict[str, Any] = {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": len(arrays.name) - 0.5}
    for index, axes in enumerate(panels(figure, count)):
        axes.imshow(arrays.region[index], alpha=0.3, extent=(0, 1, 0, 1), origin="lower", aspect="equal", **scale)
        for one in np.unique(arrays.region[index]):
            axes.contour(
                arrays.across, arrays.down, arrays.region[index] == one, [0.5],
                colors=[axes.xaxis.label.get_color()], linewidths=0.7,
            )  # fmt: skip
        right = arrays.predicted[index] == arrays.true
        for chosen, marker, size in ((right, "o", 5), (~right, "x", 8)):
            place = arrays.x[index][chosen], arrays.y[index][chosen]
            axes.scatter(*place, s=size, c=arrays.true[chosen], marker=marker, linewidths=0.8, **scale)
        axes.set_title(f"{arrays.set[index]}: {100 * arrays.accuracy[index]:.0f} % right")
        axes.set_xticks([])
        axes.set_yticks([])
    shown = [
        Line2D([], [], color=colour, marker="o", linestyle="none", label=name)
        for name, colour in zip(arrays.name, colours, strict=True)
    ]
    figure.legend(handles=shown, loc="outside right center")
    return figure


def describe_boundaries(arrays: Boundaries) -> str:
    """Return how many test images of the classes each student gets right, in one sentence."""
    shares = zip(arrays.set, arrays.accuracy, strict=True)
    parts = [f"the student on {name} gets {100 * share:.0f} % right" for name, share in shares]
    shown = f"Test images of {len(arrays.name)} classes of {arrays.dataset} in t-SNE's plane"
    return f"{shown}: {listed(parts)}{_in_steps(arrays)}."


@styled
def draw_landscape(arrays: Landscape) -> Figure:
    """Figure 5: each student's loss as a surface, and as contours below it, all in one scale."""
    caption = (
        f"Mean over {arrays.images} random test images, which are the centre (0, 0). At 1 along either axis lies an "
        f"image of another class, the same for all students. One seed. {_students(arrays)}"
    )
    count = len(arrays.set)
    figure = new_figure(f"Loss around test images in pixel space, {arrays.dataset}", caption, 1 + 2.3 * count, 5.8)
    places = figure.add_gridspec(2, count, height_ratios=(1.25, 1))
    first, second = np.meshgrid(arrays.first, arrays.second, indexing="ij")
    levels = few_ticks(count=12).tick_values(arrays.loss.min(), arrays.loss.max())
    scale: dict[str, Any] = {"cmap": SURFACE, "vmin": levels[0], "vmax": levels[-1]}
    flats: list[Any] = []
    for index, name in enumerate(arrays.set):
        surface: Any = figure.add_subplot(places[0, index], projection="3d")
        surface.plot_surface(first, second, arrays.loss[index], rstride=1, cstride=1, antialiased=False, **scale)
        surface.set_zlim(levels[0], levels[-1])
        surface.set_title(name)
        surface.set_box_aspect(None, zoom=1.15)
        surface.set_facecolor("none")
        surface.grid(False)
        surface.tick_params(labelsize=6, pad=-3)
        for axis in (surface.xaxis, surface.yaxis, surface.zaxis):
            axis.set_pane_color((0.5, 0.5, 0.5, 0.12))
            axis.set_major_locator(few_ticks())
        flat = figure.add_subplot(places[1, index], sharey=flats[0] if flats else None)
        drawn = flat.contourf(first, second, arrays.loss[index], levels, **scale)
        flat.contour(first, second, arrays.loss[index], levels, colors="black", linewidths=0.3)
        flat.plot(0, 0, marker="+", color="white", markersize=8)
        flat.set_aspect("equal")
        flat.set_xlabel("towards another class")
        flat.tick_params(labelleft=not flats)
        flats.append(flat)
    flats[0].set_ylabel("towards a third class")
    figure.colorbar(drawn, ax=flats, label="cross-entropy, nats")
    return figure


def describe_landscape(arrays: Landscape) -> str:
    """Return each student's loss at the centre and at the other classes, in one sentence."""
    at = [(np.abs(values - place)).argmin() for values in (arrays.first, arrays.second) for place in (0, 1)]
    parts = [
        f"on {name} {loss[at[0], at[2]]:.1f} nats at the images, {loss[at[1], at[2]]:.1f} at those of another class"
        for name, loss in zip(arrays.set, arrays.loss, strict=True)
    ]
    return f"Students' loss around {arrays.images} test images of {arrays.dataset}: {listed(parts)}{_in_steps(arrays)}."


@styled
def draw_difficulty(arrays: Difficulty) -> Figure:
    """Figure 8: a line per student over intervals of difficulty, easy images to the left."""
    caption = (
        f"Test images in {len(arrays.count)} intervals of about {int(np.median(arrays.count)):,} by the cross-entropy "
        f"of {arrays.reference}, trained on all real images. {_seeds(arrays, 'Mean and standard deviation of')} "
        f"{_students(arrays)}"
    )
    figure = new_figure(f"Right predictions by difficulty, {arrays.dataset}", caption, 7.5, 4.6)
    axes = figure.subplots()
    mean, deviation = _over_seeds(100 * arrays.right / arrays.count)
    places = np.arange(len(arrays.count))
    colours, markers = colours_of(arrays.set), markers_of(arrays.set)
    for index, name in enumerate(arrays.set.tolist()):
        bars = None if deviation is None else bars_of(deviation[index])
        axes.errorbar(places, mean[index], bars, color=colours[name], marker=markers[name], label=name, capsize=2)
    axes.set_xticks(places, [f"{value:.2g}" for value in arrays.high])
    axes.set_xlabel("difficulty: cross-entropy up to, nats (easy images to the left)")
    axes.set_ylabel("right predictions, % of the interval")
    axes.set_ylim(-3, 103)
    axes.grid(True)
    figure.legend(loc="outside right upper")
    return figure


def describe_difficulty(arrays: Difficulty) -> str:
    """Return what each student gets right of the easiest and of the hardest images, in one sentence."""
    share = (arrays.right / arrays.count).mean(1)
    parts = [
        f"{name} {100 * own[0]:.0f} % of the easiest and {100 * own[-1]:.0f} % of the hardest tenth"
        if len(own) == 10
        else f"{name} {100 * own[0]:.0f} % of the easiest and {100 * own[-1]:.0f} % of the hardest images"
        for name, own in zip(arrays.set, share, strict=True)
    ]
    shown = f"Right predictions on test images of {arrays.dataset} by {arrays.reference}'s loss"
    return f"{shown}: {listed(parts)}{_in_steps(arrays)}."


@styled
def draw_calibration(arrays: Calibration) -> Figure:
    """A reliability diagram, and below it how sure students are."""
    caption = (
        f"Test images by intervals of the predicted class's probability, at temperature 1; ECE: expected calibration "
        f"error. {_seeds(arrays, 'Images of')} {_students(arrays)}"
    )
    figure = new_figure(f"Calibration of students, {arrays.dataset}", caption, 7, 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ink = above.xaxis.label.get_color()
    above.plot([0, 1], [0, 1], color=ink, linewidth=1, linestyle=":", label="as sure as right")
    colours, markers = colours_of(arrays.set), markers_of(arrays.set)
    edges = np.linspace(0, 1, arrays.count.shape[-1] + 1)
    count = arrays.count.sum(1)
    for index, name in enumerate(arrays.set.tolist()):
        held = count[index] > 0
        weight = np.maximum(arrays.count[index].sum(0), 1)
        confidence, accuracy = (
            np.nansum(np.nan_to_num(values[index]) * arrays.count[index], axis=0) / weight
            for values in (arrays.confidence, arrays.accuracy)
        )
        label = f"{name}, ECE {arrays.error[index].mean():.3f}"
        above.plot(confidence[held], accuracy[held], color=colours[name], marker=markers[name], label=label)
        below.stairs(100 * count[index] / count[index].sum(), edges, color=colours[name], linewidth=1.6)
    above.set_ylabel("accuracy, share")
    above.set_ylim(-0.03, 1.03)
    below.set_ylabel("images, %")
    below.set_xlabel("confidence, share")
    for axes in (above, below):
        axes.grid(True)
    figure.legend(loc="outside right upper")
    return figure


def describe_calibration(arrays: Calibration) -> str:
    """Return each student's calibration error, and whether it is too sure, in one sentence."""
    parts = []
    for index, name in enumerate(arrays.set):
        weight = arrays.count[index]
        gap = (np.nan_to_num(arrays.confidence[index] - arrays.accuracy[index]) * weight).sum()
        tone = "too sure" if gap > 0 else "too unsure"
        parts.append(f"{name} {arrays.error[index].mean():.3f} ({tone})")
    return f"Expected calibration error of students on {arrays.dataset}: {listed(parts)}{_in_steps(arrays)}."


@styled
def draw_classes(arrays: ClassAccuracy) -> Figure:
    """Accuracy class by class: by name where they are few, else each student's own order from best to worst."""
    many = len(arrays.name) > MANY_CLASSES
    order = "Each student's classes in its own order. " if many else ""
    seeds = _seeds(arrays, "Mean of" if many else "Mean and standard deviation of")
    caption = f"Top-1 of each class on the test split. {order}{seeds} {_students(arrays)}"
    figure = new_figure(f"Accuracy by class, {arrays.dataset}", caption, 7.5, 4.6)
    axes = figure.subplots()
    mean, deviation = _over_seeds(100 * arrays.accuracy)
    colours, markers = colours_of(arrays.set), markers_of(arrays.set)
    places = np.arange(len(arrays.name))
    for index, name in enumerate(arrays.set.tolist()):
        if many:
            axes.plot(places + 1, np.sort(mean[index])[::-1], color=colours[name], label=name)
            continue
        shift = 0.5 * ((index + 0.5) / len(arrays.set) - 0.5)
        axes.errorbar(
            places + shift, mean[index], None if deviation is None else deviation[index], color=colours[name],
            marker=markers[name], linestyle="none", label=name, capsize=2,
        )  # fmt: skip
    if many:
        axes.set_xlabel("classes, from best to worst")
    else:
        slant = max(map(len, arrays.name)) > 4
        axes.set_xticks(places, arrays.name.tolist(), rotation=40 if slant else 0, ha="right" if slant else "center")
    axes.set_ylabel("top-1, %")
    axes.set_ylim(-3, 103)
    axes.grid(True)
    figure.legend(loc="outside right upper")
    return figure


def describe_classes(arrays: ClassAccuracy) -> str:
    """Return each student's best and worst class, in one sentence."""
    parts = []
    for name, own in zip(arrays.set, arrays.accuracy.mean(1), strict=True):
        best, worst = own.argmax(), own.argmin()
        ends = f"{100 * own[best]:.0f} % ({arrays.name[best]}) to {100 * own[worst]:.0f} % ({arrays.name[worst]})"
        parts.append(f"{name} from {ends}")
    return f"Top-1 by class of students on {arrays.dataset}: {listed(parts)}{_in_steps(arrays)}."


@styled
def draw_divergence(arrays: LabelDivergence) -> Figure:
    """Figure 9: the share of images whose labels are at most so far apart, a panel per temperature."""
    caption = (
        f"KL(dynamic || static) of {arrays.images:,} augmented, mixed images as a student sees them: the teachers' "
        "mean logits on the image against those stored for its views, mixed alike. Markers: medians."
    )
    count = len(arrays.temperature)
    figure = new_figure(f"Dynamic against static labels, {arrays.dataset}", caption, 1.8 + 3.2 * count, 4.2)
    colours, markers = colours_of(arrays.set), markers_of(arrays.set)
    drawn = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for column, axes in enumerate(drawn):
        for index, name in enumerate(arrays.set.tolist()):
            values = np.maximum(arrays.divergence[index, column], 1e-9)
            middle = np.flatnonzero(arrays.percent == 50)
            axes.plot(
                values, arrays.percent, color=colours[name], marker=markers[name], markevery=middle.tolist(),
                label=name if column == 0 else None,
            )  # fmt: skip
        axes.set_xscale("log")
        shown = np.maximum(arrays.divergence[:, column][:, arrays.percent >= 1], 1e-9)  # less would stretch the axis
        plain_ticks(axes.xaxis, shown)
        axes.set_xlim(shown.min() / 2, 2 * shown.max())
        axes.set_title(f"temperature {arrays.temperature[column]:g}")
        axes.set_xlabel("divergence at most, nats")
        axes.grid(True)
    drawn[0].set_ylabel("images, %")
    figure.legend(loc="outside right upper")
    return figure


def describe_divergence(arrays: LabelDivergence) -> str:
    """Return each set's mean divergence at every temperature, in one sentence."""
    parts = [
        f"{name} {' and '.join(f'{value:.2g}' for value in own)}"
        for name, own in zip(arrays.set, arrays.mean, strict=True)
    ]
    at = " and ".join(f"{temperature:g}" for temperature in arrays.temperature)
    return f"Mean KL of dynamic from static labels on {arrays.dataset}, in nats at temperatures {at}: {listed(parts)}."
