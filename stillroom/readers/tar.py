"""Where the files of a tar file lie, by one pass over its headers: nothing is extracted and no name is used as a path.

Of the format, what writers write today is understood: POSIX's extended headers and GNU's long names and sizes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stillroom.errors import StillroomError
from stillroom.readers.listing import quoted
from stillroom.readers.stored import Span

BLOCK = 512  # bytes: a header is one block, and contents fill whole ones
LARGEST_RECORD = 2**20  # bytes, of what says more about a member than its header holds: names, times
COMPRESSED_BEGIN = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")

# Kinds of members, as their headers have them
PLAIN_FILES = (b"0", b"\0", b"7")
FOLDER = b"5"
WITHOUT_CONTENTS = (b"1", b"2", b"3", b"4", FOLDER, b"6")  # hard links, links, devices, folders, pipes
LONG_NAME = b"L"  # GNU's
POSIX_RECORDS = (b"x", b"X")
ABOUT_OTHERS = (*POSIX_RECORDS, LONG_NAME, b"g", b"K")  # and POSIX's records about all members, GNU's long links


@dataclass(frozen=True)
class Member:
    """A file within a tar file: `size` bytes from byte `start`."""

    name: str
    start: int
    size: int


def read_members(file: BinaryIO, path: Path) -> Iterator[Member]:
    """The plain files of the tar file `path`, open as `file`, which may be read from between two of them.

    Folders are passed over. Raises StillroomError, which names `path`, where it is compressed, damaged, cut off (also
    between two members: it must end with an empty block, and with nothing after it) or, at the end, where it has links,
    devices or files with holes.
    """
    length, position = file.seek(0, os.SEEK_END), 0
    if hasattr(os, "posix_fadvise"):  # or else the system reads ahead, and most of the contents with it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    about: dict[str, str] = {}
    refused: list[str] = []
    while (header := _read(file, position, BLOCK)) != bytes(BLOCK):
        kind, name, size = _parse_header(header, position, path)
        name, start = about.get("path", name), position + BLOCK
        size = 0 if kind in WITHOUT_CONTENTS else int(about.get("size", size))
        if size > length - start:
            raise _damaged(path, f"it ends within {name!r}, of {size:,} bytes")
        position = start + -(-size // BLOCK) * BLOCK
        if kind in ABOUT_OTHERS:
            if size > LARGEST_RECORD:
                raise _damaged(path, f"it has {size:,} bytes of names and times at byte {start}")
            about |= _parse_records(kind, _read(file, start, size), path)
            continue
        if kind in PLAIN_FILES and not any(key.startswith("GNU.sparse") for key in about):
            yield Member(name, start, size)
        elif kind != FOLDER:
            refused.append(name)
        about = {}
    while rest := file.read(2**20):
        if rest.strip(b"\0"):
            raise _damaged(path, "it goes on after its end, as when files are joined by cat, which tar does not read")
    if refused:
        raise StillroomError(
            f"{path} has links, devices or files with holes among its members ({len(refused)}: {quoted(refused)}). "
            "They are never followed; write it again with plain files."
        )


def member_name(path: Path, start: int) -> str:
    """What an error message calls the file that starts at byte `start`: names are read again, not kept by the million.

    Of a name that does not fit the header it is the part that does.
    """
    try:
        header = Span(path, start - BLOCK, BLOCK).read()
        return f"{path}: {_parse_header(header, start - BLOCK, path)[1]!r}"
    except (OSError, ValueError):
        return f"{path}: the file at byte {start}"


def compressed(path: Path) -> StillroomError:
    """The error for a tar file within which nothing can be found without reading all before it."""
    return StillroomError(
        f"{path} is compressed as a whole, so that no image can be read without all before it; decompress it to a .tar "
        "(gunzip, unzstd, ...): images are compressed by themselves."
    )


def _damaged(path: Path, what: str) -> StillroomError:
    return StillroomError(f"{path} is no whole tar file: {what}. Fetch or write it again.")


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _parse_header(header: bytes, position: int, path: Path) -> tuple[bytes, str, int]:
    """-> kind, name and size of a member. (Python's own `tarfile` reads thirteen fields, and takes twice as long.)"""
    if position == 0 and header.startswith(COMPRESSED_BEGIN):
        raise compressed(path)
    if len(header) < BLOCK:
        raise _damaged(path, f"it ends at byte {position + len(header)} without the empty blocks of an end")
    # The sum of all bytes, those of the field that holds it counted as spaces
    if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _damaged(path, f"byte {position} begins no member")
    kind, size = header[156:157], _number(header[124:136])
    if size is None:
        raise _damaged(path, f"the member at byte {position} has no size")
    name, prefix = (header[field].partition(b"\0")[0] for field in (slice(0, 100), slice(345, 500)))
    if prefix and header[257:263] == b"ustar\0":  # GNU's headers have other things there
        name = prefix + b"/" + name
    if name.endswith(b"/") and kind == b"\0":
        kind = FOLDER
    return kind, _text(name), size


def _number(field: bytes) -> int | None:
    """A number as octal digits or, above these, as bytes behind one of 128; None for anything else."""
    if field[0] == 128:
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _parse_records(kind: bytes, content: bytes, path: Path) -> dict[str, str]:
    """What a member before another says of it: `path` and `size` are of use here."""
    if kind == LONG_NAME:
        return {"path": _text(content.partition(b"\0")[0])}
    if kind not in POSIX_RECORDS:
        return {}
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        match = re.match(rb"([0-9]{1,7}) ([^=]+)=", content)  # "26 mtime=1700000000.123456\n", 26 bytes in all
        length = int(match[1]) if match else 0
        if match is None or length <= match.end() or content[length - 1 : length] != b"\n":
            raise _damaged(path, f"an extended header has the record {content[:40]!r}")
        key, value = match[2], content[match.end() : length - 1]
        if key == b"size" and not re.fullmatch(rb"[0-9]{1,18}", value):
            raise _damaged(path, f"an extended header has the size {value[:40]!r}")
        records[_text(key)] = _text(value)
        content = content[length:]
    return records
