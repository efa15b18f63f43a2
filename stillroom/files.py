"""Files that are whole or absent: atomic writing, JSON and safetensors whose bytes depend on their content alone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from stillroom.errors import DamagedFileError, StillroomError

SEAL_KEY = "sha256"
LOOKS = "looks"  # folder of the cache: what `remembered` keeps
META_KEY = "meta"  # safetensors keeps no order among metadata keys, so one key holds everything as sorted JSON
MAPPED_FROM = 2**26  # bytes of a file of tensors that is read by memory map, not into memory

# safetensors' names of types, in the order in which it writes tensors: the widest first.
TENSOR_TYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

# The bytes of a file, piece by piece, as often as they are asked for: what is large is never put together in memory.
Pieces = Iterable[bytes | memoryview]


def write_atomic(path: Path | str, content: bytes | Pieces) -> None:
    """Replace the file `path` by `content`: readers, and a machine that loses power, see the old bytes or the new ones.

    Folders on the way are made. Raises StillroomError, with nothing left behind, on a full disk or where writing is
    not allowed.
    """
    path = Path(path)
    # A random name, because several processes may finish the same unit of work at once.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            for piece in _pieces(content):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        remove_if_there(temporary)
        raise StillroomError(f"cannot write {path}: {_reason(error, path, content)}") from error
    except BaseException:
        remove_if_there(temporary)
        raise
    sync_folder(path.parent)


def remove_if_there(path: Path) -> None:
    """Delete a file; one that is already gone, or cannot be deleted, is left at that."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def open_unlinked(path: Path | str, flags: int) -> int:
    """Open `path` itself, never what a link there leads to, and return its descriptor; an `opener` for `open`.

    What is locked, appended to or cut short in place is opened so: a folder that came from elsewhere may hold links to
    any file of the user's. Raises StillroomError for a link, where the system can tell.
    """
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)  # and closed in children, as Python has it
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) and Path(path).is_symlink():  # EMLINK: FreeBSD
            raise _is_link(path) from error
        raise


def refuse_links(folders: Iterable[Path]) -> None:
    """Raise StillroomError where one of `folders` is a link: it would lead what is written there to another place."""
    for folder in folders:
        if folder.is_symlink():
            raise _is_link(folder)


def _is_link(path: Path | str) -> StillroomError:
    return StillroomError(
        f"{path} is a symbolic link, through which files elsewhere would be written; put what it leads to in its "
        "place, or delete it"
    )


def require_free_folder(folder: Path, what: str) -> None:
    """Raise StillroomError, which begins with `what`, unless `folder` is empty or not there yet."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StillroomError(f"{what} {folder} holds something already; give a new or empty folder")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` outlast a power cut, where the file system is able to."""
    with contextlib.suppress(OSError):  # Windows and some network file systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path | str, obj: Any) -> None:
    """Write `obj` atomically as JSON with sorted keys. Raises StillroomError for NaN, infinities and foreign types."""
    write_atomic(path, json_bytes(obj, path))


def json_bytes(obj: Any, path: Path | str) -> bytes:
    """The bytes that write_json puts into `path`, which serves the error message only."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=2, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StillroomError(
            f"cannot write {path}: {error}. JSON holds text, finite numbers, true, false, null, lists and dictionaries."
        ) from error
    return (text + "\n").encode()


def read_json(path: Path | str) -> Any:
    """Read a JSON file. Raises StillroomError that names `path` where it is missing, unreadable or not strict JSON."""
    return parse_json(read_bytes(path), path)


def parse_json(content: bytes, path: Path | str) -> Any:
    """The object in `content`, the bytes of `path`. Raises StillroomError for anything but strict JSON in UTF-8."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(content.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{path} is not valid JSON ({error}). It was cut short or edited: restore it, or delete it and run again."
        ) from error


def read_bytes(path: Path | str) -> bytes:
    """The whole content of a file. Raises StillroomError that names `path` where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StillroomError(f"cannot read {path}: {reason}. Check the path and its permissions.") from error


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `tensors` (any device, shape and dtype) and `meta` (JSON) atomically as safetensors.

    Equal content gives equal bytes. Raises StillroomError where `meta` is not JSON or the file cannot be written.
    """
    write_atomic(path, tensor_pieces(tensors, meta, path))


def tensor_pieces(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: Path | str) -> list[bytes | memoryview]:
    """The bytes that save_tensors puts into `path`, which serves the error message only: tensors where they lie.

    What `safetensors.torch.save` writes, which holds it all twice and refuses tensors that share memory.
    """
    try:
        text = json.dumps(dict(meta), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StillroomError(f"cannot write {path}: its meta is not JSON: {error}.") from error
    header: dict[str, Any] = {"__metadata__": {META_KEY: text}}
    places, end = list(TENSOR_TYPES), 0
    ordered = sorted(tensors.items(), key=lambda item: (places.index(item[1].dtype), item[0]))
    for name, tensor in ordered:
        facts = {"dtype": TENSOR_TYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = facts | {"data_offsets": [end, end := end + tensor.nbytes]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return [len(encoded).to_bytes(8, "little"), encoded, *(_memory_of(tensor) for _, tensor in ordered)]


def load_torch(path: Path) -> Any:
    """Return what a file that torch saved holds: tensors and plain containers alone, on the CPU; nothing is run.

    Raises whatever torch's reader raises, and ValueError for an archive whose parts are compressed, which torch never
    writes: a few bytes could be any number there.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("its parts are compressed, which torch does not do")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and meta of a safetensors file; meta is empty where another program wrote the file.

    Those of a large file stay on disk until they are used. Raises StillroomError that names `path` where it is missing
    or damaged. Nothing is unpickled.
    """
    try:
        mapped = Path(path).stat().st_size >= MAPPED_FROM
    except (OSError, ValueError):  # which reading says better
        mapped = False
    if not mapped:
        return parse_tensors(read_bytes(path), path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get(META_KEY, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, _dictionary(meta)  # noqa: SIM118 - no mapping
    except Exception as error:  # see parse_tensors
        raise _not_whole(path, error) from error


def parse_tensors(content: bytes, path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """load_tensors for `content`, the bytes of `path`."""
    try:
        tensors = safetensors.torch.load(content)
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_size])
        return tensors, _dictionary(json.loads(header.get("__metadata__", {}).get(META_KEY, "{}")))
    except Exception as error:  # the parser raises its own class and several of Python's, all meaning the same
        raise _not_whole(path, error) from error


def _dictionary(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict):
        raise ValueError("its meta is not a dictionary")
    return meta


def _not_whole(path: Path | str, error: Exception) -> DamagedFileError:
    return DamagedFileError(
        f"{path} is not a whole safetensors file ({error}). It was cut short or edited: restore it, or delete it and "
        "run again."
    )


def cache_root(cache: str | None = None) -> Path:
    """Return the cache folder: `cache` where it is given, or the environment variable STILLROOM_CACHE, or the default.

    What is said for one command wins over what was set for all.
    """
    return Path(cache or os.environ.get("STILLROOM_CACHE") or "~/.cache/stillroom").expanduser()


def remembered(of: Iterable[str], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return `make()`, or what it once returned for the same `of`: small results of long looks at somebody's files.

    `make()` gives JSON, kept in the cache folder under the SHA-256 of `of`, which must hold all that decides it. A
    record that is damaged is made anew, and a cache that cannot be written keeps nothing.
    """
    key = sha256_bytes(f"{text}\n".encode(errors="surrogateescape") for text in of)  # names need not be UTF-8
    path = cache_root() / LOOKS / f"{key}.json"
    with contextlib.suppress(StillroomError):
        return read_sealed(path)
    made = make()
    with contextlib.suppress(StillroomError):
        write_json(path, seal(made, {}, path))
    return made


def read_sealed(path: Path | str, needed: Sequence[str] = ()) -> dict[str, Any]:
    """The dictionary in a JSON file that `seal` was given; see `break_seal`. Raises StillroomError without `needed`."""
    sealed = read_json(path)
    if not isinstance(sealed, dict) or (missing := [key for key in needed if key not in sealed]):
        lacks = f"lacks {', '.join(missing)}" if isinstance(sealed, dict) else "is no JSON object"
        raise DamagedFileError(f"{path} {lacks}. It was edited or damaged: restore it, or begin anew elsewhere.")
    return break_seal(sealed, {}, path)


def seal(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path | str) -> dict[str, Any]:
    """`meta` with the SHA-256 of itself and of `tensors`, for `break_seal` to check when both come back from `path`.

    Raises StillroomError where `meta` is not JSON.
    """
    plain: dict[str, Any] = json.loads(json_bytes(dict(meta), path))  # as it will be read back
    return plain | {SEAL_KEY: _seal_of(plain, tensors)}


def break_seal(sealed: dict[str, Any], tensors: Mapping[str, Tensor], path: Path | str) -> dict[str, Any]:
    """What `seal` was given. Raises StillroomError that names `path` where meta or tensors are not what they were.

    A file that is older than seals has none, and passes; but not one that lost all its meta, or its seal's name.
    """
    meta = {key: value for key, value in sealed.items() if key != SEAL_KEY}
    if SEAL_KEY in sealed:
        damaged = sealed[SEAL_KEY] != _seal_of(meta, tensors)
    else:
        damaged = not sealed or any(
            value == _seal_of({k: v for k, v in sealed.items() if k != key}, tensors) for key, value in sealed.items()
        )
    if damaged:
        raise DamagedFileError(
            f"{path} was damaged or edited after it was written: its SHA-256 does not fit. Delete it: the same command "
            "makes it again."
        )
    return meta


def _seal_of(meta: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return sha256_bytes(json.dumps(meta, sort_keys=True).encode() + hash_tensors(tensors).encode())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of the tensors, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(_memory_of(value))
    return digest.hexdigest()


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in the order of its elements, where they lie if they lie so."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _pieces(content: bytes | Pieces) -> Pieces:
    return [content] if isinstance(content, bytes) else content


def sha256_bytes(content: bytes | Pieces) -> str:
    """SHA-256 of `content`, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in _pieces(content):
        digest.update(piece)
    return digest.hexdigest()


def count_pieces(content: bytes | Pieces) -> int:
    """Bytes of `content`."""
    return sum(memoryview(piece).nbytes for piece in _pieces(content))


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file, 64 hexadecimal digits. Raises StillroomError that names `path` where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StillroomError(f"cannot read {path}: {error.strerror}. Check the path and its permissions.") from error


def _reason(error: OSError, path: Path, content: bytes | Pieces) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        size = count_pieces(content)
        return f"the disk is full or a quota is used up; free {size:,} bytes or choose another directory."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path.parent} is not writable; choose another directory or change its permissions."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"a file stands where {path.parent} should be a directory; choose another directory."
    return f"{error.strerror or error}; choose another directory."
