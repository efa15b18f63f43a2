"""The artifact: a distilled set, the views that students see of it, and its folder on disk.

    distilled = load_distilled("runs/mine/distilled")
    for image, soft_label in DataLoader(distilled.views(), batch_size=64, shuffle=True):
        ...

The folder (manifest.json names the files and their SHA-256; see manifest.py) opens without this module: images are PNG,
JPEG or float16 bytes in a parquet file, compensators and labels are safetensors. Nothing here needs a teacher or
training code.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from stillroom.artifact import (
    ImageFile,
    StoredImages,
    blocks_of,
    can_hold,
    check_part,
    decode_files,
    decode_images,
    encode_picture,
    keep_original,
    to_8_bits,
    to_pixels,
    write_version,
)
from stillroom.card import Budget, budget_of, build_card, build_contact_sheet, sheet_rows
from stillroom.compute import map_in_threads
from stillroom.errors import StillroomError, suggest
from stillroom.files import Pieces, count_pieces, load_tensors, sha256_bytes, tensor_pieces
from stillroom.logits import StoredLogits
from stillroom.manifest import (
    CARD_ROLES,
    MANIFEST_NAME,
    FileFacts,
    ImageEncoding,
    ImageEncodingChoice,
    LabelKind,
    Manifest,
    PictureEncoding,
    PoolFacts,
    file_name,
    read_manifest,
)

JPEG_QUALITY = 75  # what the published scripts save their views with

# Larger images are stored with loss: of photographs at 224 pixels PNG takes 2.8 times what JPEG 95 does (docs/log.md).
LOSSLESS_UP_TO = 64

LABEL_ROWS = 8192  # of soft labels that are looked at at a time
EXACT_ENCODINGS = ("png", "float16")  # what images are encoded by whenever they are saved, since nothing is lost

Transform = Callable[[Tensor], Tensor]
Originals = Callable[[Tensor], Sequence[bytes | None]]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise StillroomError(message)


@dataclass(frozen=True, eq=False)
class StoredCompensators:
    """Compensators as they are stored, in [0, 1] pixel units.

    `codes` [teachers, slots, 3, height, width]: float16, or int8 with `scale` float32 [teachers, slots, 3, 1, 1], where
    value = code * scale. Raises StillroomError for other shapes and types, and where values are not finite.
    """

    codes: Tensor
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        codes, scale = self.codes, self.scale
        _require(
            codes.ndim == 5 and codes.shape[2] == 3 and codes.numel() > 0,
            f"compensators have shape {list(codes.shape)}, but need [teachers, slots, 3, height, width].",
        )
        _require(
            codes.dtype == (torch.float16 if scale is None else torch.int8),
            f"compensators are {codes.dtype} {'without' if scale is None else 'with'} a scale, but must be float16 "
            "without or int8 with one: make them by quantize_compensators.",
        )
        if scale is not None:
            shape = [*codes.shape[:3], 1, 1]
            _require(
                scale.dtype == torch.float32 and list(scale.shape) == shape,
                f"the compensators' scale is {scale.dtype} {list(scale.shape)}, but must be float32 {shape}.",
            )
        finite = torch.isfinite(codes if scale is None else scale).flatten(2).all(2)
        bad = (~finite).nonzero().tolist()[:3]
        _require(
            not bad,
            f"compensators of [teacher, slot] {bad} are not finite, or too large to store: their optimisation went "
            "astray; lower its learning rate or check its teacher.",
        )

    @property
    def raw_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def to(self, device: torch.device | str) -> StoredCompensators:
        """The same compensators on another device."""
        return StoredCompensators(self.codes.to(device), None if self.scale is None else self.scale.to(device))


def quantize_compensators(compensators: Tensor, bits: Literal[8, 16]) -> StoredCompensators:
    """Store float32 [teachers, slots, 3, height, width] in 16 bits (float16) or 8 (a scale per teacher, slot, channel).

    At 8 bits no value moves by more than half a scale, which is the channel's largest magnitude / 127.
    """
    if bits == 16:
        return StoredCompensators(compensators.detach().to(torch.float16))
    _require(bits == 8, f"bits of the compensators is {bits!r}, but must be 8 or 16.")
    values = compensators.detach().float()
    scale = values.abs().amax(dim=(3, 4), keepdim=True) / 127
    # An all-zero channel has scale 0; dividing by 1 there keeps its codes 0.
    codes = (values / torch.where(scale > 0, scale, 1.0)).round().clamp(-127, 127).to(torch.int8)
    return StoredCompensators(codes, scale)


def dequantize_compensators(stored: StoredCompensators) -> Tensor:
    """Float32 [teachers, slots, 3, height, width] in [0, 1] pixel units, as every view is formed from."""
    return stored.codes.float() if stored.scale is None else stored.codes.float() * stored.scale


@dataclass(frozen=True, eq=False)
class DistilledSet:
    """Images, compensators and labels of one distilled set, all on one device.

    images uint8 [n, 3, height, width] (naturals, or another method's images), or float16 in [0, 1] units, which may lie
    beyond 0 and 1, where the manifest's image_encoding is "float16"; what would take too much memory is decoded where
    rows of it are asked for (`artifact.StoredImages`); labels int64 [n]; slots int64 [n], the index of
    each image within its class; soft_labels float16 [views, classes], logits in the order of `view_table`, static or
    learned; `image_files`: the images as they are stored, where that loses something (see `with_image_encoding`), else
    None; pool: replayed labels [epochs, steps, batch, classes] of the batches that `manifest.pool` describes, which
    `replay.ReplayLoader` forms; it alone stays on the CPU, and goes to the device batch by batch. originals: given
    positions int64 [b], the files that these images were read from, None where there is none; `with_image_encoding`
    keeps those that it can.
    Raises StillroomError where the parts contradict each other or the manifest.
    """

    images: Tensor | StoredImages
    labels: Tensor
    slots: Tensor
    compensators: StoredCompensators | None
    soft_labels: Tensor | None
    manifest: Manifest
    image_files: tuple[bytes, ...] | None = None
    pool: StoredLogits | None = None
    originals: Originals | None = None

    def __post_init__(self) -> None:
        manifest, count, stored = self.manifest, len(self.images), self.compensators
        expected = [count, 3, *manifest.image_size]
        pixels = manifest.pixel_encoding
        _require(
            self.images.dtype == getattr(torch, pixels) and list(self.images.shape) == expected and count > 0,
            f"images are {self.images.dtype} {list(self.images.shape)}, but must be {pixels} {expected}, at least one, "
            f"as image_encoding is {manifest.image_encoding!r}.",
        )
        if isinstance(self.images, Tensor) and pixels == "float16":
            bad = (~torch.isfinite(self.images).flatten(1).all(1)).nonzero().flatten().tolist()[:3]
            _require(
                not bad,
                f"pixels of images {bad} are not finite in float16: their optimisation went astray; lower its learning "
                "rate.",
            )
        _require(
            (self.image_files is None) == (manifest.image_encoding in EXACT_ENCODINGS)
            and (self.image_files is None or len(self.image_files) == count),
            f"image_encoding is {manifest.image_encoding!r}, but the encoded images are not there: use "
            "with_image_encoding.",
        )
        slot_count = 2**63 - 1 if stored is None else stored.codes.shape[1]
        limits = {"labels": (self.labels, len(manifest.class_names)), "slots": (self.slots, slot_count)}
        for name, (values, limit) in limits.items():
            _require(
                values.dtype == torch.int64 and values.shape == (count,),
                f"{name} are {values.dtype} {list(values.shape)}, but must be int64 [{count}].",
            )
            low, high = int(values.min()), int(values.max())
            _require(
                low >= 0 and high < limit, f"{name} reach from {low} to {high}, but must lie from 0 to {limit - 1}."
            )
        if stored is None:
            _require(
                manifest.views.naturals_as_views,
                "views.naturals_as_views is false, but without compensators no other views are left: set it true.",
            )
        else:
            _require(
                list(stored.codes.shape[3:]) == expected[2:] and len(stored.codes) == len(manifest.teachers),
                f"compensators have shape {list(stored.codes.shape)}, but the manifest names {len(manifest.teachers)} "
                f"teachers and images of {expected[2:]} pixels.",
            )
        presence = "absent" if self.soft_labels is None else "there"
        _require(
            (presence == "there") == (manifest.label_kind in ("static", "learned")),
            f"label_kind is {manifest.label_kind!r}, but soft labels are {presence}: use with_labels.",
        )
        if self.soft_labels is not None:
            labels, shape = self.soft_labels, [self.view_count, len(manifest.class_names)]
            _require(
                labels.dtype == torch.float16 and list(labels.shape) == shape,
                f"soft labels are {labels.dtype} {list(labels.shape)}, but must be float16 {shape}: a row per view.",
            )
            finite = torch.cat([block.isfinite().all(1) for block in labels.split(LABEL_ROWS)])
            rows = (~finite).nonzero().flatten().tolist()[:3]
            _require(not rows, f"soft labels of views {rows} are not finite in float16: check their teachers.")
        _require(
            (self.pool is None) == (manifest.pool is None),
            f"label_kind is {manifest.label_kind!r}, but the pool of labels is "
            f"{'absent' if self.pool is None else 'there'}: use with_pool.",
        )
        if self.pool is not None and manifest.pool is not None:
            batch = min(manifest.pool.batches.batch_size, self.view_count)
            shape = [manifest.pool.epochs, self.view_count // batch, batch, len(manifest.class_names)]
            _require(
                list(self.pool.shape) == shape and self.pool.encoding == manifest.pool.encoding,
                f"the pool holds {self.pool.encoding} logits {list(self.pool.shape)}, but must hold "
                f"{manifest.pool.encoding} {shape}: epochs, steps, batch, classes.",
            )

    @property
    def view_count(self) -> int:
        """Number of views: images times teachers, and the images themselves where the manifest counts them."""
        teachers = 0 if self.compensators is None else len(self.compensators.codes)
        return len(self.images) * (teachers + int(self.manifest.views.naturals_as_views))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what labels are made from: images, classes, compensators, how views are formed, teachers' weights.

        Not of labels that can be made again, nor of how images are stored: sets that students could not tell apart are
        equal. Labels and a learning rate that were learned count, since nothing else tells of them.
        """
        stored = self.compensators
        parts = [self.labels, self.slots, *([] if stored is None else [stored.codes])]
        parts += [] if stored is None or stored.scale is None else [stored.scale]
        if self.soft_labels is not None and self.manifest.label_kind == "learned":
            parts.append(self.soft_labels)
        facts: list[Any] = [dataclasses.asdict(self.manifest.views), [t.hash for t in self.manifest.teachers]]
        facts += [] if self.manifest.learning_rate is None else [self.manifest.learning_rate]
        of_images = self.images.sha256 if isinstance(self.images, StoredImages) else _sha256(self.images)
        digests = [of_images, *map(_sha256, parts)]
        return sha256_bytes(json.dumps([digests, facts]).encode())

    def view_table(self) -> Tensor:
        """int64 [views, 2]: the index of the view's image, and of its compensator (teacher * slots + slot) or -1.

        First the images themselves (if they are views), then one block per teacher; images in order in every block.
        """
        return self._table

    def form_views(self, rows: Tensor) -> Tensor:
        """Views of the given rows (int64 [batch]) of `view_table`: float32 [batch, 3, height, width] in pixel units.

        image / 255 (float16 images as they are) + compensator, from what is stored, cut to [0, 1] if the manifest says
        so. With the encoding "jpeg75" every view, plain images included, is what an 8-bit JPEG leaves of it; the first
        call encodes all, where these are not too many to hold.
        """
        rows = rows.to(self.images.device, non_blocking=True)
        if self.manifest.views.view_encoding != "jpeg75":
            return self._form_exact(rows)
        held = can_hold(self.view_count * self.images.shape[1:].numel())
        return (self._jpeg_views[rows] if held else self._through_jpeg(rows)).float() / 255

    def views(
        self, transform: Transform | None = None, normalize: bool = True, temperature: float = 1.0
    ) -> ViewDataset:
        """The views as a torch Dataset of (image float32 [3, height, width], soft label float32 [classes]).

        `transform` acts on one image in pixel units, before mean and std of the manifest are applied. Soft labels are
        probabilities: softmax(stored logits / temperature), or one at the class where labels are hard.
        Raises StillroomError for dynamic labels, which only teachers can give, and for replayed ones, which belong to
        augmented batches: `replay.ReplayLoader` forms those.
        """
        _require(
            self.manifest.label_kind != "replayed",
            "label_kind is 'replayed', so these labels belong to augmented batches, not to plain views: train on the "
            "batches of stillroom.ReplayLoader.",
        )
        _require(
            self.manifest.label_kind != "dynamic",
            "label_kind is 'dynamic', so this set holds no labels to train on: let teachers label its views as you "
            "train, or store labels by with_labels.",
        )
        _require(temperature > 0, f"temperature is {temperature}, but must be above zero.")
        # Without where the originals lie, which other processes need not and cannot be given.
        bare = self if self.originals is None else dataclasses.replace(self, originals=None)
        return ViewDataset(bare, transform, normalize, temperature)

    def with_labels(self, soft_labels: Tensor | None, kind: LabelKind | None = None) -> DistilledSet:
        """The same set with other labels: logits [views, classes] of any float type, or None for "hard" or "dynamic".

        `kind` is only needed for "dynamic" and "learned". Saved to the same folder, the old labels go as the new ones
        come; no teacher brings learned ones back.
        """
        label_kind = kind or ("hard" if soft_labels is None else "static")
        stored = None if soft_labels is None else soft_labels.detach().to(self.images.device, torch.float16)
        manifest = dataclasses.replace(self.manifest, label_kind=label_kind, pool=None, files={})
        return dataclasses.replace(self, soft_labels=stored, pool=None, manifest=manifest)

    def with_pool(self, pool: StoredLogits, facts: PoolFacts) -> DistilledSet:
        """The same set with replayed labels: logits [epochs, steps, batch, classes] of the batches that `facts` say."""
        manifest = dataclasses.replace(self.manifest, label_kind="replayed", pool=facts, files={})
        return dataclasses.replace(self, soft_labels=None, pool=pool, manifest=manifest)

    def with_image_encoding(self, encoding: ImageEncodingChoice) -> DistilledSet:
        """The same set with its images as a file of this encoding leaves them: "png" loses nothing, "jpeg95" a little.

        "auto": png up to 64 pixels, jpeg95 above; float16 images stay as they are. Under "jpeg95" an image that is a
        whole JPEG of the real data keeps that file, less its metadata, and so loses nothing; `original_images` of the
        manifest's extra says which do. Compensators and learned labels
        stay, though they were optimised with the images before. Other soft labels go, since they were made from the
        views before: label the set again. Raises StillroomError for float16 images in any other encoding, and for
        images that have lost something already.
        """
        choices = get_args(ImageEncodingChoice)
        _require(encoding in choices, f"image_encoding {encoding!r} is not known." + suggest(str(encoding), choices))
        if self.manifest.image_encoding == "float16":
            _require(
                encoding == "auto",
                f"the images are float16 pixels, which {encoding} would cut and round: leave image_encoding at 'auto'.",
            )
            return self
        encoding = choose_encoding(encoding, max(self.manifest.image_size))
        if encoding == self.manifest.image_encoding:
            return self
        _require(
            self.image_files is None,
            f"the images are stored as {self.manifest.image_encoding}; encode the originals as {encoding} instead.",
        )
        files, kept = self._encode_or_keep(encoding)
        extra = self.manifest.extra | ({"original_images": kept} if kept else {})
        label_kind = self.manifest.label_kind
        soft_labels = self.soft_labels if label_kind == "learned" else None
        label_kind = "hard" if label_kind in ("static", "replayed") else label_kind
        return dataclasses.replace(
            self,
            images=decode_files(files, encoding, self.manifest.image_size).to(self.images.device),
            image_files=files,
            soft_labels=soft_labels,
            pool=None,
            originals=None,
            manifest=dataclasses.replace(
                self.manifest, image_encoding=encoding, label_kind=label_kind, pool=None, extra=extra, files={}
            ),
        )

    def to(self, device: torch.device | str) -> DistilledSet:
        """The same set on another device."""
        return dataclasses.replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            slots=self.slots.to(device),
            compensators=None if self.compensators is None else self.compensators.to(device),
            soft_labels=None if self.soft_labels is None else self.soft_labels.to(device),
        )

    def save(self, path: Path | str) -> Manifest:
        """Write the set to the folder `path` and return its manifest, `files` filled. Equal sets give equal bytes.

        An older version in the folder stays whole until the new manifest replaces the old; its files go after that.
        Raises StillroomError where the folder holds other things or cannot be written.
        """
        contents = _encode_parts(self)
        files = _describe(self, contents)
        card: dict[str, bytes | Pieces] = {
            "contact_sheet": self._contact_sheet(),
            "card": build_card(dataclasses.replace(self.manifest, files=files)),
        }
        manifest = dataclasses.replace(self.manifest, files=files | _describe(self, card))
        write_version(Path(path), manifest, contents | card)
        return manifest

    def _contact_sheet(self) -> bytes:
        shown = sheet_rows(self.labels)
        images = self.images[shown]
        offsets = None if self.compensators is None else dequantize_compensators(self.compensators)
        images = images if images.dtype == torch.uint8 else to_8_bits(images)
        return build_contact_sheet(images, self.labels[shown], offsets)

    def _encode(self, encoding: ImageEncoding) -> tuple[bytes, ...]:
        """The images as files, encoded by a thread per processor."""
        encode = functools.partial(encode_picture, encoding=encoding)
        return tuple(file for block in blocks_of(self.images) for file in map_in_threads(encode, block.unbind()))

    def _encode_or_keep(self, encoding: PictureEncoding) -> tuple[tuple[bytes, ...], list[int]]:
        """The images as files, and the positions of those that keep their original one."""
        if encoding != "jpeg95" or self.originals is None:  # smaller JPEGs are asked for to be small
            return self._encode(encoding), []
        files: list[bytes] = []
        kept: list[int] = []

        def encode(image: Tensor, original: bytes | None) -> tuple[bytes, bool]:
            file = keep_original(image, original)
            return (encode_picture(image, encoding), False) if file is None else (file, True)

        for block in blocks_of(self.images):
            originals = self.originals(torch.arange(len(files), len(files) + len(block)))
            pairs = map_in_threads(lambda pair: encode(*pair), list(zip(block.unbind(), originals, strict=True)))
            kept += [len(files) + at for at, (_, is_original) in enumerate(pairs) if is_original]
            files += [file for file, _ in pairs]
        return tuple(files), kept

    def _form_exact(self, rows: Tensor) -> Tensor:
        image, compensator = self._table[rows].unbind(1)
        views = self.images[image].float()
        if self.images.dtype == torch.uint8:
            views /= 255
        if self._offsets is not None:
            views += self._offsets[compensator]
        return views.clamp_(0, 1) if self.manifest.views.clip else views

    @functools.cached_property
    def _table(self) -> Tensor:
        index = torch.arange(len(self.images), device=self.images.device)
        blocks = [torch.stack((index, torch.full_like(index, -1)), 1)] if self.manifest.views.naturals_as_views else []
        if self.compensators is not None:
            teachers, slot_count = self.compensators.codes.shape[:2]
            blocks += [torch.stack((index, teacher * slot_count + self.slots), 1) for teacher in range(teachers)]
        return torch.cat(blocks)

    @functools.cached_property
    def _offsets(self) -> Tensor | None:
        if self.compensators is None:
            return None
        values = dequantize_compensators(self.compensators).flatten(0, 1)  # [teachers * slots, 3, height, width]
        return torch.cat((values, torch.zeros_like(values[:1])))  # index -1, the image itself, adds nothing

    @functools.cached_property
    def _jpeg_views(self) -> Tensor:
        return torch.cat([self._through_jpeg(rows) for rows in torch.arange(self.view_count).split(256)])

    def _through_jpeg(self, rows: Tensor) -> Tensor:
        """Views uint8 [batch, 3, height, width] as a JPEG leaves them."""
        # Floored, not rounded, as the published scripts do; x / 255 * 255 is exact for every 8-bit x.
        views = (self._form_exact(rows.to(self.images.device)).clamp(0, 1) * 255).floor().to(torch.uint8)

        def encode(view: Tensor) -> Tensor:
            buffer = io.BytesIO()
            Image.fromarray(to_pixels(view)).save(buffer, "JPEG", quality=JPEG_QUALITY)
            return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)

        return torch.stack(map_in_threads(encode, views.cpu().unbind())).to(self.images.device)


def choose_encoding(choice: ImageEncodingChoice, side: int) -> PictureEncoding:
    """Return what images of `side` pixels are stored as; auto: png up to 64 pixels, jpeg95 above."""
    if choice != "auto":
        return choice
    return "png" if side <= LOSSLESS_UP_TO else "jpeg95"


class ViewDataset(Dataset[tuple[Tensor, Tensor]]):
    """What `DistilledSet.views` returns; a DataLoader asks it for a whole batch at once."""

    def __init__(
        self, distilled: DistilledSet, transform: Transform | None, normalize: bool, temperature: float
    ) -> None:
        self.distilled, self.transform, self.normalize, self.temperature = distilled, transform, normalize, temperature

    def __len__(self) -> int:
        return self.distilled.view_count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        if indices and not (-len(self) <= min(indices) and max(indices) < len(self)):
            raise IndexError(f"view index out of range: there are {len(self)} views")
        rows = torch.as_tensor(indices, dtype=torch.int64, device=self.distilled.images.device)
        views, soft_labels = self.distilled.form_views(rows), self._soft_labels(rows)
        if self.transform is not None:
            transformed = [self.transform(view) for view in views]
            shapes = sorted({tuple(view.shape) for view in transformed})
            _require(len(shapes) <= 1, f"transform gives views of shapes {shapes}, but a batch needs one: resize them.")
            views = torch.stack(transformed)
        if self.normalize:
            constants = self.distilled.manifest.normalization
            mean, std = (views.new_tensor(values).view(3, 1, 1) for values in (constants.mean, constants.std))
            views = (views - mean) / std
        return list(zip(views, soft_labels, strict=True))

    def _soft_labels(self, rows: Tensor) -> Tensor:
        logits = self.distilled.soft_labels
        if logits is not None:
            return (logits[rows].float() / self.temperature).softmax(1)
        labels = self.distilled.labels[self.distilled.view_table()[rows, 0]]
        return torch.nn.functional.one_hot(labels, len(self.distilled.manifest.class_names)).float()


def find_set(path: Path) -> Path:
    """Return a distilled set's own folder, whether that or its run's directory is given."""
    return path / "distilled" if (path / "distilled" / "manifest.json").exists() else path


def load_distilled(path: Path | str, ignore_card: bool = False) -> DistilledSet:
    """Read the folder `path` that a save has written; every file's SHA-256 is checked and nothing is unpickled.

    `ignore_card` leaves README.md and contact_sheet.png unchecked, for those who edited the card.
    Raises StillroomError that names the file that is missing, changed or not as the manifest says.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    skipped = CARD_ROLES if ignore_card else ()
    paths = {role: check_part(folder, role, facts) for role, facts in manifest.files.items() if role not in skipped}
    return _decode(folder, manifest, paths)


def verify_distilled(path: Path | str) -> list[str]:
    """Everything that is wrong with the folder `path`, a sentence each; an empty list where the set is whole."""
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except StillroomError as error:
        return [str(error)]
    problems: list[str] = []
    paths: dict[str, Path] = {}
    for role, facts in manifest.files.items():
        try:
            paths[role] = check_part(folder, role, facts)
        except StillroomError as error:
            problems.append(str(error))
    if problems:
        return problems
    try:
        _decode(folder, manifest, paths)
    except StillroomError as error:
        return [str(error)]
    return []


def count_bytes(distilled: DistilledSet) -> Budget:
    """Bytes of images, compensators and labels, raw and stored, and the ratios to the real set.

    What the manifest does not list as it is (of a set that was never saved: all) is encoded, to learn what its files
    would take.
    """
    holdings, listed = _holdings(distilled), distilled.manifest.files
    files = {role: f for role, f in listed.items() if (f.entries, f.raw_bytes) == holdings.get(role)}
    files |= _describe(distilled, _encode_parts(distilled, holdings.keys() - files.keys()))
    return budget_of(dataclasses.replace(distilled.manifest, files=files))


def count_raw_bytes(distilled: DistilledSet) -> int:
    """Return the raw bytes of images, compensators and labels, without encoding anything."""
    return sum(size for _, size in _holdings(distilled).values())


def _holdings(distilled: DistilledSet) -> dict[str, tuple[int, int]]:
    """Entries and raw bytes of each part, by role."""
    stored, soft_labels = distilled.compensators, distilled.soft_labels
    holdings = {"images": (len(distilled.images), distilled.images.nbytes)}
    if stored is not None:
        holdings["compensators"] = (stored.codes.shape[:2].numel(), stored.raw_bytes)
    if soft_labels is not None:
        holdings["labels"] = (len(soft_labels), soft_labels.nbytes)
    if distilled.pool is not None:
        holdings["labels"] = (distilled.pool.shape[:-1].numel(), distilled.pool.raw_bytes)
    return holdings


def _describe(distilled: DistilledSet, contents: Mapping[str, bytes | Pieces]) -> dict[str, FileFacts]:
    holdings, files = _holdings(distilled), {}
    for role, content in contents.items():
        digest = sha256_bytes(content)
        files[role] = FileFacts(file_name(role, digest), count_pieces(content), digest, *holdings.get(role, (0, 0)))
    return files


def _sha256(part: Tensor) -> str:
    return sha256_bytes([part.contiguous().cpu().numpy().data])


def _encode_parts(
    distilled: DistilledSet, roles: Collection[str] = ("images", "compensators", "labels")
) -> dict[str, bytes | Pieces]:
    stored, class_names = distilled.compensators, distilled.manifest.class_names
    contents: dict[str, bytes | Pieces] = {}
    if "images" in roles:
        encoding = distilled.manifest.image_encoding
        files = distilled.image_files or distilled._encode(encoding)
        contents["images"] = ImageFile(files, distilled.labels, distilled.slots, class_names, encoding)
    if stored is not None and "compensators" in roles:
        tensors = {"compensators": stored.codes} | ({} if stored.scale is None else {"scale": stored.scale})
        contents["compensators"] = tensor_pieces(tensors, {"units": "pixels in [0, 1]"}, "the compensators")
    if distilled.soft_labels is not None and "labels" in roles:
        contents["labels"] = tensor_pieces({"logits": distilled.soft_labels}, {}, "the labels")
    if distilled.pool is not None and "labels" in roles:
        contents["labels"] = tensor_pieces(distilled.pool.tensors, {}, "the labels")
    return contents


def _decode(folder: Path, manifest: Manifest, paths: dict[str, Path]) -> DistilledSet:
    """The set whose files, by role, lie at `paths` and have been checked."""
    for role in ("images", *CARD_ROLES):
        _require(role in manifest.files, f"{folder / MANIFEST_NAME}: files lacks {role}.")
    compensators, soft_labels, pool = None, None, None
    path = paths["images"]
    try:
        encoding = manifest.image_encoding
        images, labels, slots, image_files = decode_images(
            path, manifest.files["images"], manifest.image_size, encoding
        )
        if "compensators" in paths:
            path = paths["compensators"]
            tensors, _ = load_tensors(path)
            compensators = StoredCompensators(tensors["compensators"], tensors.get("scale"))
        if "labels" in paths:
            path = paths["labels"]
            tensors, _ = load_tensors(path)
            if manifest.pool is None:
                soft_labels = tensors["logits"]
            else:
                pool = StoredLogits(manifest.pool.encoding, len(manifest.class_names), tensors)
    except Exception as error:  # the parsers raise many classes, all of which mean the same
        raise StillroomError(f"{path} does not hold what the manifest says ({error}): save the set again.") from error
    try:
        kept = None if encoding in EXACT_ENCODINGS else image_files
        distilled = DistilledSet(images, labels, slots, compensators, soft_labels, manifest, kept, pool)
    except StillroomError as error:
        raise StillroomError(f"{folder}: {error}") from error
    holdings = _holdings(distilled)
    for role in paths:
        facts = manifest.files[role]
        _require(
            (facts.entries, facts.raw_bytes) == holdings.get(role, (0, 0))
            and facts.name == file_name(role, facts.sha256),
            f"{folder / MANIFEST_NAME}: the entries or raw bytes of files are not what the files hold: save the set "
            "again.",
        )
    return distilled
