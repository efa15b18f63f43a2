"""Pictures of results: accuracy against bytes, what compensators add, duplication by budget."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.arrays import Duplication, Gain, Tradeoff
from stillroom.figures.style import bars_of, colours_of, listed, markers_of, new_figure, plain_ticks, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _spread(seeds: np.ndarray) -> str:
    """Return what bars are, of so many seeds each."""
    few, many = seeds.min(), seeds.max()
    if many == 1:
        return "one seed"
    return f"mean ± standard deviation of {few if few == many else f'{few} to {many}'} seeds"


@styled
def draw_tradeoff(arrays: Tradeoff) -> Figure:
    """Figure 1: a line per method and kind of label; colours are methods, shapes are labels."""
    from matplotlib.lines import Line2D

    caption = (
        f"Top-1 on the test split, last epoch, student {arrays.student}, {_spread(arrays.seeds)}. Bytes: images, "
        "compensators and labels, dynamic labels as if they were stored. All students take as many epochs, so those of "
        "sets with more views take more steps; hollow: random images in as many steps."
    )
    figure = new_figure(f"Accuracy against compression, {arrays.dataset}", caption, 7.5, 5)
    axes = figure.subplots()
    matched = np.char.startswith(arrays.method, "random in")
    colours, markers = colours_of(arrays.method[~matched]), markers_of(arrays.labels)
    for method in dict.fromkeys(arrays.method.tolist()):
        for labels in markers:
            rows = np.flatnonzero((arrays.method == method) & (arrays.labels == labels))
            rows = rows[np.argsort(arrays.ratio[rows])]
            if len(rows):
                axes.errorbar(
                    arrays.ratio[rows],
                    arrays.top1[rows],
                    bars_of(arrays.deviation[rows]),
                    color=colours.get(method, colours.get("random", "#8A8A8A")),
                    marker=markers[labels],
                    markerfacecolor="none" if method not in colours else None,
                    linestyle="-" if method in colours else "none",
                    capsize=2,
                )
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, arrays.ratio)
    axes.set_xlabel("bytes of the set, % of the bytes of the real training set's pixels")
    axes.set_ylabel("top-1, %")
    axes.set_ylim(bottom=0)
    axes.grid(True)
    shown = [Line2D([], [], color=colour, label=method) for method, colour in colours.items()]
    gray = "#8A8A8A"
    shown += [Line2D([], [], color=gray, marker=m, linestyle="none", label=f"{k} labels") for k, m in markers.items()]
    hollow: dict[str, Any] = {"color": gray, "marker": "o", "markerfacecolor": "none", "linestyle": "none"}
    for name in dict.fromkeys(arrays.method[matched].tolist()):
        shown.append(Line2D([], [], label=name.replace(" in as many", "\nin as many"), **hollow))
    figure.legend(handles=shown, loc="outside right upper")
    return figure


def describe_tradeoff(arrays: Tradeoff) -> str:
    """Return the best method of each kind of label, in one sentence."""
    best = []
    for labels in dict.fromkeys(arrays.labels.tolist()):
        rows = np.flatnonzero(arrays.labels == labels)
        row = rows[arrays.top1[rows].argmax()]
        name = f"{arrays.method[row]} with {labels} labels reaches {arrays.top1[row]:.1f} %"
        best.append(f"{name} at {arrays.ratio[row]:.3g} % of the bytes")
    return f"Accuracy on {arrays.dataset} against bytes: of each kind of label the best, {listed(best)}."


@styled
def draw_gain(arrays: Gain) -> Figure:
    """Figure 4, right: what compensators add, a pair of bars per setting."""
    caption = (
        "Top-1 of the whole set minus top-1 of its naturals alone with the same labels, paired by seed, "
        f"{_spread(arrays.seeds)}. A set with M compensators has M + 1 views of a natural: at equal epochs its "
        "students take M + 1 times the steps."
    )
    height = 1.8 + 0.65 * len(arrays.setting)
    figure = new_figure(f"What compensators add to their naturals, {arrays.dataset}", caption, 7, height)
    axes = figure.subplots()
    places = np.arange(len(arrays.setting))
    for shift, budget, gain, deviation, colour, hatch in (
        (-0.2, "at equal epochs", arrays.at_epochs, arrays.at_epochs_deviation, "#56B4E9", ""),
        (0.2, "at equal steps", arrays.at_steps, arrays.at_steps_deviation, "#D55E00", "///"),
    ):
        bars = bars_of(deviation)
        axes.barh(places + shift, gain, 0.36, xerr=bars, color=colour, hatch=hatch, edgecolor="white", label=budget,
                  error_kw={"ecolor": axes.xaxis.label.get_color(), "capsize": 2})  # fmt: skip
        ends = np.abs(gain) + (0 if bars is None else bars)
        for place, value, end in zip(places, gain, ends, strict=True):
            side = 1 if value >= 0 else -1
            axes.annotate(
                f"{value:+.1f}", (side * end, place + shift), (4 * side, 0), textcoords="offset points",
                va="center", ha="left" if side > 0 else "right", fontsize=8,
            )  # fmt: skip
    axes.axvline(0, color=axes.xaxis.label.get_color(), linewidth=1)
    axes.margins(x=0.15)
    names = [
        f"{textwrap.fill(name, 40)}\n(reaches {reached:.1f} %)"
        for name, reached in zip(arrays.setting, arrays.accuracy, strict=True)
    ]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("gain, points of top-1")
    axes.grid(True, axis="x")
    figure.legend(loc="outside right upper")
    return figure


def describe_gain(arrays: Gain) -> str:
    """Return the gains of every setting, in one sentence."""
    parts = [
        f"{epochs:+.1f} points at equal epochs and {steps:+.1f} at equal steps ({name})"
        for name, epochs, steps in zip(arrays.setting, arrays.at_epochs, arrays.at_steps, strict=True)
    ]
    return f"Compensators on {arrays.dataset}, against their naturals alone: {listed(parts)}."


@styled
def draw_duplication(arrays: Duplication) -> Figure:
    """Figure 4, left: a line per method, and real images as a level."""
    caption = (
        f"Mean cosine similarity of two views of a class, averaged over classes, of {arrays.teacher}'s penultimate "
        f"features. Real: two real training images, of {arrays.real_per_class} per class. One set per point."
    )
    figure = new_figure(f"Feature duplication by budget, {arrays.dataset}", caption, 6.5, 4.2)
    axes = figure.subplots()
    colours, markers = colours_of(arrays.method), markers_of(arrays.method)
    axes.axhline(arrays.real, color=colours_of(["real"])["real"], linestyle="--", label="real images")
    for method, colour in colours.items():
        rows = np.flatnonzero(arrays.method == method)
        rows = rows[np.argsort(arrays.ipc[rows])]
        axes.plot(arrays.ipc[rows], arrays.similarity[rows], color=colour, marker=markers[method], label=method)
    axes.set_xticks(np.unique(arrays.ipc))
    axes.set_xlabel("budget, images per class")
    axes.set_ylabel("duplication, mean cosine")
    axes.grid(True)
    figure.legend(loc="outside right upper")
    return figure


def describe_duplication(arrays: Duplication) -> str:
    """Return each method's duplication at the largest budget beside that of real images, in one sentence."""
    parts = []
    for method in dict.fromkeys(arrays.method.tolist()):
        rows = np.flatnonzero(arrays.method == method)
        row = rows[arrays.ipc[rows].argmax()]
        parts.append(f"{method} {arrays.similarity[row]:.2f} at {arrays.ipc[row]} images per class")
    return f"Feature duplication on {arrays.dataset}: {listed(parts)}, where two real images have {arrays.real:.2f}."
