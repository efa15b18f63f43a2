"""How figures look: colours that show on white and on near-black and to colour-blind eyes, titles, captions, panels."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:  # matplotlib takes half a second to import, and most commands draw nothing
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, without the yellow that white swallows; eyes that lack a colour tell seven apart, not ten.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#9C6B3C", "#8A63C9", "#A39E00")
OWN_COLOURS = {
    "infer": "#D55E00",
    "sre2l": "#0072B2",
    "real": "#009E73",
    "random": "#8A8A8A",
    "naturals": "#CC79A7",
    "rded": "#E69F00",
    "herding": "#56B4E9",
    "k_center": "#9C6B3C",
    "cda": "#8A63C9",
    "gvbsm": "#A39E00",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # never by colour alone
BACKGROUNDS = {False: "white", True: "#15181c"}
INKS = {False: "#222222", True: "#dddddd"}
# Fonts with letters that matplotlib's own lacks, by the systems that have them: class names are in any script.
OTHER_SCRIPTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji",
)  # fmt: skip
SURFACE = "cividis"  # of equal steps to every eye

Shown = TypeVar("Shown", contravariant=True)


class Draw(Protocol[Shown]):
    """A function that draws arrays, for light pages or for dark ones."""

    def __call__(self, arrays: Shown, dark: bool = False) -> Figure: ...


def styled(draw: Callable[[Shown], Figure]) -> Draw[Shown]:
    """Return `draw` with the keyword `dark`, run under the house's settings whatever the user's own are."""

    @functools.wraps(draw)
    def drawn(arrays: Shown, dark: bool = False) -> Figure:
        import matplotlib
        from matplotlib.font_manager import fontManager

        ink, paper = INKS[dark], BACKGROUNDS[dark]
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        installed = {font.name for font in fontManager.ttflist}
        own: dict[Any, Any] = {
            "font.family": ["DejaVu Sans", *(name for name in OTHER_SCRIPTS if name in installed)],
            **dict.fromkeys(inked, ink),
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), paper),
            "text.parse_math": False,  # class names and folders are whatever people call theirs: "cost $5 to $10"
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "grid.color": ink,
            "grid.alpha": 0.15,
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.6,
            "lines.markersize": 5,
            "figure.titlesize": 11,
        }
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(own)
            return draw(arrays)

    return drawn


def new_figure(title: str, caption: str, width: float, height: float, *, square: bool = False) -> Figure:
    """Return an empty figure of so many inches, its title above and what was measured below.

    square: of panels that keep their shape, so that no room is left between them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="compressed" if square else "constrained")
    figure.suptitle(textwrap.fill(title, int(11 * width)), fontweight="bold")
    figure.supxlabel(textwrap.fill(caption, int(15.5 * width)), fontsize=7.5, x=0.5)
    return figure


def panels(figure: Figure, count: int, **options: Any) -> list[Axes]:
    """Return `count` axes side by side that share their scales."""
    return list(figure.subplots(1, count, squeeze=False, sharex=True, sharey=True, **options)[0])


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name: a known method has its own, the others those that are left, in turn."""
    names = list(dict.fromkeys(names))
    own = {name: OWN_COLOURS[name] for name in names if name in OWN_COLOURS}
    left = [colour for colour in COLOURS if colour not in own.values()] or list(COLOURS)
    others = [name for name in names if name not in own]
    return {name: own.get(name) or left[others.index(name) % len(left)] for name in names}


def markers_of(names: Iterable[str]) -> dict[str, str]:
    """Return a marker for each name, in turn."""
    return {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(dict.fromkeys(names))}


def plain_ticks(axis: Axis, values: np.ndarray) -> None:
    """Put plain numbers, a handful and no powers, on a logarithmic axis of `values`, all above 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = 0.7 * values.min(), 1.4 * values.max()
    digits = (1, 2, 3, 5) if high < 100 * low else (1, 3) if high < 3000 * low else (1,)
    known = np.array([digit * 10.0**power for power in range(-12, 12) for digit in digits])
    inside = known[(known >= values.min() / 1.05) & (known <= 1.05 * values.max())]  # an axis shows little more
    few = np.unique([values.min(), values.max()])  # of a range that no two round numbers lie in
    axis.set_major_locator(FixedLocator((inside if len(inside) > 1 else few).tolist()))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def few_ticks(count: int = 4, *, whole: bool = False) -> Any:
    """Return what places about `count` ticks at round numbers; `whole`: at whole ones."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=whole)


def bars_of(deviation: np.ndarray) -> np.ndarray | None:
    """Return error bars, None where no deviation is known."""
    return None if np.isnan(deviation).all() else np.nan_to_num(deviation)


def of_steps(name: str, steps: int) -> str:
    """Return a set's name with its student's steps; 0: a teacher's, of files that do not tell them."""
    if name == "real":
        return f"real images ({steps:,} steps, as teachers take)" if steps else "real images (as teachers are)"
    return f"{name} ({steps:,} steps)"


def listed(parts: Iterable[str]) -> str:
    """Return texts as a list in a sentence."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
