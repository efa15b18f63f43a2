"""Images as they are stored -> square uint8 colour images, in memory or decoded batch by batch.

How pixels are read, for every source: EXIF orientation is applied; gray is repeated to three channels; transparency is
composited on white; 16-bit gray v becomes v * 255 / 65535, rounded; palette, CMYK and 16-bit colour are converted as
Pillow does; of an animation the first frame counts. Formats: PNG, JPEG, WebP, BMP, GIF, TIFF, PPM. An image above
Pillow's `MAX_IMAGE_PIXELS` is refused as a bad image, and so is one of floating-point pixels. Links are followed, to
regular files.
"""

from __future__ import annotations

import contextlib
import io
import json
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stillroom.compute import map_in_threads
from stillroom.errors import StillroomError
from stillroom.files import remembered, sha256_bytes
from stillroom.readers import ArrayImages, Span, Split, Stored

Resize = Literal["refuse", "squash", "crop"]
Triple = tuple[float, float, float]

BLOCK_BYTES = 2**26  # of pixels that are looked at at a time, where all are
READ_SCHEME = 1  # changes whenever the same files give other pixels, so that no look at them is remembered
HASHED_BYTES = 2**32  # of a split's pixels, above which files are told apart by names and sizes
DECODED_BYTES = 2**30  # of images that threads decode at a time, counted PIXEL_BYTES each
PIXEL_BYTES = 8  # of a decoded pixel and its colours
STRIP_PIXELS = 2**20  # whose colours are found at a time
SAMPLED = 96  # images whose headers tell of all others', before work begins
HEADERS_READ = 20_000  # of a lazy split, spread evenly, before work begins: seconds where files are near
# EPS is left out on purpose: Pillow hands it to an external program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class Images(Protocol):
    """The images of one split, wherever they are."""

    @property
    def labels(self) -> Tensor:
        """int64 [n], on the CPU."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Tensor:
        """`indices` int64 [b] on any device -> uint8 [b, 3, size, size] on the images' device."""

    def to(self, device: torch.device | str) -> Images:
        """The same images, whose batches come on `device`."""

    def originals(self, indices: Tensor) -> list[bytes | None]:
        """The files that the images at `indices` int64 [b] were decoded from; None where there is none, or no more."""


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """A whole split as one tensor: `images` uint8 [n, 3, size, size] on any device, `labels` int64 [n] on the CPU.

    `rows` int64 [n] are its positions in `stored`, where they were decoded from files; both None for arrays.
    """

    images: Tensor
    labels: Tensor
    stored: Stored | None = None
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> Tensor:
        """See `Images.batch`."""
        return self.images[indices.to(self.images.device, non_blocking=True)]

    def to(self, device: torch.device | str) -> MemoryImages:
        """See `Images.to`; every pixel moves now."""
        return replace(self, images=self.images.to(device))

    def originals(self, indices: Tensor) -> list[bytes | None]:
        """See `Images.originals`."""
        if self.stored is None or self.rows is None:
            return [None] * len(indices)
        return _fetch_files(self.stored, self.rows[indices.cpu().numpy()])


@dataclass(frozen=True, eq=False)
class LazyImages:
    """A split that is decoded batch by batch, by one thread per processor. `rows` int64 [n] are its positions in
    `stored`. Raises `StillroomError` from `batch` for a bad image or, under "refuse", one of another size."""

    stored: Stored
    rows: np.ndarray
    labels: Tensor
    size: int
    resize: Resize
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> Tensor:
        """See `Images.batch`."""
        pixels, bad = _decode(self.stored, self.rows[indices.cpu().numpy()], self.size, self.resize)
        if bad:  # whose sizes are in the fingerprint, as is which images were left out
            raise StillroomError(
                f"{_count_bad([reason for _, reason in bad])}. Restore them as they were and go on; or leave them out "
                "with --data.skip-bad-images and a new --out, where teachers begin anew."
            )
        return torch.from_numpy(pixels).to(self.device)

    def to(self, device: torch.device | str) -> LazyImages:
        """See `Images.to`; nothing moves until a batch is asked for."""
        return replace(self, device=device)

    def originals(self, indices: Tensor) -> list[bytes | None]:
        """See `Images.originals`."""
        return _fetch_files(self.stored, self.rows[indices.cpu().numpy()])


def load_images(
    split: Split,
    rows: np.ndarray,
    size: int,
    resize: Resize,
    skip_bad_images: bool,
    memory_limit_bytes: float,
    count_levels: bool,
) -> tuple[Images, np.ndarray, np.ndarray, list[str]]:
    """-> the images at `rows`, the rows that are left after skipping bad ones, how often each value 0 ... 255 occurs in
    each channel, int64 [3, 256] (zeros unless `count_levels`), and why each skipped one was.

    Lazy images are decoded here only where something needs all of them, counting or skipping bad ones, and what was
    found is remembered until their files change. Else headers
    of up to HEADERS_READ of them are read, where each has a file or a span of its own: most bad files, and images of
    another size, are found before any work is spent.
    """
    stored = split.images
    levels = np.zeros((3, 256), np.int64)
    if isinstance(stored, ArrayImages) and stored.pixels.shape[1:3] == (size, size):
        images = torch.from_numpy(stored.pixels[rows]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
        if count_levels:
            levels += _levels(images)
        return MemoryImages(images, _labels(split, rows)), rows, levels, []

    lazy = not isinstance(stored, ArrayImages) and len(rows) * 3 * size * size > memory_limit_bytes
    images = torch.empty((0 if lazy else len(rows), 3, size, size), dtype=torch.uint8)

    def look() -> dict[str, Any]:
        """Decode all; keep them, where they fit, in `images`, the good ones in front."""
        levels = np.zeros((3, 256), np.int64)
        found: list[tuple[int, str]] = []
        for start, pixels, bad in _decode_blocks(stored, rows, size, resize):
            good = torch.from_numpy(np.delete(pixels, [position for position, _ in bad], 0))
            if count_levels:
                levels += _levels(good)
            if not lazy:
                images[start - len(found) :][: len(good)] = good
            found += [(start + position, reason) for position, reason in bad]
        if found and not skip_bad_images:
            raise _bad_images([reason for _, reason in found])
        return {"levels": levels.tolist(), "bad": found}

    if not lazy:
        seen = look()
    elif count_levels or skip_bad_images:
        seen = remembered(_identify(stored, rows, size, resize, count_levels, skip_bad_images), look)
    else:
        seen = {"levels": [[0] * 256] * 3, "bad": []}
        if reasons := _check_headers(stored, rows[:: -(-len(rows) // HEADERS_READ)], size, resize):
            raise _bad_images(reasons)
    levels, reasons = np.array(seen["levels"], np.int64), [reason for _, reason in seen["bad"]]
    rows = np.delete(rows, [position for position, _ in seen["bad"]])
    labels = _labels(split, rows)
    if lazy:
        return LazyImages(stored, rows, labels, size, resize), rows, levels, reasons
    images = images[: len(rows)].clone() if reasons else images
    if isinstance(stored, ArrayImages):  # which nothing needs any more
        return MemoryImages(images, labels), rows, levels, reasons
    return MemoryImages(images, labels, stored, rows), rows, levels, reasons


def content_of(images: MemoryImages | LazyImages, size: int, resize: Resize) -> Iterator[bytes | memoryview]:
    """What stands for a split's images in a fingerprint, however they are held: their pixels; or, of files that are
    more than HASHED_BYTES as pixels, names and sizes."""
    if images.stored is not None and images.rows is not None and _is_told_by_names(images, size):
        yield json.dumps([size, resize]).encode()
        for text in images.stored.identity(images.rows):
            yield f"{text}\n".encode(errors="surrogateescape")  # file names need not be UTF-8
        return
    yield json.dumps([len(images), 3, size, size]).encode()
    for block in torch.arange(len(images)).split(max(1, BLOCK_BYTES // (3 * size * size))):
        yield images.batch(block).cpu().contiguous().numpy().data


def is_long_to_hash(images: MemoryImages | LazyImages, size: int) -> bool:
    """Whether `content_of` decodes all images."""
    return isinstance(images, LazyImages) and not _is_told_by_names(images, size)


def _is_told_by_names(images: MemoryImages | LazyImages, size: int) -> bool:
    return len(images) * 3 * size * size > HASHED_BYTES


def identify(images: MemoryImages | LazyImages, size: int, resize: Resize) -> Iterator[str]:
    """Text that changes wherever the images may: of those that are decoded batch by batch what is known of files."""
    if isinstance(images, LazyImages):
        yield from _identify(images.stored, images.rows, size, resize)
    else:
        yield sha256_bytes(content_of(images, size, resize))


def _identify(stored: Stored, rows: np.ndarray, size: int, resize: Resize, *settings: bool) -> Iterator[str]:
    first = [stored.name(int(row)) for row in rows[:1]]  # which says where they lie
    yield json.dumps([READ_SCHEME, PIL.__version__, size, resize, *settings, *first])
    yield from stored.identity(rows)
    yield from map(str, stored.times(rows))


def _fetch_files(stored: Stored, rows: np.ndarray) -> list[bytes | None]:
    def read(item: Path | Span | bytes | np.ndarray | None) -> bytes | None:
        if isinstance(item, bytes):
            return item
        try:
            return item.read_bytes() if isinstance(item, Path) else item.read() if isinstance(item, Span) else None
        except (OSError, ValueError):  # gone, or cut, since it was decoded
            return None

    return [read(item) for item in stored.fetch(rows)]


def _labels(split: Split, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(split.labels[rows].astype(np.int64))


def _levels(images: Tensor) -> np.ndarray:
    return np.stack([torch.bincount(images[:, c].flatten(), minlength=256).numpy() for c in range(3)])


def mean_and_std(levels: np.ndarray) -> tuple[Triple, Triple]:
    """Exact up to the last division, so that the order in which images were counted cannot matter."""
    values = np.arange(256) / 255
    weights = levels / levels.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(axis=1))
    std[std == 0] = 1.0
    (r, g, b), (r_std, g_std, b_std) = mean.tolist(), std.tolist()
    return (r, g, b), (r_std, g_std, b_std)


class _Quiet:
    """Silences warnings (Pillow's, on odd metadata) while any thread is within: they are the process's."""

    def __init__(self) -> None:
        self._lock, self._within = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._within += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._caught.__exit__(None, None, None)


class _Room:
    """Bytes that threads may take at a time: who wants more than is left waits; more than all goes alone."""

    def __init__(self, most: int) -> None:
        self._most, self._taken, self._changed = most, 0, threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self._most)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


_quiet, _room = _Quiet(), _Room(DECODED_BYTES)


def _open_image(item: Path | Span | bytes | np.ndarray | None) -> Image.Image:
    if item is None:
        raise ValueError("no bytes are stored")
    if isinstance(item, Span):
        item = item.read()
    if isinstance(item, np.ndarray):
        return Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item)
    if isinstance(item, Path) and not stat.S_ISREG(item.stat().st_mode):  # a pipe would be waited for
        raise ValueError("neither a file nor a link to one")
    image = Image.open(item if isinstance(item, Path) else io.BytesIO(item), formats=FORMATS)
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, above {Image.MAX_IMAGE_PIXELS:,}")
    return image


def _is_gray(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def first_size(stored: Stored, rows: np.ndarray) -> tuple[int, int, int]:
    """Height, width and native channels (1 or 3) of the first image whose header can be read."""
    failure = "there are none"
    with _quiet:
        for row in rows:
            try:
                with _open_image(stored.fetch(np.array([row]))[0]) as image:
                    return image.height, image.width, 1 if _is_gray(image) else 3
            except StillroomError:
                raise
            except Exception as error:  # see _decode
                failure = _reason(stored, row, error)
    raise StillroomError(f"None of the {len(rows)} training images can be read; the last failure: {failure}")


def sample_rows(count: int) -> np.ndarray:
    """A hundred or so of `count` positions, in eight blocks that are spread evenly: parquet reads a group for each."""
    starts = np.linspace(0, max(0, count - SAMPLED // 8), 8).astype(np.int64)
    return np.unique(np.minimum(starts[:, None] + np.arange(SAMPLED // 8), count - 1))


def read_sizes(stored: Stored, rows: np.ndarray) -> list[tuple[int, int]]:
    """Width and height of the images at `rows`, by their headers; without those that cannot be read."""
    sizes = []
    with _quiet:
        for item in stored.fetch(rows):
            with contextlib.suppress(Exception), _open_image(item) as image:  # see _decode, which counts and names them
                sizes.append(image.size)
    return sizes


def _check_headers(stored: Stored, rows: np.ndarray, size: int, resize: Resize) -> list[str]:
    """Why each of the images at `rows` cannot be read, by its header; nothing where many lie in one piece (parquet).

    Raises StillroomError, under "refuse", for one of another size.
    """
    if not isinstance(stored.fetch(rows[:1])[0], Path | Span):
        return []

    def look(row: int) -> str | None:
        try:
            with _open_image(stored.fetch(np.array([row]))[0]) as image:
                found = image.size
        except Exception as error:  # see _decode
            return _reason(stored, row, error)
        if resize == "refuse" and found != (size, size):
            raise _other_size(stored, row, found, size)
        return None

    with _quiet, ThreadPoolExecutor(16) as pool:  # most of the time goes by in waiting for files
        return [reason for reason in pool.map(look, rows) if reason is not None]


def _decode_blocks(
    stored: Stored, rows: np.ndarray, size: int, resize: Resize
) -> Iterator[tuple[int, np.ndarray, list[tuple[int, str]]]]:
    """-> where each block of `rows` begins, and what `_decode` gives for it."""
    block = max(1, BLOCK_BYTES // (3 * size * size))
    for start in range(0, len(rows), block):
        yield start, *_decode(stored, rows[start : start + block], size, resize)


def _decode(stored: Stored, rows: np.ndarray, size: int, resize: Resize) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """-> uint8 [len(rows), 3, size, size], and (position, reason) of each bad image, whose pixels are 0."""
    items = stored.fetch(rows)
    pixels = np.zeros((len(rows), 3, size, size), np.uint8)
    bad: list[tuple[int, str]] = []

    def work(position: int) -> None:
        # Damaged files make Pillow's plugins raise nearly anything: OSError, SyntaxError, struct.error, KeyError.
        with contextlib.ExitStack() as stack:
            try:
                image = stack.enter_context(_open_image(items[position]))
                stack.enter_context(_room.take(PIXEL_BYTES * image.width * image.height))
                ImageOps.exif_transpose(image, in_place=True)
                colour = _to_rgb(image)
            except Exception as error:
                bad.append((position, _reason(stored, rows[position], error)))
            else:
                square = _to_square(colour, size, resize, stored, rows[position])
                pixels[position] = np.asarray(square).transpose(2, 0, 1)

    with _quiet:
        map_in_threads(work, range(len(rows)))
    return pixels, sorted(bad)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Colours by the rules at the top of this module, a strip at a time: on their way some take many bytes a pixel."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    colour = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        colour.paste(_strip_to_rgb(strip), (0, top))
    return colour


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"gray values {values.min()} ... {values.max()} do not fit 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    return image.convert("RGB")


def _to_square(image: Image.Image, size: int, resize: Resize, stored: Stored, row: int) -> Image.Image:
    width, height = image.size
    if (width, height) == (size, size):
        return image
    if resize == "refuse":
        raise _other_size(stored, row, image.size, size)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if resize == "crop" else None
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _other_size(stored: Stored, row: int, found: tuple[int, int], size: int) -> StillroomError:
    return StillroomError(
        f"{stored.name(row)} is {found[0]}x{found[1]} pixels (width x height), not {size}x{size}. Pass --data.resize "
        "crop or --data.resize squash, or another --data.image-size."
    )


def _reason(stored: Stored, row: int, error: Exception) -> str:
    what = f"{error}" if type(error) in (ValueError, OSError) else f"{error!r}"
    if isinstance(error, UnidentifiedImageError):
        what = "not an image of a known format"
    return f"{stored.name(row)}: {what}"


def name_some(reasons: Sequence[str]) -> str:
    """Return the first few of `reasons`, and dots where there are more."""
    return "; ".join(reasons[:5]) + ("; ..." if len(reasons) > 5 else "")


def _count_bad(reasons: list[str]) -> str:
    return f"{len(reasons)} image{'s' if len(reasons) > 1 else ''} cannot be read: {name_some(reasons)}"


def _bad_images(reasons: list[str]) -> StillroomError:
    return StillroomError(
        f"{_count_bad(reasons)}. Replace or remove them, or leave them out with --data.skip-bad-images."
    )
