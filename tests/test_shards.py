"""WebDataset's shards: what a writer of tar files wrote is read back exactly, and nothing that is not whole is read."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stillroom.data import FACTS, DataConfig, LazyImages, MemoryImages, RealData, load_real
from stillroom.errors import StillroomError
from stillroom.readers import Source, Span, find_layout, read_shards, shards

SIDE = 6
Member = tuple[str, bytes]


def write_tar(path: Path, members: Sequence[Member | tarfile.TarInfo], layout: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file as webdataset's own writer leaves it: a time with fractions, which POSIX keeps in an extra header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size, info.mtime = len(member[1]), 1_700_000_000.25 if layout == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def pixels_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def samples_of(count: int, seed: int, classes: int = 2) -> list[Member]:
    pixels = pixels_of(count, seed)
    return [
        member
        for k in range(count)
        for member in ((f"{k:06}.cls", b"%d" % (k % classes)), (f"{k:06}.png", encode(pixels[k])))
    ]


def write_shards(root: Path, name: str = "{split}-{number:06}.tar") -> Path:
    """Two shards of five training images and one of four validation images, of two classes."""
    for split, number, count in (("train", 0, 5), ("train", 1, 5), ("val", 0, 4)):
        write_tar(root / name.format(split=split, number=number), samples_of(count, seed=number + len(split)))
    return root


def load(source: Path, **settings: Any) -> RealData:
    return load_real(DataConfig(source=str(source), **settings))


def everything(images: Any) -> torch.Tensor:
    return images.batch(torch.arange(len(images)))


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def contents(source: Source) -> list[tuple[bytes, int]]:
    """The encoded images of the training split and their labels."""
    count = len(source.train.labels)
    items = source.train.images.fetch(np.arange(count))
    assert all(isinstance(item, Span) for item in items)  # read in the threads that decode
    return [(item.read(), int(label)) for item, label in zip(items, source.train.labels, strict=True)]


@pytest.mark.parametrize(
    "name", ["{split}-{number:06}.tar", "{split}/{number}.tar", "data/pets1k-{split}-{number}.tar"]
)
def test_shards_give_the_stored_pixels_and_labels_in_memory_and_lazily(tmp_path, name):
    root = write_shards(tmp_path, name)
    assert find_layout(root) == "shards"
    memory, lazy = load(root), load(root, memory_limit_gib=0.0)
    assert isinstance(memory.train, MemoryImages)
    assert isinstance(lazy.train, LazyImages)
    expected = channels_first(np.concatenate([pixels_of(5, 5), pixels_of(5, 6)]))
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    for real in (memory, lazy):
        assert torch.equal(everything(real.train), expected)
        assert torch.equal(real.train.batch(shuffled), expected[shuffled])
        assert torch.equal(everything(real.test), channels_first(pixels_of(4, 3)))
        assert real.train.labels.tolist() == [0, 1, 0, 1, 0] * 2
        assert real.class_names == ("0", "1")
        assert real.stored_bytes == sum(len(encode(p)) for seed in (5, 6) for p in pixels_of(5, seed))
    assert load(root, holdout_per_class=2).test.labels.tolist() == [1, 0, 1, 0]


def test_classes_are_named_beside_the_shards_and_json_may_say_a_number_or_a_name(tmp_path):
    image = encode(pixels_of(1, 0)[0])
    labels = [{"label": 1}, {"class": "süß/sauer"}, {"class": 0, "label": None}, {"caption": "no label, but .cls"}]
    members = [(f"{k}.json", json.dumps(label).encode()) for k, label in enumerate(labels)]
    images = [(f"{k}.webp", image) for k in range(4)]
    write_tar(tmp_path / "train-0.tar", [*members, *images, ("3.cls", b" 1\n")])
    write_tar(tmp_path / "val-0.tar", [("0.jpeg", image), ("0.cls", b"0")])
    names = ["a b", "süß/sauer"]
    (tmp_path / "class_names.json").write_text(json.dumps(names))
    real = load(tmp_path)
    assert real.class_names == tuple(names)
    assert real.train.labels.tolist() == [1, 1, 0, 1]
    (tmp_path / "classes.txt").write_text("a b\nsüß/sauer\n\n", encoding="utf-8")
    assert load(tmp_path).fingerprint == real.fingerprint


@pytest.mark.parametrize(("name", "text"), [
    ("classes.txt", "cat\n\ndog\n"), ("classes.txt", ""), ("class_names.json", "[1, 2]"),
    ("class_names.json", '{"0": "cat"}'), ("class_names.json", "cat"), ("class_names.json", "[" * 5000),
])  # fmt: skip
def test_class_names_that_are_no_names_are_refused(tmp_path, name, text):
    (write_shards(tmp_path) / name).write_text(text)
    with pytest.raises(StillroomError, match=rf"{name} (must hold a name for every class|is no JSON)"):
        load(tmp_path)


def test_class_folders_win_over_the_archives_that_they_came_in(tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(encode(pixels_of(1, 0)[0]))
        write_tar(tmp_path / split / "a.tar", [])
        write_tar(tmp_path / f"{split}.tar", [])
    assert load(tmp_path).class_names == ("a", "b")


# What writers write

QUIET = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LETTERS = st.characters(blacklist_characters="/.\0", blacklist_categories=("Cs",))
WORDS = st.one_of(st.text(LETTERS, min_size=1, max_size=8), st.integers(90, 300).map(lambda n: "long" * (n // 4)))
KEYS = st.one_of(WORDS, st.tuples(WORDS, WORDS).map("/".join), WORDS.map("./{}".format), WORDS.map("../{}".format))


def is_plain(key: str) -> bool:
    return not any(part.startswith("__") for part in key.split("/"))


@QUIET
@given(st.data())
def test_what_is_written_is_read_back_exactly_whatever_the_order_within_a_sample(tmp_path, data):
    keys = data.draw(
        st.lists(KEYS.filter(is_plain), min_size=1, max_size=5, unique_by=lambda key: key.removeprefix("./"))
    )
    layout = data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    members: list[Member] = []
    expected = []
    for key in keys:
        image, label = data.draw(st.binary(max_size=1100)), data.draw(st.integers(-3, 10**9))
        ending = data.draw(st.sampled_from(["jpg", "JPEG", "png", "webp"]))
        kind, text = data.draw(st.sampled_from([("cls", f"{label}"), ("json", f'{{"label": {label}}}')]))
        sample = [(f"{key}.{ending}", image), (f"{key}.{kind}", text.encode()), (f"{key}.txt", b"more")]
        members += data.draw(st.permutations(sample))
        expected.append((image, label))
    write_tar(tmp_path / "train-0.tar", members, layout)
    source = read_shards(tmp_path)
    assert contents(source) == expected
    assert source.train.images.stored_bytes(np.arange(len(keys))) == sum(len(image) for image, _ in expected)


@QUIET
@given(st.data())
def test_a_shard_that_is_cut_off_anywhere_is_refused_by_name(tmp_path, data):
    layout = data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    members = [*samples_of(3, 0), ("x" * 150 + ".png", b"image"), ("x" * 150 + ".cls", b"1")]
    path = write_tar(tmp_path / "train-0.tar", members, layout)
    whole, expected = path.read_bytes(), contents(read_shards(tmp_path))
    last = len(whole.rstrip(b"\0"))
    last += -last % 512  # where the empty blocks begin
    position = data.draw(st.one_of(st.integers(0, last + 511), st.integers(0, last // 512).map(lambda n: n * 512)))
    path.write_bytes(whole[:position])
    with pytest.raises(StillroomError, match=r"train-0\.tar is no whole tar file: it ends"):
        read_shards(tmp_path)
    path.write_bytes(whole[: last + 512])  # one empty block is an end
    assert contents(read_shards(tmp_path)) == expected


@QUIET
@given(st.data())
def test_any_damage_to_a_shard_is_harmless_or_refused(tmp_path, data):
    write_shards(tmp_path)
    content = bytearray((tmp_path / "train-000000.tar").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, 3000)))
        noise = data.draw(st.one_of(st.binary(max_size=20), st.just(b"\xff" * 8), st.just(b"9" * 12)))
        content[start : start + len(noise)] = noise
    (tmp_path / "train-000000.tar").write_bytes(content)
    try:
        real = load(tmp_path, skip_bad_images=True)
    except StillroomError:
        return
    assert everything(real.train).shape == (len(real.train), 3, SIDE, SIDE)


@QUIET
@given(st.data())
def test_a_header_that_lies_is_refused_or_harmless(tmp_path, data):
    """Damage that a checksum cannot show: sizes, kinds and names of any value, in a header that is signed for."""
    info = tarfile.TarInfo(data.draw(st.sampled_from(["0.png", "../../0.png", "/0.cls", ".png", "0.json"])))
    info.type = data.draw(
        st.sampled_from([b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"?"])
    )
    info.size = data.draw(st.one_of(st.integers(0, 2000), st.sampled_from([2**20 + 1, 2**33, 2**62])))
    header = info.tobuf(tarfile.GNU_FORMAT)
    body = data.draw(st.one_of(st.binary(max_size=100), st.sampled_from([b"19 size=9999999999\n", b"9 size=-1\n"])))
    padded = body + bytes(-len(body) % 512)
    (tmp_path / "train-0.tar").write_bytes(header + padded + bytes(1024))
    with contextlib.suppress(StillroomError):
        read_shards(tmp_path)


# What is refused


def member_of(kind: bytes, name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def test_links_and_devices_are_counted_and_refused_and_no_name_leads_anywhere(tmp_path):
    (tmp_path / "secret.png").write_bytes(encode(pixels_of(1, 0)[0]))
    root = write_shards(tmp_path / "shards")
    before = sorted(tmp_path.rglob("*"))
    odd = [
        member_of(tarfile.SYMTYPE, "000009.png", linkname="../secret.png"),
        member_of(tarfile.LNKTYPE, "../../000010.png", linkname="000001.png"),
        member_of(tarfile.CHRTYPE, "zero.cls", devmajor=1, devminor=5),
        member_of(tarfile.FIFOTYPE, "pipe"),
        member_of(tarfile.GNUTYPE_SPARSE, "holes.png"),
        member_of(tarfile.REGTYPE, "more.png", pax_headers={"GNU.sparse.major": "1"}),
    ]
    write_tar(root / "train-000001.tar", [*samples_of(2, 0), member_of(tarfile.DIRTYPE, "folder.png"), *odd])
    with pytest.raises(
        StillroomError,
        match=r"train-000001\.tar has links, devices or .* \(6: '000009\.png', '\.\./\.\./000010",
    ):
        load(root)
    escaping = [
        ("../../up.png", encode(pixels_of(1, 1)[0])),
        ("../../up.cls", b"0"),
        ("/abs.png", b""),
        ("/abs.cls", b"1"),
    ]
    write_tar(root / "train-000001.tar", escaping)
    real = load(root, skip_bad_images=True)
    assert (len(real.train), len(real.skipped_images)) == (6, 1)
    assert sorted(tmp_path.rglob("*")) == before


def twice(name: str) -> list[Member]:
    return [*samples_of(2, 0), (name, b"1")]


@pytest.mark.parametrize(("members", "message"), [
    ([*samples_of(2, 0), ("a.png", b""), ("b.jpg", b""), ("b.json", b'{"name": 1}')],
     r"has 2 samples without a label \('a', 'b'\)\. Add <key>\.cls, or <key>\.json with the field label or class"),
    ([*samples_of(2, 0), ("a.cls", b"1")], r"has 1 sample without an image \('a'\)\. Add <key>\.jpg"),
    (twice("000001.cls"), r"has the \.cls of the sample '000001' twice"),
    (twice("000001.jpg"), r"has the image of the sample '000001' twice; give each sample its own key"),
    ([*samples_of(2, 0), ("a.png", b""), ("a.cls", b"cat")],
     r"train-000001\.tar: 'a\.cls' has the label 'cat'; labels must be whole numbers 0 \.\.\. C-1\."),
    ([*samples_of(2, 0), ("a.cls", b"\xff")], r"'a\.cls' cannot be read: .*utf-8"),
    ([*samples_of(2, 0), ("a.cls", b"1" * 2000)], r"'a\.cls' has 2,000 bytes, above the 1,024 that a \.cls may have"),
    ([*samples_of(2, 0), ("a.json", b'{"label": ')], r"'a\.json' cannot be read: Expecting value"),
    ([*samples_of(2, 0), ("a.json", b"[" * 10**5)], r"'a\.json' cannot be read: "),
    ([*samples_of(2, 0), ("a.json", b'{"label": 1.0}')], r"'a\.json' has the label 1\.0; .*or a name of class"),
    ([*samples_of(2, 0), ("a.json", b'{"label": true}')], r"has the label True"),
    ([*samples_of(2, 0), ("a.json", b'{"label": ' + b"[" * 900 + b"]" * 900 + b"}")], r"has the label of type list"),
    ([*samples_of(2, 0), ("a.json", b'{"class": "cat"}')], r"has the label 'cat'"),
    ([*samples_of(2, 0), ("a.png", b""), ("a.cls", b"0"), ("a.json", b'{"label": 1}')],
     r"two labels for the sample 'a': 0 in \.cls, 1 in \.json"),
    ([*samples_of(2, 0), ("a.json", b'{"label": 9223372036854775808}')], r"has the label 9223372036854775808"),
    ([*samples_of(2, 0), ("a.png", b""), ("a.cls", b"-1")], r"training label -1 \(on 1 of 8 images\)"),
    ([("n01440764.tar", b"")], r"has members \(1\), but no sample among them"),
    ([*samples_of(2, 0), ("a\n\x1b[2J.png", b"")], r"without a label \('a\\n\\x1b\[2J'\)"),
])  # fmt: skip
def test_flawed_samples_give_one_error_that_names_the_shard_and_the_sample(tmp_path, members, message):
    root = write_shards(tmp_path)
    write_tar(root / "train-000001.tar", members)
    with pytest.raises(StillroomError, match=message):
        load(root)


def joined(root: Path) -> None:
    first, second = (root / f"train-00000{k}.tar" for k in (0, 1))
    first.write_bytes(first.read_bytes() + second.read_bytes())


def zipped(name: str) -> Callable[[Path], None]:
    def zip_it(root: Path) -> None:
        path = root / "train-000000.tar"
        content = gzip.compress(path.read_bytes())
        path.unlink()
        (root / name).write_bytes(content)

    return zip_it


@pytest.mark.parametrize(("spoil", "message"), [
    (joined, r"train-000000\.tar is no whole tar file: it goes on after its end, as when files are joined by cat"),
    (zipped("train-000000.tar.gz"), r"train-000000\.tar\.gz is compressed as a whole, .*decompress it to a \.tar"),
    (zipped("val/train-000000.tgz"[4:]), r"train-000000\.tgz is compressed as a whole"),
    (zipped("train-000000.tar"), r"train-000000\.tar is compressed as a whole"),
    (lambda root: (root / "train-000000.tar").write_bytes(b"text" * 400), r"byte 0 begins no member"),
    (lambda root: (root / "val-000000.tar").unlink(), r"no test split\. Add .*shards.*--data\.holdout-per-class N"),
    (lambda root: [path.rename(root / f"{k}.tar") for k, path in enumerate(root.glob("train*"))],
     r"holds tar files \('0\.tar', '1\.tar', 'val-000000\.tar'\), none with 'train' in .* e\.g\. train-000000\.tar"),
    (lambda root: write_tar(root / "more" / "train-000000.tar", []), r"several datasets"),
])  # fmt: skip
def test_shards_that_cannot_be_read_where_they_lie_are_refused_with_the_reason(tmp_path, spoil, message):
    spoil(write_shards(tmp_path / "pets"))
    with pytest.raises(StillroomError, match=message):
        load(tmp_path / "pets")


def test_one_shard_alone_is_no_dataset(tmp_path):
    with pytest.raises(StillroomError, match=r"val-000000\.tar is neither .*Give the folder that the shards are in"):
        load(write_shards(tmp_path) / "val-000000.tar")


def test_a_named_dataset_may_be_shards(tmp_path, monkeypatch):
    monkeypatch.setitem(FACTS, "imagenet", replace(FACTS["imagenet"], classes=2, image_size=SIDE))
    write_tar(write_shards(tmp_path / "imagenet") / "test-000000.tar", [("0.png", b"an image without a label")])
    assert len(load(Path("imagenet"), root=str(tmp_path)).test) == 4


def test_an_image_too_large_to_be_one_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(shards.PARTS, "png", ("image", 100))
    with pytest.raises(StillroomError, match=r"'000000\.png' has \d+ bytes, above the 100 that a \.png may have"):
        load(write_shards(tmp_path))


def test_a_bad_image_is_named_by_shard_and_member_and_may_be_skipped(tmp_path):
    root = write_shards(tmp_path)
    path = write_tar(
        root / "train-000001.tar", [*samples_of(2, 0), ("pets/rex.jpg", b"no image"), ("pets/rex.cls", b"1")]
    )
    with pytest.raises(
        StillroomError, match=r"1 image cannot be read: .*train-000001\.tar: 'pets/rex\.jpg': not an image"
    ):
        load(root)
    assert len(load(root, skip_bad_images=True).skipped_images) == 1
    lazy = load(root, memory_limit_gib=0.0, skip_bad_images=True)
    path.write_bytes(path.read_bytes()[:3600])
    with pytest.raises(StillroomError, match=r"train-000001\.tar: '000000\.png': .*ends within it"):
        lazy.train.batch(torch.tensor([5]))
    path.unlink()
    with pytest.raises(StillroomError, match=r"train-000001\.tar: the file at byte \d+: FileNotFoundError"):
        lazy.train.batch(torch.tensor([5]))


def test_above_a_size_a_fingerprint_changes_with_an_images_size_and_not_with_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr("stillroom.images.HASHED_BYTES", 0)
    one, two = (load(write_shards(tmp_path / name), memory_limit_gib=0.0) for name in "ab")
    assert one.fingerprint == two.fingerprint
    members = samples_of(5, seed=6)
    write_tar(tmp_path / "b" / "train-000001.tar", [*members[:-1], (members[-1][0], members[-1][1] + b"more")])
    assert load(tmp_path / "b", memory_limit_gib=0.0).fingerprint != one.fingerprint
