"""The folder of a distilled set: images as a parquet file, and files of which one whole version is always there.

A save writes the data under names that hold their hash, then replaces the manifest, then deletes what only the old
manifest named. So whoever reads, and whenever a save is interrupted, finds the old version or the new.

Images are held as pixels where these are few, and else as the files that they are stored in, which are decoded a batch
at a time: so a set takes little more memory than its folder.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from stillroom.compute import map_in_threads
from stillroom.errors import StillroomError
from stillroom.files import Pieces, remove_if_there, sha256_file, write_atomic
from stillroom.manifest import CARD_ROLES, MANIFEST_NAME, FileFacts, ImageEncoding, Manifest, encode_manifest
from stillroom.readers import read_column

ROWS_AT_ONCE = 1000  # of a parquet row group: arrow's binary columns end at 2 GiB
OWN_DATA_FILE = re.compile(r"(images|compensators|labels)-[0-9a-f]{12}\.(parquet|safetensors)")
OWN_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8}\.tmp|[0-9a-f]{12}\.staged)")
HELD_BYTES = 2**30  # of pixels that are held decoded: all of Tiny-ImageNet's 50 images per class, not ImageNet's 10
BLOCK_BYTES = 2**26  # of pixels that are looked at at a time where a set is gone through
# A file of images may hold one of them again and again, or zeros, in few bytes: what may be read of it is bounded by
# its size. Encoded images can hardly be compressed, so that 16 times is far above any honest set's.
LEAST_HELD, HELD_OF_SIZE = 2**27, 16
ROW_BYTES = 64  # that Python takes for a row, whatever is in it

END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA  # of a JPEG file's markers
METADATA_MARKERS = {*range(0xE1, 0xF0), 0xFE} - {0xEE}  # application data and comments; JFIF's and Adobe's are read
NEXT_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)  # after data, in which stuffed 0xff and restarts lie


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Images that stay as they are stored, and are decoded where they are asked for; too many for a tensor of them.

    It stands where a tensor uint8 [n, 3, height, width] would, and is read like one: an index (a number, a slice,
    int64 or bool) gives a tensor on `device`. `read`: positions int64 [b], on the CPU -> uint8 [b, 3, height, width].
    """

    shape: torch.Size
    read: Callable[[Tensor], Tensor]
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a constant

    dtype = torch.uint8

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        rows = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index]
        images = self.read(rows.reshape(-1)).to(self.device, non_blocking=True)
        return images.view(*rows.shape, *self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes that the pixels would take."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of a pixel's value."""
        return 1

    def to(self, device: torch.device | str) -> StoredImages:
        """The same images, which come on `device`; nothing moves now."""
        return replace(self, device=torch.device(device))

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the pixels, as of the tensor that would hold them."""
        digest = hashlib.sha256()
        for block in blocks_of(self):
            digest.update(block.numpy().data)
        return digest.hexdigest()


def hold_images(shape: Sequence[int], read: Callable[[Tensor], Tensor]) -> Tensor | StoredImages:
    """Images of `shape` [n, 3, height, width] that `read` decodes, see StoredImages: decoded now where they are few."""
    stored = StoredImages(torch.Size(shape), read)
    return _decoded(stored, torch.uint8) if can_hold(stored.nbytes) else stored


def can_hold(size: int) -> bool:
    """Whether pixels of `size` bytes are few enough to be held decoded."""
    return size <= HELD_BYTES


def blocks_of(images: Tensor | StoredImages) -> Iterator[Tensor]:
    """All `images`, a block after the other, uint8 or float16 [b, 3, height, width] on the CPU."""
    step = max(1, BLOCK_BYTES // images.shape[1:].numel())
    for start in range(0, len(images), step):
        yield images[start : start + step].cpu()


def _decoded(stored: StoredImages, dtype: torch.dtype) -> Tensor:
    images, filled = torch.empty(stored.shape, dtype=dtype), 0
    for block in blocks_of(stored):
        images[filled : filled + len(block)] = block
        filled += len(block)
    return images


def write_version(folder: Path, manifest: Manifest, contents: Mapping[str, bytes | Pieces]) -> None:
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


def check_part(folder: Path, role: str, facts: FileFacts) -> Path:
    """Where one file of the set lies. Raises StillroomError that names it where it is missing, linked or changed."""
    names = [facts.name, _staged_name(facts)] if role in CARD_ROLES else [facts.name]
    problems = []
    for path in (folder / name for name in names):
        if path.is_symlink():  # it could change, or lead out of the folder, behind the manifest's back
            problems.append(f"{path} is a symbolic link, not a file of this set: put a copy in its place.")
        elif not path.is_file():
            problems.append(f"{path} is missing, but the manifest names it: restore it or save the set again.")
        elif path.stat().st_size != facts.bytes:
            size = path.stat().st_size
            problems.append(
                f"{path} has {size:,} bytes, but the manifest says {facts.bytes:,}: restore it or save again."
            )
        elif sha256_file(path) == facts.sha256:
            return path
        else:
            problems.append(f"{path} was changed after it was written: restore it or save the set again.")
    hint = " If you edited the card, load the set with ignore_card=True." if role == "card" else ""
    raise StillroomError(problems[0] + hint)


@dataclass(frozen=True, eq=False)
class ImageFile:
    """The bytes of a parquet file of encoded images, one of `files` each, with label and slot (int64 [n]).

    Made as they are gone through. Its schema carries the features that Hugging Face `datasets` looks for, so that class
    names show there; float16 images, which are no pictures, are plain bytes there.
    """

    files: Sequence[bytes]
    labels: Tensor
    slots: Tensor
    class_names: Sequence[str]
    encoding: ImageEncoding

    def __iter__(self) -> Iterator[bytes]:
        plain = {"bytes": {"dtype": "binary", "_type": "Value"}, "path": {"dtype": "string", "_type": "Value"}}
        features = {
            "image": plain if self.encoding == "float16" else {"_type": "Image"},
            "label": {"names": list(self.class_names), "_type": "ClassLabel"},
            "slot": {"dtype": "int64", "_type": "Value"},
        }
        image_type = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
        schema = pa.schema(
            [pa.field("image", image_type), pa.field("label", pa.int64()), pa.field("slot", pa.int64())],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
        sink = _Sink()
        with pq.ParquetWriter(pa.PythonFile(sink, mode="w"), schema, compression="zstd") as writer:
            for first in range(0, len(self.files), ROWS_AT_ONCE):
                chunk = slice(first, first + ROWS_AT_ONCE)
                encoded = [{"bytes": file, "path": None} for file in self.files[chunk]]
                columns = [
                    pa.array(encoded, image_type),
                    pa.array(self.labels[chunk].tolist(), pa.int64()),
                    pa.array(self.slots[chunk].tolist(), pa.int64()),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                yield from sink.take()
        yield from sink.take()


class _Sink(io.RawIOBase):
    """A file that hands out what was written to it since it was last asked."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self.pieces.append(bytes(piece))
        return len(self.pieces[-1])

    def take(self) -> list[bytes]:
        taken, self.pieces = self.pieces, []
        return taken


def decode_images(
    path: Path, facts: FileFacts, size: tuple[int, ...], encoding: ImageEncoding
) -> tuple[Tensor | StoredImages, Tensor, Tensor, tuple[bytes, ...]]:
    """Images, labels and slots of an ImageFile at `path`, of `size` (height, width), and the encoded images themselves.

    No more memory is taken than three times what a file of that size may honestly hold. Raises ValueError, or whatever
    the parsers raise, for a file that is not as `facts` say, or holds more.
    """
    height, width = size
    most = LEAST_HELD + HELD_OF_SIZE * facts.bytes
    labels: list[int] = []
    slots: list[int] = []
    files: list[bytes] = []
    with path.open("rb") as opened, pq.ParquetFile(opened) as file:
        rows, value = file.metadata.num_rows, 2 if encoding == "float16" else 1
        if rows != facts.entries or facts.raw_bytes != rows * 3 * height * width * value:  # before memory is taken
            raise ValueError(
                f"{rows} images of {height} x {width} pixels, not {facts.entries} in {facts.raw_bytes} bytes"
            )
        left = most - ROW_BYTES * rows

        def read(group: int, name: str) -> list[Any]:
            nonlocal left
            try:
                column = read_column(file, group, name, path, max(0, left))
            except StillroomError as error:
                raise ValueError(
                    f"{path.name} has {facts.bytes:,} bytes, but stands for more than {most:,}, which no set that was "
                    "honestly saved does"
                ) from error
            left -= column.nbytes
            return (pc.struct_field(column, "bytes") if name == "image" else column).to_pylist()

        for group in range(file.num_row_groups):
            labels += read(group, "label")
            slots += read(group, "slot")
            files += read(group, "image")
    images = decode_files(files, encoding, size)
    if isinstance(images, StoredImages):  # nothing is decoded yet, but what the headers say can be held against it
        for content in files:
            _open_picture(content, encoding, (width, height)).close()
    return images, torch.tensor(labels, dtype=torch.int64), torch.tensor(slots, dtype=torch.int64), tuple(files)


def decode_files(files: Sequence[bytes], encoding: ImageEncoding, size: tuple[int, ...]) -> Tensor | StoredImages:
    """The images of `files`, all of `size` (height, width); float16 ones, which no file makes smaller, as a tensor."""
    shape = torch.Size([len(files), 3, *size])
    read = functools.partial(_decode_rows, files, encoding, (size[1], size[0]))
    return _decoded(StoredImages(shape, read), torch.float16) if encoding == "float16" else hold_images(shape, read)


def _decode_rows(files: Sequence[bytes], encoding: ImageEncoding, size: tuple[int, int], rows: Tensor) -> Tensor:
    def decode(row: int) -> Tensor:
        try:
            return decode_picture(files[row], encoding, size)
        except Exception as error:  # Pillow's plugins raise nearly anything
            raise StillroomError(f"image {row} of the set is damaged ({error}): save the set again.") from error

    return torch.stack(map_in_threads(decode, rows.tolist()))


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


def keep_original(image: Tensor, original: bytes | None) -> bytes | None:
    """Return the JPEG file `original` without its metadata where it decodes to `image` (uint8 [3, height, width]), else
    None: for other formats, gray or turned pictures, and images that were cut or resized."""
    if original is None or not original.startswith(b"\xff\xd8"):
        return None
    try:
        bare = strip_metadata(original)
        pixels = decode_picture(bare, "jpeg95", (image.shape[2], image.shape[1]))
    except Exception:  # Pillow's plugins raise nearly anything; what it reads otherwise is encoded anew
        return None
    return bare if torch.equal(pixels, image) else None


def strip_metadata(content: bytes) -> bytes:
    """Return a JPEG file's bytes without those that do not decide its pixels: EXIF (places, cameras, orientation), XMP,
    colour profiles, comments, and whatever follows its end (ITU-T T.81, B.1).

    Raises ValueError, or IndexError, for content that is no whole JPEG.
    """
    parts, at = [content[:2]], 2
    while True:
        while content[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if content[at] != 0xFF:
            raise ValueError("there is no marker where a segment should begin")
        marker = content[at + 1]
        if marker == END_OF_IMAGE:
            return b"".join([*parts, content[at : at + 2]])
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == START_OF_SCAN:  # entropy-coded data follow
            found = NEXT_MARKER.search(content, end)
            if found is None:
                raise ValueError("there is no end")
            end = found.start()
        if marker not in METADATA_MARKERS:
            parts.append(content[at:end])
        at = end


def decode_picture(content: bytes, encoding: ImageEncoding, size: tuple[int, int]) -> Tensor:
    """uint8 or float16 [3, height, width] of an image file of `size` (width, height).

    Raises ValueError where it is another.
    """
    if encoding == "float16":
        return torch.from_numpy(np.frombuffer(content, "<f2").astype(np.float16).reshape(3, size[1], size[0]))
    with _open_picture(content, encoding, size) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _open_picture(content: bytes, encoding: ImageEncoding, size: tuple[int, int]) -> Image.Image:
    picture = Image.open(io.BytesIO(content), formats=["PNG" if encoding == "png" else "JPEG"])
    if picture.size != size or picture.mode != "RGB":
        raise ValueError(f"an image is {picture.mode} of (width, height) {picture.size}")
    return picture


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
