"""The folder of a distilled set: images as a parquet file, and files of which one whole version is always there.

A save writes the data under names that hold their hash, then replaces the manifest, then deletes what only the old
manifest named. So whoever reads, and whenever a save is interrupted, finds the old version or the new.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from stillroom.errors import StillroomError
from stillroom.files import read_bytes, remove_if_there, sha256_bytes, write_atomic
from stillroom.manifest import CARD_ROLES, MANIFEST_NAME, FileFacts, ImageEncoding, Manifest, encode_manifest

ROWS_AT_ONCE = 1000  # of a parquet row group: arrow's binary columns end at 2 GiB
OWN_DATA_FILE = re.compile(r"(images|compensators|labels)-[0-9a-f]{12}\.(parquet|safetensors)")
OWN_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8}\.tmp|[0-9a-f]{12}\.staged)")


def write_version(folder: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Make `folder` hold the version that `manifest`, with `contents` by role for its `files`, describes.

    Raises StillroomError where the folder holds other things or cannot be written; the version before is whole then.
    """
    _refuse_foreign_folder(folder)
    for role, facts in manifest.files.items():
        # The card cannot carry its hash in its name; a copy that does bridges the moment when manifest and card differ.
        name = _staged_name(facts) if role in CARD_ROLES else facts.name
        write_atomic(folder / name, contents[role])
    write_atomic(folder / MANIFEST_NAME, encode_manifest(manifest))
    for role in CARD_ROLES:
        write_atomic(folder / manifest.files[role].name, contents[role])
    current = {facts.name for facts in manifest.files.values()}
    for entry in folder.iterdir():
        if entry.name not in current and _is_own(entry.name):
            remove_if_there(entry)


def read_part(folder: Path, role: str, facts: FileFacts) -> bytes:
    """The bytes of one file of the set. Raises StillroomError that names it where it is missing, linked or changed."""
    names = [facts.name, _staged_name(facts)] if role in CARD_ROLES else [facts.name]
    problems = []
    for path in (folder / name for name in names):
        if path.is_symlink():  # it could change, or lead out of the folder, behind the manifest's back
            problems.append(f"{path} is a symbolic link, not a file of this set: put a copy in its place.")
        elif not path.is_file():
            problems.append(f"{path} is missing, but the manifest names it: restore it or save the set again.")
        elif path.stat().st_size != facts.bytes:  # looked at before reading, which may not fit in memory
            size = path.stat().st_size
            problems.append(
                f"{path} has {size:,} bytes, but the manifest says {facts.bytes:,}: restore it or save again."
            )
        else:
            content = read_bytes(path)
            if sha256_bytes(content) == facts.sha256:
                return content
            problems.append(f"{path} was changed after it was written: restore it or save the set again.")
    hint = " If you edited the card, load the set with ignore_card=True." if role == "card" else ""
    raise StillroomError(problems[0] + hint)


def encode_images(
    files: Sequence[bytes], labels: Tensor, slots: Tensor, class_names: Sequence[str], encoding: ImageEncoding
) -> bytes:
    """A parquet file of encoded images, one of `files` each, with label and slot (int64 [n]).

    Its schema carries the features that Hugging Face `datasets` looks for, so that class names show there; float16
    images, which are no pictures, are plain bytes there.
    """
    plain = {"bytes": {"dtype": "binary", "_type": "Value"}, "path": {"dtype": "string", "_type": "Value"}}
    features = {
        "image": plain if encoding == "float16" else {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
        "slot": {"dtype": "int64", "_type": "Value"},
    }
    image_type = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    schema = pa.schema(
        [pa.field("image", image_type), pa.field("label", pa.int64()), pa.field("slot", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for first in range(0, len(files), ROWS_AT_ONCE):
            chunk = slice(first, first + ROWS_AT_ONCE)
            encoded = [{"bytes": file, "path": None} for file in files[chunk]]
            columns = [
                pa.array(encoded, image_type),
                pa.array(labels[chunk].tolist(), pa.int64()),
                pa.array(slots[chunk].tolist(), pa.int64()),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    return bytes(sink.getvalue())


def decode_images(
    content: bytes, facts: FileFacts, size: tuple[int, ...], encoding: ImageEncoding
) -> tuple[Tensor, Tensor, Tensor, tuple[bytes, ...]]:
    """Images, labels and slots of encode_images, at `size` (height, width), and the encoded images themselves.

    Raises ValueError, or whatever the parsers raise, for a file that is not as `facts` say.
    """
    height, width = size
    file = pq.ParquetFile(pa.BufferReader(content))
    rows = file.metadata.num_rows
    dtype = torch.float16 if encoding == "float16" else torch.uint8
    if rows != facts.entries or facts.raw_bytes != rows * 3 * height * width * dtype.itemsize:  # before memory is taken
        raise ValueError(f"{rows} images of {height} x {width} pixels, not {facts.entries} in {facts.raw_bytes} bytes")
    images = torch.empty(rows, 3, height, width, dtype=dtype)
    labels: list[int] = []
    slots: list[int] = []
    files: list[bytes] = []
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=["image", "label", "slot"]):
        labels += batch.column("label").to_pylist()
        slots += batch.column("slot").to_pylist()
        for image in batch.column("image").field("bytes").to_pylist():
            images[len(files)] = decode_picture(image, encoding, (width, height))
            files.append(image)
    return images, torch.tensor(labels, dtype=torch.int64), torch.tensor(slots, dtype=torch.int64), tuple(files)


def encode_picture(image: Tensor, encoding: ImageEncoding) -> bytes:
    """One image file of an image [3, height, width]: uint8, or for float16 itself, whose bytes are little-endian."""
    if encoding == "float16":
        return image.contiguous().numpy().astype("<f2").tobytes()
    buffer = io.BytesIO()
    picture = Image.fromarray(to_pixels(image))
    if encoding == "png":
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=int(encoding.removeprefix("jpeg")), subsampling=0, optimize=True)
    return buffer.getvalue()


def decode_picture(content: bytes, encoding: ImageEncoding, size: tuple[int, int]) -> Tensor:
    """uint8 or float16 [3, height, width] of an image file of `size` (width, height).

    Raises ValueError where it is another.
    """
    if encoding == "float16":
        return torch.from_numpy(np.frombuffer(content, "<f2").astype(np.float16).reshape(3, size[1], size[0]))
    with Image.open(io.BytesIO(content), formats=["PNG" if encoding == "png" else "JPEG"]) as picture:
        if picture.size != size or picture.mode != "RGB":
            raise ValueError(f"an image is {picture.mode} of (width, height) {picture.size}")
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _staged_name(facts: FileFacts) -> str:
    return f".{facts.name}.{facts.sha256[:12]}.staged"


def _refuse_foreign_folder(folder: Path) -> None:
    """Keep a save from replacing the README.md of a folder that is not a distilled set."""
    if not folder.is_dir() or (folder / MANIFEST_NAME).exists():
        return
    for entry in folder.iterdir():
        if not _is_own(entry.name):
            raise StillroomError(
                f"{folder} holds {entry.name!r} and no distilled set: choose an empty or a new folder to save to."
            )


def _is_own(name: str) -> bool:
    return OWN_DATA_FILE.fullmatch(name) is not None or OWN_TEMPORARY.fullmatch(name) is not None


def to_8_bits(pixels: Tensor) -> Tensor:
    """uint8 of float pixels, cut to [0, 1] and rounded."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_pixels(image: Tensor) -> np.ndarray[Any, Any]:
    """uint8 [height, width, 3], as PIL wants it, of a uint8 image [3, height, width]."""
    return image.permute(1, 2, 0).contiguous().numpy()
