"""Export: a distilled set written in the layouts of other people's scripts.

    export_set(load_distilled("runs/mine/distilled"), "infer", "syn/mine")

infer       new000/class000_id000.jpg, JPEG of quality 75: what INFER's published scripts train on
folder      a folder of PNG files per class, index.csv, and soft_labels.npy (logits) where the set has them
npz         one file: train_images, train_labels, class_names, and soft_labels (logits) where the set has them
compact     one npz file of what views are formed of: images, compensators, and which of them make which view
parquet     train-00000-of-00001.parquet: image, label, soft_label (logits); opens with datasets.load_dataset(folder)
webdataset  train-000000.tar, ...: samples of <key>.png, <key>.cls, <key>.logits.npy, and classes.txt beside them
ddranking   images.pt, labels.pt, hard_labels.pt, images/: what DD-Ranking's evaluators are given, tensors or a folder

All but `compact` know no compensators, and hold views, one image each: what sharing saves is lost. Lost by all are
manifest, hashes, dynamic labels and a learned learning rate. All but float arrays and tensors hold 8 bits a channel, in
[0, 1].
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import secrets
import shutil
import tarfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from stillroom.artifact import encode_picture, to_8_bits
from stillroom.compute import build_generator
from stillroom.data import FACTS
from stillroom.distilled import DistilledSet
from stillroom.errors import StillroomError, suggest
from stillroom.files import require_free_folder, sync_folder
from stillroom.infer_files import write_infer
from stillroom.manifest import Manifest
from stillroom.softlabels import INDEX_COLUMNS, INDEX_FILE, SOFT_LABEL_FILE

ExportLayout = Literal["infer", "folder", "npz", "compact", "parquet", "webdataset", "ddranking"]
ONE_FILE = ("npz", "compact")  # layouts that are no folder

BLOCK = 256  # views that are formed at once
LONGEST_NAME = 80  # characters of a folder's name
SHARD_VIEWS = 10_000  # of a tar file
NPZ_FILE = "views.npz"  # while it is written
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)  # names that Windows keeps for itself

# The constants that DD-Ranking's evaluators normalise their test images with, by our names of the datasets.
# CIFAR-100 has CIFAR-10's there.
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DDRANKING_CONSTANTS = {"cifar10": _CIFAR10, "cifar100": _CIFAR10, "tiny-imagenet": _IMAGENET, "imagenet": _IMAGENET}


def export_set(distilled: DistilledSet, to: ExportLayout, out: Path | str) -> list[str]:
    """Write the set's views to `out` in the layout `to`; return what there is to know about it.

    `out` is a folder, new or empty, or for npz and compact a new file; it is there whole or not at all. Raises
    StillroomError where it holds something, and for sets that the layout cannot express.
    """
    if to not in WRITERS:
        raise StillroomError(f"--to {to!r} is no layout." + suggest(str(to), get_args(ExportLayout)))
    out = Path(out).resolve()
    _require_free(out, to)
    staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        staging.mkdir(parents=True)
        notes = WRITERS[to](distilled.to("cpu"), staging)
        if out.exists():
            out.rmdir()  # empty; a folder cannot be renamed onto another everywhere
        os.replace(staging / NPZ_FILE if to in ONE_FILE else staging, out)
    except OSError as error:
        raise StillroomError(f"export: {out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_folder(out.parent)
    if distilled.manifest.learning_rate is not None:
        notes.append(f"the learned learning rate, {distilled.manifest.learning_rate:g}, was not written")
    if distilled.manifest.label_kind in ("dynamic", "replayed"):
        notes.append(f"{distilled.manifest.label_kind} labels belong to augmented views: none were written")
    return notes


def _require_free(out: Path, to: ExportLayout) -> None:
    """Raise StillroomError where `out` holds something already, or is no name for what the layout `to` writes."""
    if to in ONE_FILE:
        if out.is_dir():
            raise StillroomError(f"export: {out} is a folder, but --to {to} writes a file; give {out / NPZ_FILE}")
        if out.suffix != ".npz":
            raise StillroomError(f"export: {out} does not end in .npz, by which such a file is known; give {out}.npz")
        if out.exists():
            raise StillroomError(f"export: {out} is there already; give a new file, or move that one away")
    else:
        require_free_folder(out, "export:")


def write_folder(distilled: DistilledSet, folder: Path) -> list[str]:
    """Write ``<class>/class000_id000.png`` for every view, rounded to 8 bits; rows of soft labels as in index.csv."""
    names, order = _folder_names(distilled.manifest.class_names), _class_order(distilled)
    table = distilled.view_table()
    for name in names:
        (folder / name).mkdir()
    counts = [0] * len(names)
    with (folder / INDEX_FILE).open("w", encoding="utf-8", newline="") as file:
        index = csv.writer(file, lineterminator="\n")
        index.writerow(INDEX_COLUMNS)
        for row, view in _each_view(distilled, order):
            image, compensator = table[row].tolist()
            label = int(distilled.labels[image])
            path = f"{names[label]}/class{label:03d}_id{counts[label]:03d}.png"
            counts[label] += 1
            (folder / path).write_bytes(encode_picture(to_8_bits(view), "png"))
            index.writerow([path, label, distilled.manifest.class_names[label], image, compensator])
    if distilled.soft_labels is not None:
        np.save(folder / SOFT_LABEL_FILE, distilled.soft_labels[order].numpy())
    other = [
        f"{name!r} is {own}/"
        for own, name in zip(names, distilled.manifest.class_names, strict=True)
        if own != unicodedata.normalize("NFC", name)
    ]
    told = f"folders are not named as their classes, whose names stand in {INDEX_FILE}: " + ", ".join(other[:5])
    more = f" and {len(other) - 5} more" if len(other) > 5 else ""
    return [_exactness(distilled), *([told + more] if other else [])]


def write_npz(distilled: DistilledSet, folder: Path) -> list[str]:
    """Write the arrays by the names that real data in an npz file have, so that `import` and others read them back.

    train_images [views, 3, height, width], uint8 where that is exact, else float32 in [0, 1] (beyond it only where the
    manifest does not cut views); train_labels int64 [views]; class_names, strings [classes]; soft_labels, logits
    float16 [views, classes], where the set has them. Views stand class by class.
    """
    order = _class_order(distilled)
    views = torch.stack([view for _, view in _each_view(distilled, order)])
    arrays = {
        "train_images": (to_8_bits(views) if _is_8_bit(distilled) else views).numpy(),
        "train_labels": distilled.labels[distilled.view_table()[order, 0]].numpy(),
        "class_names": np.array(distilled.manifest.class_names),
    }
    if distilled.soft_labels is not None:
        arrays["soft_labels"] = distilled.soft_labels[order].numpy()
    np.savez(folder / NPZ_FILE, **arrays)  # type: ignore[arg-type]  # its stub takes the names for its own
    notes = [", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())]
    if not _is_8_bit(distilled) and not (views.min() >= 0 and views.max() <= 1):
        notes.append("views leave [0, 1], since the set does not cut them: `import` takes them cut, or as --to folder")
    return notes


def write_compact(distilled: DistilledSet, folder: Path) -> list[str]:
    """Write what views are formed of, as stored: the parts of Equation 6, for who forms the views himself.

    images [n, 3, height, width], uint8 or, in pixel units, float16; labels int64 [n]; views int64 [views, 2], a view's
    image and its compensator or -1; compensators [m, 3, height, width], float16, or int8 with scale float32
    [m, 3, 1, 1] to multiply by; clip, whether views are cut to [0, 1]; class_names; soft_labels, logits float16
    [views, classes]. What a set has not is absent. Views stand in the order of `DistilledSet.view_table`.
    Raises StillroomError where views are not formed by adding alone.
    """
    if distilled.manifest.views.view_encoding == "jpeg75":
        raise StillroomError("--to compact: this set's views are what a JPEG leaves of them; use --to npz")
    arrays = {
        "images": distilled.images[torch.arange(len(distilled.images))].numpy(),
        "labels": distilled.labels.numpy(),
        "views": distilled.view_table().numpy(),
        "clip": np.array(distilled.manifest.views.clip),
        "class_names": np.array(distilled.manifest.class_names),
    }
    if (stored := distilled.compensators) is not None:
        arrays["compensators"] = stored.codes.flatten(0, 1).numpy()
        if stored.scale is not None:
            arrays["scale"] = stored.scale.flatten(0, 1).numpy()
    if distilled.soft_labels is not None:
        arrays["soft_labels"] = distilled.soft_labels.numpy()
    np.savez(folder / NPZ_FILE, **arrays)  # type: ignore[arg-type]  # its stub takes the names for its own
    notes = [", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())]
    return [*notes, "views are formed as docs/own-images.md says; `import` does not read this layout"]


def write_parquet(distilled: DistilledSet, folder: Path) -> list[str]:
    """Write a parquet file of views as PNG: image {bytes, path}, label, and soft_label, logits float32 [classes], where
    the set has them. Its schema holds the features that Hugging Face `datasets` looks for, class names among them."""
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(distilled.manifest.class_names), "_type": "ClassLabel"},
    }
    image_type = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    fields = [pa.field("image", image_type), pa.field("label", pa.int64())]
    if distilled.soft_labels is not None:
        features["soft_label"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
        fields.append(pa.field("soft_label", pa.list_(pa.float32())))
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    with pq.ParquetWriter(folder / "train-00000-of-00001.parquet", schema, compression="zstd") as writer:
        for rows in _class_order(distilled).split(BLOCK):
            files = [{"bytes": file, "path": None} for file in _pictures(distilled, rows)]
            labels = distilled.labels[distilled.view_table()[rows, 0]].tolist()
            columns = [pa.array(files, image_type), pa.array(labels, pa.int64())]
            if distilled.soft_labels is not None:
                columns.append(pa.array(distilled.soft_labels[rows].float().tolist(), pa.list_(pa.float32())))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    return [_exactness(distilled)]


def write_webdataset(distilled: DistilledSet, folder: Path) -> list[str]:
    """Write tar files of samples, as the `webdataset` library reads them: <key>.png, <key>.cls (the label as text) and,
    where the set has soft labels, <key>.logits.npy (float16 [classes]); classes.txt has the names in label order.

    Views stand in an order drawn at random, since such readers shuffle little. Equal sets give equal bytes.
    """
    generator = build_generator(0, "webdataset")
    order = torch.randperm(distilled.view_count, generator=generator)
    for number, shard in enumerate(order.split(SHARD_VIEWS)):
        with tarfile.open(folder / f"train-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, rows in enumerate(shard.split(BLOCK)):
                for within, (row, picture) in enumerate(zip(rows.tolist(), _pictures(distilled, rows), strict=True)):
                    key = f"{number * SHARD_VIEWS + place * BLOCK + within:08d}"
                    label = int(distilled.labels[distilled.view_table()[row, 0]])
                    members = {"png": picture, "cls": str(label).encode()}
                    if distilled.soft_labels is not None:
                        array = io.BytesIO()
                        np.save(array, distilled.soft_labels[row].numpy())
                        members["logits.npy"] = array.getvalue()
                    for ending, content in members.items():
                        member = tarfile.TarInfo(f"{key}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    names = [" ".join(name.split()) for name in distilled.manifest.class_names]  # one a line
    (folder / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return [_exactness(distilled)]


def _pictures(distilled: DistilledSet, rows: Tensor) -> list[bytes]:
    """The views of `rows` as PNG files, rounded to 8 bits."""
    return [encode_picture(to_8_bits(view), "png") for view in distilled.form_views(rows)]


def write_ddranking(distilled: DistilledSet, folder: Path) -> list[str]:
    """Write what DD-Ranking's `compute_metrics` takes: `image_tensor`, `soft_labels` and `hard_labels`; `image_path`.

    images.pt float32 [views, 3, height, width], normalised by the constants of its own test images where these are
    known; labels.pt float32 logits [views, classes], since its losses apply softmax to them; hard_labels.pt int64
    [views]. images/ holds the views in 8 bits, unnormalised, as its ImageFolder labels them: a folder per class, whose
    names sort in label order; it reads no soft labels beside a folder. Views stand class by class, equally many each,
    because its soft-label evaluator counts labels off by `ipc`. That number is the views per class, so its random rival
    gets as many images: more than INFER's budget pays for. Read in its repository's source; not run. It cannot express
    compensators (views are written out), labels for augmented views, or a second label.
    """
    manifest, order = distilled.manifest, _class_order(distilled)
    labels = distilled.labels[distilled.view_table()[order, 0]]
    counts = labels.bincount(minlength=len(manifest.class_names))
    if counts.min() != counts.max():
        raise StillroomError(
            f"--to ddranking: classes have {counts.min()} to {counts.max()} views, but need equally many"
        )
    constants, known = manifest.normalization, _evaluators_dataset(manifest)
    mean, std = DDRANKING_CONSTANTS[known] if known is not None else (constants.mean, constants.std)
    views = torch.stack([view for _, view in _each_view(distilled, order)])
    for number, (view, label) in enumerate(zip(views, labels.tolist(), strict=True)):
        path = folder / "images" / f"{label:05d}" / f"{number:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_picture(to_8_bits(view), "png"))
    views = (views - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.save(views, folder / "images.pt")
    torch.save(labels, folder / "hard_labels.pt")
    whose = f"which its evaluator has for {known}"
    if known is None:
        whose = (
            f"the set's own: what the evaluator has for {manifest.dataset.name!r} is not known here, so compare, and "
            "normalise anew where it differs, or every accuracy will be wrong"
        )
    notes = [
        f"give the evaluator ipc={int(counts[0])}, the views per class",
        f"images.pt is normalised by {mean}, {std}, {whose}",
    ]
    if distilled.soft_labels is not None:
        torch.save(distilled.soft_labels[order].float(), folder / "labels.pt")
        notes.append("labels.pt are logits, for soft_label_mode 'S'")
    if known == "tiny-imagenet":
        notes.append("its classes are sorted WordNet ids: check that this set's are, or every accuracy will be wrong")
    return notes


WRITERS: dict[str, Callable[[DistilledSet, Path], list[str]]] = {
    "infer": write_infer,
    "folder": write_folder,
    "npz": write_npz,
    "compact": write_compact,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
    "ddranking": write_ddranking,
}


def _evaluators_dataset(manifest: Manifest) -> str | None:
    """Return the key of DDRANKING_CONSTANTS that stands for the set's real data, None where none is known to.

    Of as many classes, and with the dataset's name, or its original folder's, where the source's name begins (that of a
    folder or file, or the last part of a Hub id); or else with the same class names and size.
    """
    name = _letters(manifest.dataset.name.rpartition("/")[2])
    for known in DDRANKING_CONSTANTS:
        facts = FACTS[known]
        side = (facts.image_size, facts.image_size)
        is_named = name.startswith((_letters(known), _letters(facts.folder or known)))
        is_like = manifest.image_size == side and set(manifest.class_names) == set(facts.class_names or ())
        if len(manifest.class_names) == facts.classes and (is_named or is_like):
            return known
    return None


def _letters(name: str) -> str:
    """Letters and digits alone, without case."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _each_view(distilled: DistilledSet, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each row of `rows` with its view, float32 [3, height, width] in pixel units."""
    for part in rows.split(BLOCK):
        yield from zip(part.tolist(), distilled.form_views(part), strict=True)


def _class_order(distilled: DistilledSet) -> Tensor:
    """The rows of the view table class by class, int64 [views]."""
    return distilled.labels[distilled.view_table()[:, 0]].argsort(stable=True)


def _is_8_bit(distilled: DistilledSet) -> bool:
    plain = distilled.compensators is None and distilled.images.dtype == torch.uint8
    return plain or distilled.manifest.views.view_encoding == "jpeg75"


def _exactness(distilled: DistilledSet) -> str:
    return "views are exact" if _is_8_bit(distilled) else "views are cut to [0, 1] and rounded to 8 bits"


def _folder_names(class_names: tuple[str, ...]) -> list[str]:
    """Folder names that no file system misreads: the classes' words, or numbers for all where these are not enough."""
    plain = [re.sub(r"\W+", "_", unicodedata.normalize("NFC", name)).strip("_") for name in class_names]
    bad = any(not name or len(name) > LONGEST_NAME or RESERVED.fullmatch(name) for name in plain)
    if bad or len({name.casefold() for name in plain}) < len(plain):
        return [f"new{label:03d}" for label in range(len(plain))]
    return plain
