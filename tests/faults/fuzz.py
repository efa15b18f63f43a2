"""The fuzz campaign: everything that reads files from outside is given damaged and hostile ones.

    python tests/faults/fuzz.py --inputs 300 --out docs/results/fuzz.json

For each format small valid files are mutated (bytes flipped, cut, repeated, numbers made huge, parts of two spliced) or
replaced by noise, and files made to do harm come beside them: code in pickles and YAML, declared sizes without end,
decompression bombs, names and links that lead out of the folder. A reader may return, or raise StillroomError;
children have 1 GiB of memory more than they begin with, and 60 seconds. No code may run, no file may appear, and none
outside change.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others reserve more memory than a child may have
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import conftest
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from campaign import commit
from nursery import fork
from PIL import Image

from stillroom.data import DataConfig, load_real
from stillroom.distilled import load_distilled
from stillroom.errors import StillroomError
from stillroom.exchange import ImportConfig, import_set
from stillroom.files import load_tensors, save_tensors, seal, sha256_bytes
from stillroom.manifest import MANIFEST_NAME, SEAL_KEY, _seal, file_name
from stillroom.networks import NETWORKS
from stillroom.readers import read_cifar_pickles
from stillroom.recipes import RECIPES, Recipe
from stillroom.run import Run
from stillroom.settings import read_config
from stillroom.teachers import load_checkpoint

MEMORY = 2**30  # bytes that a child may take beyond what it begins with
AT_ONCE = 25  # inputs of a child
PLAN = {"seed_scheme": 1, "device": "cpu", "compile": "off", "processor": "", "torch_version": ""}
CANARY = "code-was-run"
ABSOLUTE = Path("/tmp/escaped")  # where names that lead out lead to, before their suffixes
ELSEWHERE = "elsewhere"  # a folder beside the sandbox, with a file; where links lead to


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {CANARY}",)


@dataclass(frozen=True)
class Format:
    """`write` makes a valid folder; the files that `pattern` finds there are damaged; `read` then reads the folder.

    hostile: contents made to do harm, or what does harm to the folder; either must be refused. By name.
    """

    write: Callable[[Path], object]
    pattern: str
    read: Callable[[Path], object]
    hostile: dict[str, bytes | Callable[[Path], object]]


def read_all(source: Path) -> None:
    """Read a dataset as a run does, every image."""
    real = load_real(DataConfig(str(source), image_size=8, resize="crop"))
    real.train.batch(torch.arange(len(real.train)))


def png(side: int = 8, seed: int = 0, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def png_of(width: int, height: int, zeros: int) -> bytes:
    """A PNG that declares a size, with so many compressed zeros."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(zeros), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def write_folder(folder: Path, kind: str = "PNG") -> None:
    for split in ("train", "test"):
        for label, name in enumerate(("a", "b")):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
                (folder / split / name / f"{number}.{suffix}").write_bytes(png(8, label + number, kind))


def write_parquet(folder: Path) -> None:
    for split in ("train", "test"):
        rows = [{"bytes": png(8, n), "path": None} for n in range(4)]
        pq.write_table(pa.table({"image": rows, "label": [0, 1, 0, 1]}), folder / f"{split}-0.parquet")


def parquet_of(value: bytes, rows: int, label: Any = 0, **settings: Any) -> bytes:
    """A parquet file in which one image, and one label, come so many times: a few bytes each, by its dictionaries."""
    codes = pa.array(np.zeros(rows, np.int32))
    image = pa.DictionaryArray.from_arrays(codes, pa.array([value], pa.binary()))
    labels = pa.DictionaryArray.from_arrays(codes, pa.array([label]))
    sink = io.BytesIO()
    table = pa.table({"image": image, "label": labels})
    pq.write_table(table, sink, store_schema=False, row_group_size=rows, **settings)
    return sink.getvalue()


def set_of(value: bytes, rows: int, **settings: Any) -> bytes:
    """The images of a distilled set: one so many times, which a dictionary holds once."""
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value], pa.binary()))
    image = pa.StructArray.from_arrays([repeated, pa.nulls(rows, pa.string())], ["bytes", "path"])
    table = pa.table({"image": image, "label": np.zeros(rows, np.int64), "slot": np.arange(rows) % 8})
    sink = io.BytesIO()
    pq.write_table(table, sink, store_schema=False, row_group_size=rows, **settings)
    return sink.getvalue()


def logits_bomb() -> bytes:
    """A parquet file of four rows whose soft labels are a list of 100 million zeros each."""
    zeros = pa.array(np.zeros(10**8, np.float32))
    lists = pa.ListArray.from_arrays(pa.array([0, 10**8, 10**8, 10**8, 10**8], pa.int32()), zeros)
    rows = [{"bytes": png(8, n), "path": None} for n in range(4)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 2, 3], "soft_label": lists}), sink)
    return sink.getvalue()


def packed(content: bytes, size: int) -> bytes:
    """torch's archive `content` with its numbers replaced by so many zeros, compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            with new.open(part.filename, "w", force_zip64=True) as file:
                if "/data/" in part.filename:
                    for _ in range(size // 2**24):
                        file.write(bytes(2**24))
                else:
                    file.write(old.read(part))
    return buffer.getvalue()


def tar_of(members: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in more:
            tar.addfile(info)
    return buffer.getvalue()


def samples() -> dict[str, bytes]:
    return {f"{n}.{e}": c for n in range(4) for e, c in (("png", png(8, n)), ("cls", str(n % 2).encode()))}


def write_shards(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / f"{split}-0.tar").write_bytes(tar_of(samples()))


def link_to(target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo("4.png")
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def write_cifar(folder: Path) -> None:
    pixels = np.zeros((4, 3072), np.uint8)
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [0, 1, 2, 3]}, protocol=2))


def npy_header(shape: tuple[int, ...]) -> bytes:
    header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def npz_of(images: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", images)
        archive.writestr("../../escaped.npy", images[:200])
    return buffer.getvalue()


def pickled_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, train_images=np.array([Evil()], object), train_labels=np.zeros(1, np.int64))
    return buffer.getvalue()


def saved_by_torch(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write_set(folder: Path) -> None:
    shutil.copytree(SETS / "set", folder, dirs_exist_ok=True)


def write_unit(folder: Path) -> None:
    with Run(folder / "run") as run:
        run.bind_config({"a": 1}, PLAN)
        run.finish_unit("one", {"loss": 0.5})
        run.finish_unit("two", {"loss": 0.5}, {"x": torch.ones(3)})
        run.checkpoint("three").save({"x": torch.ones(3)}, {"step": 3})


def write_shared_unit(folder: Path) -> None:
    write_unit(folder)
    with Run(folder / "run", worker="me") as run:
        run.event("last")


def link_away(name: str) -> Callable[[Path], None]:
    """What puts a link in the place of a file or folder of a run, to one that is not the run's."""

    def harm(folder: Path) -> None:
        path, away = folder / "run" / name, folder.parents[1] / ELSEWHERE
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(away if "." not in name and name != "workers/claims" else away / "mine")

    return harm


def links_away(*names: str) -> dict[str, bytes | Callable[[Path], object]]:
    return {f"{name} is a link": link_away(name) for name in names}


def read_unit(folder: Path, worker: str | None = None) -> None:
    with Run(folder / "run", show=False, worker=worker) as run:
        run.seconds_spent()
        run.bind_config({"a": 1}, PLAN)
        run.load_unit("one")
        run.load_unit("two")
        run.checkpoint("three").load()


def read_resealed(folder: Path) -> None:
    """Read a set whose manifest is sealed again after it was damaged, so that what it says is looked at."""
    path = folder / MANIFEST_NAME
    try:
        held = json.loads(path.read_bytes())
        path.write_bytes(_seal({key: value for key, value in held.items() if key != SEAL_KEY}))
    except Exception:  # no JSON any more, or no object
        pass
    load_distilled(folder)


def read_refitted(folder: Path) -> None:
    """Read a set whose manifest was made to fit its images after these were damaged, so that they are looked at."""
    path = folder / MANIFEST_NAME
    held = json.loads(path.read_bytes())
    (images,) = folder.glob("images-*.parquet")
    content = images.read_bytes()
    try:
        rows = pq.read_metadata(images).num_rows
    except Exception:  # no parquet any more
        rows = 0
    digest = sha256_bytes(content)
    images.rename(folder / file_name("images", digest))
    facts = {"name": file_name("images", digest), "bytes": len(content), "sha256": digest}
    held["files"]["images"] = facts | {"entries": rows, "raw_bytes": rows * 3 * 8 * 8}
    path.write_bytes(_seal({key: value for key, value in held.items() if key != SEAL_KEY}))
    load_distilled(folder)


def read_weights(folder: Path) -> None:
    for path in folder.glob("weights.*"):
        load_checkpoint("toynet", path, conftest.build_toy())


def read_published(folder: Path) -> None:
    import_set(folder / "views", DataConfig(str(SETS / "toy.npz")), ImportConfig())


def npy_of(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_soft_labels(folder: Path, suffix: str, content: bytes) -> None:
    """Published images, 24 of four classes, and soft labels beside them."""
    shutil.copytree(SETS / "views", folder / "views", ignore=shutil.ignore_patterns("soft_labels.npy", "index.csv"))
    (folder / f"given.{suffix}").write_bytes(content)


def read_soft_labels(folder: Path, suffix: str) -> None:
    settings = ImportConfig(soft_labels=str(folder / f"given.{suffix}"))
    import_set(folder / "views", DataConfig(str(SETS / "toy.npz")), settings)


def write_published_parquet(folder: Path) -> None:
    rows = [{"bytes": png(8, n), "path": None} for n in range(4)]
    logits = np.random.default_rng(0).normal(size=(4, 4)).tolist()
    table = pa.table({"image": rows, "label": [0, 1, 2, 3], "soft_label": logits})
    pq.write_table(table, folder / "train-0.parquet")


def read_published_parquet(folder: Path) -> None:
    import_set(folder / "train-0.parquet", DataConfig(str(SETS / "toy.npz")), ImportConfig())


WIDE = b"a: &a [" + b"1," * 9 + b"1]\n"
ALIASES = WIDE + b"".join(
    b"%c: &%c [%s]\n" % (97 + n, 97 + n, b",".join([b"*%c" % (96 + n)] * 9)) for n in range(1, 20)
)
HUGE_TENSOR = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
HUGE_HEADER = struct.pack("<Q", len(HUGE_TENSOR)) + HUGE_TENSOR
BOMBS = {"huge declared size": png_of(2**30, 2**30, 100), "decompression bomb": png_of(30_000, 30_000, 10**8)}
SETS = Path()  # where a distilled set and its images lie, made before any child


def formats() -> dict[str, Format]:
    """Every format that is read from outside."""
    yes: dict[str, Format] = {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        yes[f"image {kind}"] = Format(lambda f, k=kind: write_folder(f, k), "train/*/*", read_all, BOMBS)
    many = npy_header((2**20, 2**20, 3))
    yes["npz"] = Format(
        lambda f: conftest.write_toy_npz(f / "toy.npz"),
        "toy.npz",
        lambda f: read_all(f / "toy.npz"),
        {
            "pickled objects": pickled_npz(),
            "huge declared size": npz_of(many),
            "decompression bomb": npz_of(npy_header((2**10, 2**10, 2**10)) + bytes(2**28)),
        },
    )
    yes["parquet"] = Format(
        write_parquet,
        "train*.parquet",
        read_all,
        {
            "one image many times": parquet_of(png(8) + bytes(2**20), 5_000),
            "one label many times": parquet_of(png(8), 2_000, "a" * 2**20),
            "rows without end": parquet_of(b"", 2 * 10**8),
            "compression bomb": parquet_of(bytes(2**29), 3, compression="zstd"),
            "bomb of an image": parquet_of(BOMBS["decompression bomb"], 4),
        },
    )
    out = samples() | {
        "../../escaped.png": png(),
        "../../escaped.cls": b"0",
        f"{ABSOLUTE}.png": png(),
        f"{ABSOLUTE}.cls": b"1",
    }
    large = tarfile.TarInfo("9.png")
    large.size = 2**50
    yes["tar"] = Format(
        write_shards,
        "train*.tar",
        read_all,
        {
            "names that lead out": tar_of(out),
            "link": tar_of(samples(), link_to("/etc/passwd")),
            "huge declared size": large.tobuf() + bytes(1024),
            "bomb of an image": tar_of(samples() | {"9.png": BOMBS["decompression bomb"], "9.cls": b"0"}),
        },
    )
    yes["cifar pickle"] = Format(
        write_cifar, "train", lambda f: read_cifar_pickles(f, "cifar100"), {"code": pickle.dumps(Evil())}
    )
    yes["safetensors"] = Format(
        lambda f: save_tensors(f / "t.safetensors", {"x": torch.ones(4), "y": torch.ones(2)}, seal({"a": 1}, {}, "t")),
        "*.safetensors",
        lambda f: load_tensors(f / "t.safetensors"),
        {"huge declared size": HUGE_HEADER, "huge header": struct.pack("<Q", 2**60) + b"{}"},
    )
    yes["manifest"] = Format(write_set, MANIFEST_NAME, read_resealed, {"deep": b"[" * 10**6})
    yes["distilled set"] = Format(write_set, "*.*", load_distilled, {})
    yes["distilled images"] = Format(
        write_set,
        "images-*.parquet",
        read_refitted,
        {
            "one image many times": set_of(png() + bytes(2**20), 3_000, compression="zstd"),
            "rows without end": set_of(b"", 2 * 10**7, compression="zstd"),
            "compression bomb": set_of(bytes(2**29), 3, compression="zstd"),
            "bomb of an image": set_of(BOMBS["decompression bomb"], 4),
            "huge declared size": set_of(BOMBS["huge declared size"], 4),
        },
    )
    config = yaml.safe_dump({"ipc": 5, "infer": {"steps": 3}, "data": {"source": "x"}}).encode()
    yes["YAML"] = Format(
        lambda f: (f / "c.yaml").write_bytes(config),
        "c.yaml",
        lambda f: read_config(["--config", str(f / "c.yaml")], Recipe()),
        {
            "code": f"a: !!python/object/apply:os.system ['touch {CANARY}']".encode(),
            "aliases without end": ALIASES,
            "deep": b"[" * 10**5,
        },
    )
    yes["run"] = Format(
        write_unit,
        "run/*/*.*",
        read_unit,
        links_away(".lock", "events.jsonl", "units", "checkpoints", "workers", "sets", "distilled"),
    )
    yes["shared run"] = Format(
        write_shared_unit,
        "run/*/*.*",
        lambda folder: read_unit(folder, "me"),
        links_away(".lock", "workers/claims", "workers/me.jsonl", "units", "checkpoints", "workers"),
    )
    yes["run configuration"] = Format(write_unit, "run/*.json*", read_unit, {})
    weights = dict(conftest.ToyNet(0).state_dict())
    yes["torch checkpoint"] = Format(
        lambda f: (f / "weights.pt").write_bytes(saved_by_torch(weights)),
        "weights.pt",
        read_weights,
        {"code": pickle.dumps(Evil()), "code in torch's archive": saved_by_torch({"a": Evil()})},
    )
    yes["published set"] = Format(
        lambda f: shutil.copytree(SETS / "views", f / "views"), "views/**/*.*", read_published, BOMBS
    )
    soft = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    few = torch.zeros(1, dtype=torch.float16)
    for suffix, content, hostile in (
        (
            "pt",
            saved_by_torch(torch.from_numpy(soft)),
            {
                "code": pickle.dumps(Evil()),
                "code in torch's archive": saved_by_torch([Evil()]),
                "few bytes of a huge shape": saved_by_torch(few.expand(2**40, 4)),
                "decompression bomb": packed(saved_by_torch(torch.zeros(24, 4)), 2**31),
            },
        ),
        (
            "npy",
            npy_of(soft),
            {
                "pickled objects": npy_of(np.array([Evil()], object)),
                "huge declared size": npy_header((2**40, 4)),
                "huge header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{" * 100,
            },
        ),
    ):
        yes[f"soft labels {suffix}"] = Format(
            lambda f, s=suffix, c=content: write_soft_labels(f, s, c),
            f"given.{suffix}",
            lambda f, s=suffix: read_soft_labels(f, s),
            hostile,
        )
    yes["soft labels parquet"] = Format(
        write_published_parquet, "train*.parquet", read_published_parquet, {"zeros without end": logits_bomb()}
    )
    return yes


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Return damaged content: by one to four of the ways below, or as many bytes of noise."""
    if chance.random() < 0.05:
        return chance.randbytes(len(content))
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data)) if data else 0
        match chance.randrange(6):
            case 0 if data:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at : at + 8] = chance.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"99999999"])
            case 3:
                data[at:at] = data[at : at + chance.randrange(64)] * chance.randint(1, 5)
            case 4:
                del data[at : at + chance.randrange(32)]
            case 5:
                other = chance.randrange(len(data) + 1)
                data[at : at + 16] = data[other : other + 16]
    return bytes(data)


def strays(root: Path, place: Path) -> dict[Path, int]:
    """Everything below `root` but `place`, and what lies where inputs lead by links or absolute names: by when it
    changed."""
    below = {path: path.lstat().st_mtime_ns if ELSEWHERE in path.parts else 0 for path in root.rglob("*")
             if path != place and place not in path.parents}  # fmt: skip
    return below | {path: path.lstat().st_mtime_ns for path in ABSOLUTE.parent.glob(f"{ABSOLUTE.name}*")}


def read_watched(kind: Format, place: Path, root: Path) -> str:
    """Read the folder `place`: "read", "refused", or what went wrong, files that appeared outside of it among that."""
    before = strays(root, place)
    try:
        kind.read(place)
        end = "read"
    except StillroomError as error:
        end = "refused" if len(str(error)) < 5000 else "message too long"
    except BaseException:
        end = traceback.format_exc()[-1500:]
    appeared = sorted(path for path, changed in strays(root, place).items() if before.get(path) != changed)
    for path in appeared:  # so that the next input can be seen to make it
        path.unlink() if path.is_file() or path.is_symlink() else None
    return f"files appeared: {[str(path) for path in appeared]}" if appeared else end


def try_inputs(
    kind: Format, folder: Path, contents: list[tuple[str, int, bytes | Callable[[Path], object] | None, int]], log: Path
) -> int:
    """Read each input in this process, which is a child; a line of JSON for each goes to `log`, before and after."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    os.chdir(folder)
    with open(log, "w") as file:
        for name, seed, hostile, number in contents:
            place = folder / "input"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            kind.write(place)
            chance = random.Random(seed)
            paths = sorted(path for path in place.glob(kind.pattern) if path.is_file())
            path = chance.choice(paths)
            if callable(hostile):
                hostile(place)
            elif number >= 0:  # -1: as it is
                path.write_bytes(mutate(path.read_bytes(), chance) if hostile is None else hostile)
            file.write(json.dumps({"begun": name}) + "\n")
            file.flush()
            end = read_watched(kind, place, folder.parents[2])
            file.write(json.dumps({"input": name, "end": end}) + "\n")
    return 0


def run_fuzz(folder: Path, inputs: int, seed: int, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Carry out the campaign with so many mutated inputs of each format; return its counts, and what failed."""
    global SETS
    SETS = folder / "sets"
    SETS.mkdir()
    NETWORKS["toynet"] = conftest.TOYNET_ROW
    recipe = RECIPES["toy"] = conftest.build_toy_recipe(conftest.write_toy_npz(SETS / "toy.npz"))
    torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
    del recipe

    def make() -> int:
        from stillroom import cli

        os.environ["STILLROOM_CACHE"] = str(folder / "cache")
        code = cli.main(["distill", "toy", "--out", str(SETS / "run")])
        shutil.copytree(SETS / "run" / "distilled", SETS / "set")
        return code or cli.main(["export", str(SETS / "run"), str(SETS / "views"), "--to", "folder"])

    told = fork(make, folder / "err").wait()
    assert told.code == 0, told.err
    counts: dict[str, Counter[str]] = {}
    failures: list[str] = []
    sandbox = folder / "a" / "b" / "sandbox"
    sandbox.mkdir(parents=True)
    (sandbox.parent / ELSEWHERE).mkdir()
    (sandbox.parent / ELSEWHERE / "mine").write_text("years of work")
    outside = sorted(map(str, SETS.rglob("*")))
    for name, kind in formats().items():
        if only and name not in only:
            continue
        tried = [(f"{name} {n}", hash_seed(name, seed, n), None, n) for n in range(inputs)]
        tried = [(f"{name} undamaged", seed, b"", -1), *tried]
        tried = [(f"{name}: {what}", seed, content, 0) for what, content in kind.hostile.items()] + tried
        counts[name] = Counter()
        while tried:
            part, log = tried[:AT_ONCE], folder / "log"
            told = fork(lambda k=kind, p=part, to=log: try_inputs(k, sandbox, p, to), folder / "err").wait(60 + AT_ONCE)
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            ends = [line for line in lines if "end" in line]
            for line in ends:
                good = line["end"] in ("read", "refused")
                hostile = ": " in line["input"]
                good = good and not ("undamaged" in line["input"] and line["end"] != "read")
                good = good and not (hostile and line["end"] == "read" and "names" not in line["input"])
                counts[name][line["end"] if good else "FAILED"] += 1
                counts[name]["hostile"] += hostile
                if not good:
                    failures.append(f"{line['input']}: {line['end'][-300:]}")
            tried = tried[len(ends) :]
            if told.code != 0:
                failures.append(f"{tried[0][0]}: the process ended by {told.code}: {told.err[-500:]}")
                counts[name]["FAILED"] += 1
                tried = tried[1:]
            left = [p for p in (sandbox / CANARY, folder / CANARY, Path(CANARY)) if p.exists()]
            if left or outside != sorted(map(str, SETS.rglob("*"))) or set(os.listdir(sandbox)) - {"input"}:
                failures.append(f"{name}: files appeared: {left} {os.listdir(sandbox)}")
                break
        print(name, dict(counts[name]), flush=True)
    counted = {name: dict(sorted(c.items())) for name, c in sorted(counts.items())}
    return {"inputs_per_format": inputs, "seed": seed, "counts": counted, "failures": failures}


def hash_seed(name: str, seed: int, number: int) -> int:
    """A seed that is the input's own."""
    return zlib.crc32(f"{name} {seed} {number}".encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run_fuzz(Path(folder), options.inputs, options.seed, tuple(options.only))
    results |= {"command": f"python tests/faults/fuzz.py --inputs {options.inputs}", "commit": commit()}
    text = json.dumps(results, indent=2, sort_keys=True) + "\n"
    print("\n".join(results["failures"]))
    if options.out is not None:
        options.out.write_text(text)
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
