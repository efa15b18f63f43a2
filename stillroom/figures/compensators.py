"""Pictures of compensators: what they look like, the views they make, their losses, and each layer's part of these."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stillroom.arrays import Compensators, Layers, Losses, Views, read_pixels
from stillroom.figures.style import colours_of, few_ticks, listed, markers_of, new_figure, plain_ticks, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


@styled
def draw_compensators(arrays: Compensators) -> Figure:
    """Figures 6 and 7: a row per teacher, a column per slot."""
    rows, columns = arrays.largest.shape
    caption = (
        "Added to every natural of their slot. Each is stretched to the visible range: gray is no change; the number "
        "is the change in pixel units of [0, 1] that black and white stand for."
    )
    width, height = max(4.5, 1.6 + 1.15 * columns), 1.2 + 1.35 * rows
    figure = new_figure(f"Compensators by teacher and slot, {arrays.dataset}", caption, width, height, square=True)
    pictures = read_pixels(arrays.pixels)
    for row, line in enumerate(figure.subplots(rows, columns, squeeze=False)):
        for column, axes in enumerate(line):
            axes.imshow(pictures[row, column], interpolation="nearest")
            _bare(axes)
            axes.set_xlabel(f"± {arrays.largest[row, column]:.2f}", fontsize=7)
            if row == 0:
                axes.set_title(f"slot {arrays.slot[column]}", fontsize=9)
        line[0].set_ylabel(arrays.teacher[row], fontsize=8)
    return figure


def describe_compensators(arrays: Compensators) -> str:
    """Return how far each teacher's compensators reach, in one sentence."""
    reaches = zip(arrays.teacher, arrays.largest.mean(1), strict=True)
    parts = [f"{name}'s reach {value:.2f}" for name, value in reaches]
    count = len(arrays.slot)
    return f"Compensators of {count} slots of {arrays.dataset}: {listed(parts)} in pixel units of [0, 1] on average."


@styled
def draw_views(arrays: Views) -> Figure:
    """Figure 3 as a contact sheet: compensators above, a class per row, its natural to the left of its views."""
    rows, columns = len(arrays.line), len(arrays.picture)
    caption = (
        f"Slot {arrays.slot}. Above: compensators, each stretched around gray; the number is the change that black and "
        "white stand for. Below: views as students see them, cut to valid pixels."
    )
    width, height = 1.6 + 1.1 * columns, 1.2 + 1.15 * rows
    title = f"Naturals, compensators and their views, {arrays.dataset}"
    figure = new_figure(title, caption, width, height, square=True)
    pictures = read_pixels(arrays.pixels)
    for row, line in enumerate(figure.subplots(rows, columns, squeeze=False)):
        for column, axes in enumerate(line):
            if row or column:
                axes.imshow(pictures[row, column], interpolation="nearest")
            else:
                axes.set_box_aspect(1)
                axes.set_facecolor("none")
            _bare(axes)
            if row == 0:
                name = arrays.picture[column]
                axes.set_title(name if column == 0 else f"+ {name}", fontsize=8)
                if column:
                    axes.set_xlabel(f"± {arrays.largest[column]:.2f}", fontsize=7)
        line[0].set_ylabel(arrays.line[row], fontsize=8)
    return figure


def describe_views(arrays: Views) -> str:
    """Return whose views are shown, in one sentence."""
    classes = listed(map(repr, arrays.line[1:].tolist()))
    return (
        f"Naturals of {classes} of {arrays.dataset} in slot {arrays.slot}, each beside its "
        f"views with the compensators of {listed(arrays.picture[1:].tolist())}."
    )


@styled
def draw_losses(arrays: Losses) -> Figure:
    """Both terms of Equation 3 step by step: a line per teacher, its slots' range around it."""
    caption = (
        f"Before each step, on that step's augmented naturals + compensator; lines: mean of {len(arrays.slot)} slots, "
        f"bands: their range. Statistics loss times its weight {arrays.statistics_weight:g}, the first layer more."
    )
    figure = new_figure(f"Losses while compensators are optimised, {arrays.dataset}", caption, 8.5, 4)
    colours, markers = colours_of(arrays.teacher), markers_of(arrays.teacher)
    for axes, name, values in zip(
        figure.subplots(1, 2), ("label loss, nats", "statistics loss, weighted"), (arrays.label, arrays.statistics),
        strict=True,
    ):  # fmt: skip
        for index, teacher in enumerate(arrays.teacher.tolist()):
            axes.plot(
                arrays.step, values[index].mean(0), color=colours[teacher], marker=markers[teacher],
                markevery=max(1, len(arrays.step) // 6), label=teacher if values is arrays.label else None,
            )  # fmt: skip
            axes.fill_between(
                arrays.step, values[index].min(0), values[index].max(0), color=colours[teacher], alpha=0.2, linewidth=0
            )
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        if values.min() > 0:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis, values)
        axes.grid(True)
    figure.legend(loc="outside right upper")
    return figure


def describe_losses(arrays: Losses) -> str:
    """Return each teacher's losses at the first and last step, in one sentence."""
    parts = []
    for index, teacher in enumerate(arrays.teacher):
        label, statistics = (values[index].mean(0) for values in (arrays.label, arrays.statistics))
        ends = (
            f"label loss {label[0]:.2g} to {label[-1]:.2g}, statistics loss {statistics[0]:.3g} to {statistics[-1]:.3g}"
        )
        parts.append(f"{teacher}'s {ends}")
    return f"From the first to the last step of compensators of {arrays.dataset}: {listed(parts)}."


@styled
def draw_layers(arrays: Layers) -> Figure:
    """Each BatchNorm's part of the statistics loss before and after, a panel per teacher."""
    caption = (
        f"Weighted as in the loss; mean over {len(arrays.slot)} slots, bands: their range. Naturals alone, and with "
        "the stored compensator; not augmented, not cut to valid pixels, float32."
    )
    teachers = list(dict.fromkeys(arrays.teacher.tolist()))
    title = f"Statistics loss by layer, {arrays.dataset}"
    figure = new_figure(title, caption, 1.8 + 2.7 * len(teachers), 3.8)
    drawn = list(figure.subplots(1, len(teachers), squeeze=False, sharey=True)[0])
    for axes, teacher in zip(drawn, teachers, strict=True):
        rows = arrays.teacher == teacher
        for values, name, colour, line in (
            (arrays.before[rows], "naturals", "#CC79A7", "--"),
            (arrays.after[rows], "with compensator", "#D55E00", "-"),
        ):
            label = name if axes is drawn[0] else None
            axes.plot(
                arrays.number[rows], values.mean(1), color=colour, linestyle=line, marker="o", markersize=3, label=label
            )
            axes.fill_between(arrays.number[rows], values.min(1), values.max(1), color=colour, alpha=0.2, linewidth=0)
        axes.set_title(teacher)
        axes.set_xlabel("BatchNorm, in the order they run")
        axes.xaxis.set_major_locator(few_ticks(whole=True))
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, np.maximum(np.concatenate([arrays.before, arrays.after]), 1e-9))
        axes.grid(True)
    drawn[0].set_ylabel("part of the loss")
    figure.legend(loc="outside right upper")
    return figure


def describe_layers(arrays: Layers) -> str:
    """Return each teacher's whole loss before and after, and its largest part, in one sentence."""
    parts = []
    for teacher in dict.fromkeys(arrays.teacher.tolist()):
        rows = arrays.teacher == teacher
        before, after = (values[rows].mean(1) for values in (arrays.before, arrays.after))
        largest = int(after.argmax())
        share = f"BatchNorm {arrays.number[rows][largest]} is {100 * after[largest] / after.sum():.0f} % of it"
        parts.append(f"{teacher}'s falls from {before.sum():.3g} to {after.sum():.3g}, of which {share}")
    return f"Statistics loss of naturals of {arrays.dataset} with their compensators: {listed(parts)}."
