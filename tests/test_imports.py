"""Imports go one way: a module knows only what stands below it. The check is shown to fail, too."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import stillroom

PACKAGE = Path(stillroom.__file__).parent

# From the ground up. A module imports from lower lines alone, never from its own line.
LAYERS = (
    ("errors",),
    ("arrays", "files", "compute", "augment", "settings", "markup", "paper", "scores", "muon", "sinks"),
    ("networks", "render", "events", "claims", "readers.stored", "readers.listing"),
    ("readers.digits", "readers.npz", "readers.cifar", "readers.folders", "readers.parquet", "readers.tar"),
    ("readers.ilsvrc", "readers.tiny_imagenet", "readers.shards"),
    ("readers",),
    ("manifest", "images", "workers", "softlabels", "together"),
    ("run",),
    ("artifact", "card", "data", "logits", "cluster"),
    ("distilled", "train"),
    ("teachers", "replay", "costs", "infer_files", "classnames", "layouts", "hub"),
    ("labels", "methods.select", "methods.recover", "exchange", "export", "analysis.duplication"),
    ("methods.infer", "methods.pixels", "methods.coreset", "methods.rded", "students"),
    ("methods.sre2l", "methods.gvbsm"),
    ("methods", "protocols"),
    ("recipes",),
    ("pipeline",),
    ("grid", "fitting"),
    ("compare", "estimate", "api", "study"),
    (
        "tables",
        "analysis.results",
        "analysis.features",
        "analysis.predictions",
        "analysis.divergence",
        "analysis.recovery",
    ),
    ("analysis", "figures.style"),
    ("figures.results", "figures.students", "figures.compensators", "page"),
    ("figures", "report"),
    ("gallery",),
    ("figure_command", "report_command", "watch", "engines"),
    ("evaluate_command",),
    ("cli",),
    ("",),  # stillroom/__init__.py: imports nothing until it is asked
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}

# Never, not even through others: module -> what it must not know.
APART = {
    "students": ("methods", "recipes"),  # distillation and evaluation meet only in the artifact
    "distilled": ("train", "teachers", "networks", "data", "run"),  # a set is read without training code
    "train": ("teachers", "distilled"),
    "methods": ("labels", "students", "exchange"),
    "replay": ("teachers", "networks", "methods"),  # labels are replayed where no teacher is
    "exchange": ("methods", "train", "teachers"),  # sets come and go without training code
    "hub": ("methods", "train", "teachers", "networks"),
    "report": ("data", "networks", "train", "teachers", "methods", "labels", "students", "pipeline", "study"),
    # figures are drawn from arrays: of all there is they know those, and how errors are raised
    **{
        f"figures.{name}": tuple({module.split(".")[0] for module in HEIGHT} - {"", "figures", "arrays", "errors"})
        for name in ("style", "results", "students", "compensators")
    },
}


def read_modules() -> dict[str, str]:
    """Every module's source, by its name below the package ("" for the package, "methods" for a folder's own)."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(part for part in parts if part != "__init__")] = path.read_text()
    return modules


def imports_of(source: str, modules: dict[str, str]) -> set[str]:
    """The modules of this package that `source` imports, wherever it does: also within functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package != "stillroom":
                continue
            while rest and rest not in modules:  # a name within a module, not a module
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found


def find_violations(modules: dict[str, str]) -> list[str]:
    imports = {name: imports_of(source, modules) for name, source in modules.items()}
    problems = [f"{name or '__init__'} has no place in LAYERS" for name in modules if name not in HEIGHT]
    # The package itself is only its version and its table of names, so importing from it is importing nothing.
    edges = [(name, other) for name, others in imports.items() for other in others if other]
    problems += [f"{a} imports {b}" for a, b in edges if HEIGHT.get(b, 99) >= HEIGHT.get(a, 99)]
    for name, forbidden in APART.items():
        reached, new = set(), {name}
        while new:
            reached |= new
            new = set().union(*(imports[module] - {""} for module in new)) - reached
        problems += [f"{name} reaches {other}" for other in reached if other.split(".")[0] in forbidden]
    return problems


def test_imports_go_one_way() -> None:
    modules = read_modules()
    assert len(modules) > 20
    assert find_violations(modules) == []


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        ("errors", "from stillroom.files import write_json", "errors imports files"),
        ("students", "from stillroom.methods import METHODS", "students reaches methods"),
        ("labels", "from stillroom.methods.select import draw_naturals", "labels imports methods.select"),
        ("card", "import stillroom.train", "distilled reaches train"),
        ("files", "def late():\n    from stillroom import networks", "distilled reaches networks"),
        ("train", "from stillroom import cli", "train imports cli"),
        ("figures.students", "from stillroom.study import Study", "figures.students reaches study"),
        ("students", "from stillroom.figures import style", "students imports figures.style"),
        ("utils", "x = 1", "utils has no place in LAYERS"),
    ],
)
def test_the_check_finds_an_import_that_goes_the_other_way(module: str, line: str, problem: str) -> None:
    modules = read_modules()
    modules[module] = modules.get(module, "") + "\n" + line + "\n"
    assert problem in find_violations(modules)


def is_there(module: str, name: str) -> bool:
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def test_what_benchmarks_and_examples_import_is_there() -> None:
    """They are checked by no types, and most run rarely."""
    root = Path(__file__).parents[1]
    scripts = [path for folder in ("benchmarks", "examples", "tests/faults") for path in (root / folder).glob("*.py")]
    assert len(scripts) > 10
    absent = [
        f"{script.name}: {node.module}.{alias.name}"
        for script in scripts
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stillroom"
        for alias in node.names
        if not is_there(node.module or "", alias.name)
    ]
    assert absent == []
