"""Figures as people meet them: every one made in the toy world, its picture, its sentence, its data, its command."""

from __future__ import annotations

import ast
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from conftest import Finished
from PIL import Image

from stillroom import cli, gallery
from stillroom.analysis import divergence, features, predictions
from stillroom.arrays import columns_of, read_csv
from stillroom.figures import style
from stillroom.gallery import FIGURES

QUICK = ["--compute.device", "cpu", "--compute.precision", "float32", "--compute.compile", "off"]


@pytest.fixture(scope="module")
def studied(compared: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A copy of the comparison, in which figures may leave theirs."""
    folder = tmp_path_factory.mktemp("studied")
    shutil.copytree(compared.directory.parent, folder, dirs_exist_ok=True)
    return replace(compared, directory=folder / "run")


def words_for(run: Finished, *words: str) -> list[str]:
    folder = run.directory.parent
    return [*words, "--data.source", str(folder / "toy.npz"), "--teachers.cache", str(folder / "cache"), *QUICK]


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer points, to be quick."""
    monkeypatch.setattr(predictions, "LANDSCAPE_POINTS", 5)
    monkeypatch.setattr(features, "GRID", 16)
    monkeypatch.setattr(divergence, "IMAGES", 48)


@pytest.mark.usefixtures("coarse", "toynet")
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_made_with_its_data_and_a_sentence(
    name: str, studied: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {}

    def remember(name: str, arrays: object, *rest: object) -> None:
        made[name] = arrays
        write(name, arrays, *rest)  # type: ignore[arg-type]

    write = gallery.write_figure
    monkeypatch.setattr("stillroom.figure_command.write_figure", remember)
    budget = [] if name in ("accuracy", "gain", "duplication") else ["--ipc", "4"]
    words = ["figure", name, str(studied.directory), *budget, "--seeds", "0", "1"]
    assert cli.main(words_for(studied, *words)) == 0
    out = capsys.readouterr().out
    arrays = made[name]
    said = FIGURES[name].describe(arrays)
    assert re.fullmatch(r"[A-Z][^\n]{30,}\.", said)
    assert "nan" not in said
    assert said in out
    picture = Image.open(studied.directory / "figures" / f"{name}.png")
    assert picture.info["Description"] == said
    assert min(picture.size) > 200
    assert len(np.unique(np.asarray(picture.convert("L")))) > 10  # something is drawn
    back = read_csv((studied.directory / "figures" / f"{name}.csv").read_text(), type(arrays))
    for column in columns_of(type(arrays)):
        np.testing.assert_array_equal(getattr(back, column), getattr(arrays, column))
    if name == "gain":  # both kinds of page, and the other format
        svg = gallery.render(name, back, "svg", dark=True)
        assert svg == gallery.render(name, back, "svg", dark=True)
        assert style.BACKGROUNDS[True] in svg.decode()
        assert style.BACKGROUNDS[True] not in gallery.render(name, back, "svg").decode()


def luminance(colour: str) -> float:
    """WCAG's relative luminance of a colour."""
    colour = {"white": "#ffffff"}.get(colour, colour)
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [*style.COLOURS, *style.OWN_COLOURS.values()])
def test_every_colour_shows_on_light_and_on_dark_pages(colour: str) -> None:
    for background in style.BACKGROUNDS.values():
        light, dark = sorted([luminance(colour), luminance(background)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 2


def test_methods_have_colours_of_their_own() -> None:
    names = [*style.OWN_COLOURS, "infer:steps=50", "mine"]
    assert style.colours_of(["mine", "infer"])["infer"] == style.OWN_COLOURS["infer"]
    colours = style.colours_of(["infer", "sre2l", "infer:steps=50", "mine", "other"])
    assert len(set(colours.values())) == 5
    assert len(set(style.OWN_COLOURS.values())) == len(style.OWN_COLOURS)
    assert style.colours_of(names).keys() == set(names)


def test_an_axis_of_a_narrow_range_has_two_ticks() -> None:
    from matplotlib.figure import Figure

    for values, ticks in (([0.0611, 0.0788], [0.0611, 0.0788]), ([0.02, 0.4], [0.02, 0.03, 0.05, 0.1, 0.2, 0.3])):
        axes = Figure().subplots()
        axes.set_xscale("log")
        style.plain_ticks(axes.xaxis, np.array(values))
        assert axes.xaxis.get_majorticklocs() == pytest.approx(ticks)


def test_letters_that_no_font_has_are_told_of_once() -> None:
    arrays = read_csv(GAIN.replace("ipc 4", "ipc \U0001e900\U0001e901"), gallery.results.Gain)  # Adlam
    with pytest.warns(UserWarning, match="boxes") as said:
        gallery.render("gain", arrays, "png")
    assert ["drawn as boxes" in str(one.message) for one in said] == [True]


def test_the_users_own_settings_change_no_figure(studied: Finished) -> None:
    import matplotlib

    from stillroom.figures.results import draw_gain

    arrays = read_csv(GAIN, gallery.results.Gain)
    plain = picture_of(draw_gain(arrays))
    with matplotlib.rc_context({"figure.facecolor": "red", "xtick.major.size": 20}):
        assert picture_of(draw_gain(arrays)) == plain
        assert matplotlib.rcParams["figure.facecolor"] == "red"  # and stay theirs


GAIN = """dataset
toy

setting,seeds,accuracy,at_epochs,at_epochs_deviation,at_steps,at_steps_deviation
"ipc 4, static",1,50.0,1.5,nan,-2.0,nan
"""


def picture_of(figure: object) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")  # type: ignore[attr-defined]
    return buffer.getvalue()


def test_without_words_the_figures_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["figure"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(FIGURES)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["lanscape", "RUN"], 2, "there is no figure 'lanscape'. Did you mean 'landscape'?"),
        (["landscape"], 2, "name a run, too: stillroom figure landscape runs/demo"),
        (
            ["landscape", "RUN", "--out", "x.gif"],
            2,
            "--out x.gif ends in '.gif'; give a file that ends in .png or .svg",
        ),
        (["landscape", "nowhere"], 1, "nowhere holds no config.json"),
        (["landscape", "RUN", "--sets", "infr"], 1, "sets has 'infr'"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    words: list[str], code: int, said: str, studied: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found = cli.main(words_for(studied, "figure", *[str(studied.directory) if w == "RUN" else w for w in words]))
    assert (found, said in capsys.readouterr().err) == (code, True)
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_imported_where_a_figure_is_drawn_and_not_before() -> None:
    files = list(Path(gallery.__file__).parent.rglob("*.py"))
    for file in files:  # what stands at the top of a module, outside of functions and of TYPE_CHECKING
        for node in ast.parse(file.read_text()).body:
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            )
            assert not any(str(name).split(".")[0] == "matplotlib" for name in names), file
    assert len(files) > 70


def test_dollars_are_no_mathematics_and_powers_are_plain(coarse: None) -> None:
    told = "cost $5 to $10, $\\frac$"
    arrays = gallery.results.Gain(told, [told], [1], [50.0], [1.5], [0.1], [-2.0], [0.1])  # type: ignore[arg-type]
    for name, shown in (("gain", arrays), ("divergence", DIVERGENCE)):
        figure = FIGURES[name].draw(shown)
        figure.canvas.draw()
        texts = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_parse_math")) if text.get_text()]
        mathematics = [t.get_text() for t in texts if t.get_parse_math() and "$" in t.get_text()]
        assert (mathematics, any("$\\mathdefault" in text.get_text() for text in texts)) == ([], False)
        assert any(told in " ".join(text.get_text().split()) for text in texts)


DIVERGENCE = gallery.divergence.LabelDivergence(
    "cost $5 to $10, $\\frac$", 8, ["infer"], [1.0], [[0.1]], np.arange(101), np.logspace(-6, 0, 101).reshape(1, 1, 101)
)  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_figure_of_digits_is_written_by_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predictions, "LANDSCAPE_POINTS", 3)
    monkeypatch.setattr(divergence, "IMAGES", 64)
    run, network = tmp_path / "run", "convnet_thin"
    tiny = ["--teachers.networks", network, "--teachers.epochs", "2", "--student.network", network, "--seeds", "0"]
    tiny += ["--student.train.epochs", "4", "--labels", "static", "--infer.steps", "3", "--sre2l.steps", "3", *QUICK]
    grid = ["--grid.methods", "random", "sre2l", "infer", "--grid.ipc", "3", "4"]
    assert cli.main(["compare", "digits", "--out", str(run), *tiny, *grid]) == 0
    capsys.readouterr()
    sets, teachers, budgets = ["random", "sre2l", "infer"], [network], ["ipc 3", "ipc 4"]
    classes = [str(digit) for digit in range(10)]
    named = {  # what each sentence tells of, all of it in the data
        "accuracy": (["static labels"], ["method", "labels"]),
        "gain": (budgets, ["setting"]),
        "duplication": ([*sets, "at 4 images per class"], ["method"]),
        "boundaries": (["7 classes", "real", *sets], ["set"]),
        "divergence": (["naturals", *sets], ["set"]),
        "compensators": (teachers, ["teacher"]),
        "views": (teachers, ["line", "picture"]),
        "losses": (teachers, ["teacher"]),
        "layers": (teachers, ["teacher"]),
    }
    steps = []
    for name, figure in FIGURES.items():
        words = [] if name in ("accuracy", "gain", "duplication") else ["--ipc", "4", *QUICK]
        words += QUICK if name == "duplication" else []
        assert cli.main(["figure", name, str(run), *words]) == 0
        said = capsys.readouterr().out.splitlines()[0]
        kind = get_type_hints(figure.describe)["arrays"]
        arrays = read_csv((run / "figures" / f"{name}.csv").read_text(), kind)
        assert said == figure.describe(arrays)
        assert arrays.dataset == "digits"
        assert "digits" in said
        with Image.open(run / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 200
        told, columns = named.get(name, (["real", *sets], ["set"]))
        held = " ".join(str(value) for column in columns for value in getattr(arrays, column))
        for one in told:
            assert one in said, name
            assert one.split(" labels")[0] in held or one[0].isdigit() or one.startswith("at "), name
        if figure.trains:
            taken = dict(zip(arrays.set.tolist(), arrays.steps.tolist(), strict=True))
            assert len({taken[one] for one in sets}) == 1
            assert f"{taken['infer']:,} steps" in said
            assert f"{taken['real']:,}, as teachers are" in said
            steps.append(taken)
        if name == "boundaries":
            assert set(arrays.name.tolist()) < set(classes)
            assert len(arrays.name) == len(set(arrays.true.tolist())) == 7
        if name == "views":
            assert all(line in said for line in arrays.line[1:].tolist())
    assert steps == steps[:1] * 5
