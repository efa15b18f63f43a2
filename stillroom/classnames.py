"""Class names as others publish them, matched to those of the real data: never by guess.

label_of, notes = match_classes(["new000", "new001", ...], real)
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stillroom.data import RealData
from stillroom.errors import StillroomError
from stillroom.softlabels import read_index

NUMBERED = re.compile(r"(?:new|class|label|n|c)?[ _-]?(\d+)", re.IGNORECASE)
WORDNET_ID = re.compile(r"n\d{8}")
# Numbered by sorted WordNet id in one world (class folders) and by the lines of wnids.txt in the other.
TWO_ORDERS = ("tiny-imagenet", "tiny-imagenet-200")


def match_classes(
    names: Sequence[str], real: RealData, class_order: str | None = None
) -> tuple[dict[str, int], list[str]]:
    """Return the real data's label of each published class name (or folder), and notes on how they were matched.

    By the lines of the file `class_order`; or by name, where every name is that of a class but for case and signs; or
    by number, where every name is one (`new000`, `class_7`, `00012`). Raises StillroomError for anything between.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1][:5]
    if repeated:
        raise StillroomError(f"import: the set has the class names {repeated} more than once; give each class its own")
    if class_order is not None:
        lines = _read_lines(Path(class_order))
        if len(lines) != real.classes or len(set(lines)) != len(lines):
            raise StillroomError(
                f"--class-order {class_order} has {len(lines)} names, {len(set(lines))} of them different; it needs "
                f"one for each of the {real.classes} classes of {real.name!r}, in label order"
            )
        absent = [name for name in names if name not in lines]
        if absent:
            raise StillroomError(f"--class-order {class_order} does not name {absent[:5]}, which the set has; add them")
        return {name: lines.index(name) for name in names}, [f"classes in the order of {class_order}"]
    known: dict[str, int] = {}
    for label, name in enumerate(real.class_names):
        if known.setdefault(plain_name(name), label) != label:  # two classes that differ by signs alone
            known[plain_name(name)] = -1
    known |= {name: label for label, name in enumerate(real.class_names)}  # letter by letter, whatever else is like it
    by_name = {name: known.get(name, known.get(plain_name(name), -1)) for name in names}
    if min(by_name.values()) >= 0 and len(set(by_name.values())) == len(by_name):
        return by_name, ["classes matched by name"]
    numbers = {name: int(m[1]) for name in names if (m := NUMBERED.fullmatch(name)) and not WORDNET_ID.fullmatch(name)}
    shown = ", ".join(map(repr, real.class_names[:3]))
    advice = "say which is which by --class-order FILE, a line per class of the real data with its name in the set"
    if len(numbers) < len(names):
        strange = [name for name in names if name not in numbers and by_name[name] < 0][:5] or list(names[:5])
        wordnet = "; Tiny-ImageNet's own wnids.txt is such a file" if any(map(WORDNET_ID.fullmatch, strange)) else ""
        raise StillroomError(
            f"import: {strange} are no classes of {real.name!r} ({shown}, ...) and no numbers; {advice}{wordnet}"
        )
    found = set(numbers.values())
    if found == set(range(1, real.classes + 1)):
        raise StillroomError(f"import: classes are numbered 1 to {real.classes}, and labels from 0; {advice}")
    if len(found) != len(numbers) or max(found) >= real.classes:
        raise StillroomError(
            f"import: numbers of classes reach {max(found)} in {len(numbers)} names, {len(found)} of them different, "
            f"but {real.name!r} has the labels 0 to {real.classes - 1}; {advice}"
        )
    if real.name in TWO_ORDERS and not all(map(WORDNET_ID.fullmatch, real.class_names)):
        raise StillroomError(
            f"import: the set numbers the classes of {real.name!r}, most likely by sorted WordNet id, but labels here "
            f"follow wnids.txt; {advice}"
        )
    return numbers, [f"classes matched by number, in label order: 0 is {real.class_names[0]!r}"]


def names_of_folders(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Return the class names of class folders by the index that an export left in `root`; without one, their own.

    Folders are only numbered where the classes' names would not do for them, and numbers say nothing of other data.
    """
    named = {line["file"].partition("/")[0]: line["class"] for line in read_index(root)}
    return tuple(named[folder] for folder in folders) if named.keys() >= set(folders) else tuple(folders)


def plain_name(name: str) -> str:
    """Return a class name as it is compared: composed letters, no case, one underscore for any signs."""
    return re.sub(r"[\W_]+", "_", unicodedata.normalize("NFC", name)).casefold().strip("_")


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise StillroomError(f"import: {path} cannot be read as text: {error}") from error
