"""manifest.json: what a distilled set says about itself, and the only list of the files that belong to it.

The dataclasses are the schema: their fields are exactly the keys of the file, and both directions run the same checks.
A method that needs more adds a value to a `Literal` (float pixels and learned labels did) or, where reading does not
depend on it, a key to `extra` (a learned learning rate). A key whose default suits every older set joins LATER_KEYS;
anything else raises SCHEMA_VERSION.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stillroom.errors import StillroomError, suggest
from stillroom.files import json_bytes, parse_json, read_bytes, sha256_bytes

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
NOT_STATED = "not stated"  # what is said of a licence that nobody has told
SEAL_KEY = "manifest_sha256"  # of the manifest's own bytes without this key
LARGEST_FILE = 2**46  # bytes; more than any image set that was ever distilled
LIBRARIES = ("stillroom", "torch", "torchvision", "timm", "numpy", "pillow", "pyarrow", "safetensors")

LabelKind = Literal["hard", "static", "replayed", "dynamic", "learned"]
LabelEncoding = Literal["float16", "uint8", "top4", "top8", "top16", "top32"]  # of replayed labels; see logits.py
ViewEncoding = Literal["exact", "jpeg75"]
# Lossless, or JPEG of a quality, of which ours subsample no colours.
PictureEncoding = Literal["png", "jpeg95", "jpeg90", "jpeg75"]
# float16: the bytes of pixels that a method learned without bounds; no choice of the user's, who has 8 bits or not.
ImageEncoding = Literal[PictureEncoding, "float16"]
ImageEncodingChoice = Literal["auto", PictureEncoding]  # auto: by the images' size, float16 as it is
Resize = Literal["refuse", "squash", "crop"]

# Keys that manifests of this schema version may lack, since they came later; their defaults say what was meant.
LATER_KEYS = ("dataset.resize", "dataset.licence", ".pool", "pool.batches.shuffle_patches")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the bits of a result; none of them is imported."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise StillroomError(message)


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of the real training images, in [0, 1] pixel units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = tuple(map(float, getattr(self, name)))  # 1 and 1.0 are one value but not the same bytes of JSON
            object.__setattr__(self, name, values)
            _require(
                len(values) == 3 and all(math.isfinite(value) for value in values),
                f"normalization.{name} is {values}, but needs three finite numbers, one per channel.",
            )
        _require(min(self.std) > 0, f"normalization.std is {self.std}, but must be above zero.")


@dataclass(frozen=True)
class RealFacts:
    """The real training set: what it was, and the sizes that compression ratios compare with.

    `fingerprint` is a hash of its content; `raw_bytes` counts uint8 pixels, `stored_bytes` its files; `flip` says
    whether a mirrored image keeps its class. `resize` is the rule by which its images got their size: "refuse" where
    they had it already, or where the set is older than this fact. `licence`: what its authors allow, in words.
    """

    name: str
    fingerprint: str
    images: int
    raw_bytes: int
    stored_bytes: int
    flip: bool
    resize: Resize = "refuse"
    licence: str = NOT_STATED

    def __post_init__(self) -> None:
        for name in ("images", "raw_bytes", "stored_bytes"):
            _require(getattr(self, name) > 0, f"dataset.{name} is {getattr(self, name)}, but must be above zero.")


@dataclass(frozen=True)
class TeacherFacts:
    """A teacher: its network, its top-1 accuracy on the real test split in percent, the hash of its weights.

    Hash "" and accuracy 0 where a set that others published gives no more than the name.
    """

    name: str
    accuracy: float
    hash: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "accuracy", float(self.accuracy))
        _require(
            0 <= self.accuracy <= 100,
            f"accuracy of teacher {self.name!r} is {self.accuracy}, but must lie between 0 and 100 percent.",
        )

    def show_accuracy(self, decimals: int) -> str:
        """The accuracy as it is printed."""
        return f"{self.accuracy:.{decimals}f} %" if self.hash else "accuracy not known"


@dataclass(frozen=True)
class ViewSettings:
    """How a student's view is formed.

    `naturals_as_views`: images are views too, beside image + compensator. `clip`: views are cut to [0, 1].
    `view_encoding`: "exact", or "jpeg75": 8 bit and JPEG of quality 75, as the published scripts store theirs.
    `order` of the views, and so of the label rows: the images, then one block per teacher, images in order in each.
    """

    naturals_as_views: bool = True
    clip: bool = True
    view_encoding: ViewEncoding = "exact"
    order: Literal["naturals_then_teachers"] = "naturals_then_teachers"


@dataclass(frozen=True)
class BatchSettings:
    """The settings of training that decide batches, by the names that `train.TrainConfig` has for them."""

    batch_size: int
    crop_padding: int
    flip: bool
    resized_crop: bool
    resized_crop_scale: tuple[float, ...]
    mixup_beta: float
    mixup_folded: bool
    cutmix_beta: float
    shuffle_patches: int = 1

    def __post_init__(self) -> None:
        scale = tuple(map(float, self.resized_crop_scale))
        object.__setattr__(self, "resized_crop_scale", scale)
        _require(len(scale) == 2, f"pool.batches.resized_crop_scale is {scale}, but needs two numbers.")
        lowest = {"batch_size": 1, "crop_padding": 0, "mixup_beta": 0, "cutmix_beta": 0, "shuffle_patches": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            _require(low <= value <= 2**31, f"pool.batches.{name} is {value}, but must be {low} or more.")


@dataclass(frozen=True)
class PoolFacts:
    """A pool of replayed labels: teachers' logits of the augmented batches of `epochs` epochs, and how to draw these.

    Order, crops, flips and mixing derive from `seed` by `seed_scheme` (`compute.SEED_SCHEME`) and `batches`, so that
    only logits are stored, [epochs, steps, batch, classes] in the order of the draws; `draws_sha256` tells a machine
    that draws otherwise. `teachers` are the hashes of the weights that labelled. Logits suit every temperature.
    """

    epochs: int
    seed: int
    encoding: LabelEncoding
    batches: BatchSettings
    teachers: tuple[str, ...]
    seed_scheme: int
    draws_sha256: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", tuple(self.teachers))
        _require(self.epochs > 0, f"pool.epochs is {self.epochs}, but must be at least 1.")
        _require(
            self.encoding in get_args(LabelEncoding),
            f"pool.encoding {self.encoding!r} is not known." + suggest(str(self.encoding), get_args(LabelEncoding)),
        )


@dataclass(frozen=True)
class FileFacts:
    """One file of the set: its name, size in bytes and SHA-256, and what it holds.

    `entries` counts images, compensators or label rows, `raw_bytes` what their tensors take in memory as stored (uint8
    or float16 pixels; float16, or 8-bit codes with their scales; logits as they are encoded). Both are 0 for the card.
    """

    name: str
    bytes: int
    sha256: str
    entries: int
    raw_bytes: int

    def __post_init__(self) -> None:
        _require(0 < self.bytes <= LARGEST_FILE, f"file {self.name!r} cannot have {self.bytes} bytes.")
        for name in ("entries", "raw_bytes"):
            count = getattr(self, name)
            _require(0 <= count <= LARGEST_FILE, f"file {self.name!r} cannot have {name} {count}.")
        _require(
            re.fullmatch(r"[0-9a-f]{64}", self.sha256) is not None,
            f"sha256 of file {self.name!r} is {self.sha256!r}, but must have 64 hexadecimal digits.",
        )


# The whole list of names a manifest may hold: data files carry their hash, the card has the name that hubs look for.
FILE_NAMES = {
    "images": "images-{hash}.parquet",
    "compensators": "compensators-{hash}.safetensors",
    "labels": "labels-{hash}.safetensors",
    "contact_sheet": "contact_sheet.png",
    "card": "README.md",
}
CARD_ROLES = ("contact_sheet", "card")


def file_name(role: str, sha256: str) -> str:
    """The only name that the file of this role and content may have."""
    return FILE_NAMES[role].format(hash=sha256[:12])


@dataclass(frozen=True)
class Manifest:
    """What a distilled set is made of and how it came to be; `files` is filled when it is saved.

    `recipe` holds the resolved settings of the method and `extra` anything else that JSON can hold and that reading
    the set does not depend on. `class_names` stand in label order, `image_size` is (height, width), `ipc` the budget in
    images per class. `label_kind`: "hard" (the class), "static" (soft labels stored, one per view), "replayed" (soft
    labels of augmented batches stored, as `pool` says), "dynamic" (teachers label every augmented batch) or "learned"
    (stored as static ones are, but the method's own: no teacher could make them again). `image_encoding` is how the
    image files are compressed; `pixel_encoding` follows from it. Raises StillroomError for values that no distilled
    set can have.
    """

    method: str
    recipe: dict[str, Any]
    dataset: RealFacts
    class_names: tuple[str, ...]
    normalization: Normalization
    image_size: tuple[int, ...]
    ipc: int
    teachers: tuple[TeacherFacts, ...] = ()
    seeds: dict[str, int] = field(default_factory=dict)
    views: ViewSettings = ViewSettings()
    label_kind: LabelKind = "hard"
    pool: PoolFacts | None = None
    pixel_encoding: Literal["uint8", "float16"] = "uint8"
    image_encoding: ImageEncoding = "png"
    libraries: dict[str, str] = field(default_factory=library_versions)
    extra: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileFacts] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in ("recipe", "extra"):
            try:
                as_read_back = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise StillroomError(f"{name} of the manifest must be plain JSON: {error}.") from error
            object.__setattr__(self, name, as_read_back)  # tuples become lists now, not at the next load
        for name in ("class_names", "image_size", "teachers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _require(len(self.class_names) > 0, "class_names is empty: give the names in label order.")
        repeated = [name for name, count in Counter(self.class_names).items() if count > 1][:5]
        _require(not repeated, f"class_names holds {repeated} more than once: give every class a name of its own.")
        _require(
            len(self.image_size) == 2 and all(0 < side <= 2**14 for side in self.image_size),
            f"image_size is {self.image_size}, but must be (height, width) between 1 and {2**14} pixels.",
        )
        _require(self.ipc > 0, f"ipc is {self.ipc}, but must be at least 1.")
        for name, value, kind in (
            ("label_kind", self.label_kind, LabelKind),
            ("views.view_encoding", self.views.view_encoding, ViewEncoding),
            ("dataset.resize", self.dataset.resize, Resize),
            ("image_encoding", self.image_encoding, ImageEncoding),
        ):
            _require(value in get_args(kind), f"{name} {value!r} is not known." + suggest(str(value), get_args(kind)))
        object.__setattr__(self, "pixel_encoding", "float16" if self.image_encoding == "float16" else "uint8")
        rate = self.learning_rate
        _require(
            rate is None or (type(rate) in (int, float) and 0 < rate < 1e6),
            f"extra.learning_rate is {rate!r:.80}, but must be a number above 0 and below 1e6.",
        )
        presence = "absent" if self.pool is None else "there"
        _require(
            (presence == "there") == (self.label_kind == "replayed"),
            f"label_kind is {self.label_kind!r}, but the facts of a pool of labels are {presence}: use with_labels or "
            "with_pool.",
        )
        for role, facts in self.files.items():
            _require(role in FILE_NAMES, f"files.{role} is not known." + suggest(role, FILE_NAMES))
            expected = file_name(role, facts.sha256)
            _require(
                facts.name == expected,
                f"files.{role}.name is {facts.name!r}, but its content is only ever stored as {expected!r}.",
            )

    @property
    def learning_rate(self) -> float | None:
        """The students' learning rate that the method learned beside the images, None where it learned none.

        It lies in `extra`: the set can be read without it, and sets that have none keep their bytes.
        """
        rate: float | None = self.extra.get("learning_rate")
        return rate


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, which end up holding their own hash: equal manifests give equal bytes."""
    return _seal(dataclasses.asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json. Raises StillroomError that names the file and the key."""
    path = folder / MANIFEST_NAME
    fix = "Give the folder that a save has written."
    if (folder / "distilled" / MANIFEST_NAME).is_file():
        fix = f"It is the directory of a run; give {folder / 'distilled'}."
    elif (folder / "sets").is_dir() and (folder / "units").is_dir():
        fix = f"It is the directory of a comparison; its sets lie in {folder / 'sets'}."
    elif (folder / "units").is_dir() and (folder / "config.json").is_file():
        fix = "It is the directory of a run that has not come so far; the command that began it goes on."
    _require(
        path.is_file() and not path.is_symlink(),
        f"{folder} is not a distilled set: it holds no file {MANIFEST_NAME}. {fix}",
    )
    return parse_manifest(read_bytes(path), path)


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """read_manifest for `content`, the bytes of `path`."""
    obj = parse_json(content, path)
    _require(isinstance(obj, dict), f"{path} holds {type(obj).__name__}, but a manifest is a JSON object.")
    version = obj.get("schema_version")
    _require(version is not None, f"{path} is not the manifest of a distilled set: it has no schema_version.")
    _require(
        type(version) is int and version == SCHEMA_VERSION,
        f"{path} has schema_version {str(version)[:40]!r}, but this stillroom reads version {SCHEMA_VERSION}: install "
        "the version that wrote it.",
    )
    unsealed = {key: value for key, value in obj.items() if key != SEAL_KEY}
    _require(
        content == _seal(unsealed, path),
        f"{path} was changed after it was written: its own hash does not fit. Restore it or save the set again.",
    )
    try:
        manifest: Manifest = _parse(Manifest, unsealed, "")
    except StillroomError as error:
        raise StillroomError(f"{path}: {error}") from error
    return manifest


def _seal(obj: dict[str, Any], path: Path = Path(MANIFEST_NAME)) -> bytes:
    return json_bytes(obj | {SEAL_KEY: sha256_bytes(json_bytes(obj, path))}, path)


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Turn JSON into an object of the type `kind`, as the schema's annotations spell it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            hints = get_type_hints(kind)
            missing = [k for k in sorted(hints.keys() - value.keys()) if f"{where}.{k}" not in LATER_KEYS]
            unknown = sorted(value.keys() - hints.keys())
            _require(not missing, f"{where or 'manifest'} lacks {', '.join(missing)}: it was edited or cut.")
            _require(not unknown, f"{where or 'manifest'} has an unknown key {(unknown or [''])[0]!r:.80}.")
            return kind(**{key: _parse(hints[key], item, f"{where}.{key}".strip(".")) for key, item in value.items()})
        expected = "an object"
    elif origin is UnionType:  # an optional section
        return None if value is None else _parse(arguments[0], value, where)
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        expected = "one of " + ", ".join(map(repr, arguments)) + "; anything else needs a newer stillroom"
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
        expected = "a list"
    elif origin is dict:
        if isinstance(value, dict):
            return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
        expected = "an object"
    else:
        if type(value) is kind or (kind is float and type(value) is int and abs(value) < 2**53):
            return kind(value)
        expected = f"of type {kind.__name__}"
    raise StillroomError(f"{where} is {value!r:.80}, but must be {expected}.")
