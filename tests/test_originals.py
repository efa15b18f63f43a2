"""Original JPEG files in a distilled set: kept where they are the whole image, to the bit, and nothing else of them."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_toy_teacher, write_toy_npz
from PIL import Image

from stillroom.artifact import keep_original, strip_metadata
from stillroom.compute import Plan
from stillroom.data import DataConfig, RealData, load_real
from stillroom.distilled import count_bytes, load_distilled
from stillroom.methods.coreset import HerdingConfig, distill_herding
from stillroom.methods.infer import InferConfig, distill
from stillroom.methods.select import RandomConfig, distill_random
from stillroom.run import Run

SIDE, LABELS = 8, "abcd"  # as the toy teacher has them
TURNED, PLACED = 6, "51 N"  # an orientation, and what nobody meant to publish


def picture(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def jpeg(seed: int, size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGB", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).convert(mode).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = orientation, PLACED
    return tags.tobytes()


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


# Files by name: what they hold, and whether the set keeps it.
FILES: dict[str, tuple[bytes, bool]] = {
    "0.jpg": (jpeg(0, quality=70), True),
    "1.jpg": (jpeg(1, quality=80, subsampling=2, progressive=True), True),
    "2.jpg": (jpeg(2, exif=exif(1), comment="mine", icc_profile=b"colours"), True),
    "3.jpg": (jpeg(3, quality=60) + b"a film behind the picture \xff\xd9", True),
    "4.jpg": (jpeg(4, exif=exif(TURNED)), False),
    "5.jpg": (jpeg(5, mode="L"), False),
    "6.jpg": (jpeg(6, (SIDE + 8, SIDE)), False),
    "7.jpg": (jpeg(7, (2 * SIDE, 2 * SIDE)), False),
    "8.png": (png(8), False),
    "9.jpg": (jpeg(9, mode="CMYK"), False),
}
WHOLE = [name for name, (_, kept) in FILES.items() if kept]


@pytest.fixture(params=[4.0, 0.0], ids=["in memory", "lazy"])
def real(tmp_path: Path, request: pytest.FixtureRequest) -> RealData:
    """Four classes of the same kinds of files, and more than are asked for."""
    for split in ("train", "test"):
        for label in LABELS:
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for name, (content, _) in FILES.items():
                (folder / name).write_bytes(content)
            (folder / "z.png").write_bytes(png(10))
    config = DataConfig(str(tmp_path / "data"), image_size=SIDE, resize="crop", memory_limit_gib=request.param)
    return load_real(config)


def test_originals_are_kept_to_the_bit_without_their_metadata_and_counted_as_they_are(
    real: RealData, plan: Plan, tmp_path: Path
) -> None:
    made = distill_random(real, [], 11, RandomConfig(), 0, plan, Run())
    stored = made.with_image_encoding("jpeg95")
    assert stored.image_files is not None
    bare = {strip_metadata(FILES[name][0]): name for name in WHOLE}
    found = [bare.get(file) for file in stored.image_files]
    kept = stored.manifest.extra["original_images"]
    assert kept == [row for row, name in enumerate(found) if name is not None]
    assert sorted(name for name in found if name) == sorted(len(LABELS) * WHOLE)
    for row in kept:  # what a second encoding would have lost
        assert torch.equal(stored.images[row], made.images[row])
    others = [row for row in range(len(found)) if row not in kept]
    assert not any(torch.equal(stored.images[row], made.images[row]) for row in others)
    assert FILES["0.jpg"][0] in stored.image_files  # byte for byte, where there was nothing to strip
    again = made.with_image_encoding("jpeg90")
    assert "original_images" not in again.manifest.extra
    assert not set(again.image_files or ()) & set(stored.image_files)

    written = stored.save(tmp_path / "set")
    loaded = load_distilled(tmp_path / "set")
    assert loaded.image_files == stored.image_files
    assert torch.equal(loaded.images[:], stored.images[:])
    assert loaded.manifest.extra["original_images"] == kept
    assert loaded.save(tmp_path / "again").files == written.files
    assert count_bytes(loaded).stored["images"] == (tmp_path / "set" / written.files["images"].name).stat().st_size
    assert (
        f"{len(kept)} of the images are the real ones' own JPEG files" in (tmp_path / "set" / "README.md").read_text()
    )


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_kept_decodes_as_the_whole_file_does_and_says_nothing_but_pixels(name: str) -> None:
    content, bare = FILES[name][0], strip_metadata(FILES[name][0])
    assert np.array_equal(np.array(Image.open(io.BytesIO(bare))), np.array(Image.open(io.BytesIO(content))))
    assert not any(secret in bare for secret in (b"Exif", PLACED.encode(), b"mine", b"colours", b"film"))
    opened = Image.open(io.BytesIO(bare))
    assert not opened.getexif()
    assert strip_metadata(bare) == bare


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_picture_is_encoded_as_it_is_seen(orientation: int) -> None:
    content = jpeg(4, exif=exif(orientation), quality=70)
    with Image.open(io.BytesIO(content)) as opened:
        as_stored = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
    assert keep_original(as_stored, content) is not None  # of these very pixels, whatever EXIF says of them
    assert keep_original(as_stored.flip(2).contiguous(), content) is None


def test_no_damaged_file_is_kept_and_none_stops_the_set() -> None:
    content = jpeg(1, quality=70)
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)
    assert keep_original(image, content) == content
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for at in generator.integers(0, len(content), 3):
            damaged[at] = generator.integers(0, 256)
        file = keep_original(image, bytes(damaged[: generator.integers(1, len(content) + 1)]))
        if file is not None:
            assert np.array_equal(np.array(Image.open(io.BytesIO(file))), image.permute(1, 2, 0).numpy())
    for other in (None, b"", b"\xff\xd8", png(1), content[:-2], content[:200], content[2:]):
        assert keep_original(image, other) is None


def test_every_method_that_takes_whole_images_keeps_their_files(real: RealData, plan: Plan) -> None:
    teachers, run = [build_toy_teacher()], Run()
    infer = InferConfig(steps=2, shift_limit=1)
    herded = distill_herding(real, teachers, 11, HerdingConfig(), 0, plan, run)
    inferred = distill(real, teachers, 11, infer, 0, plan, run)  # 8 slots
    for made in (herded, inferred):
        stored = made.with_image_encoding("jpeg95")
        assert stored.image_files is not None
        kept = stored.manifest.extra["original_images"]
        assert {stored.image_files[row] for row in kept} <= {strip_metadata(FILES[name][0]) for name in WHOLE}
        assert len(kept) >= len(LABELS)
        assert all(torch.equal(stored.images[row], made.images[row]) for row in kept)


def test_a_file_that_is_gone_is_encoded_anew(real: RealData, plan: Plan, tmp_path: Path) -> None:
    made = distill_random(real, [], 11, RandomConfig(), 0, plan, Run())
    expected = made.images[:]  # read now
    for path in (tmp_path / "data" / "train").rglob("0.jpg"):
        path.unlink()
    stored = replace(made, images=expected).with_image_encoding("jpeg95")
    assert len(stored.manifest.extra["original_images"]) == len(LABELS) * (len(WHOLE) - 1)


@pytest.mark.parametrize("settings", [{"restart_marker_blocks": 1}, {"progressive": True, "quality": 100}])
def test_scans_with_restarts_and_in_many_parts_are_gone_through_to_their_end(settings: dict[str, Any]) -> None:
    plain = jpeg(1, (72, 40), **settings)
    assert strip_metadata(jpeg(1, (72, 40), exif=exif(1), comment="mine", **settings) + b"film") == plain


def test_views_go_to_the_workers_of_a_loader_without_the_real_data(real: RealData, plan: Plan) -> None:
    views = distill_random(real, [], 2, RandomConfig(), 0, plan, Run()).views()
    again = pickle.loads(pickle.dumps(views))  # as they are given to a process that is spawned
    assert torch.equal(again[3][0], views[3][0])


def test_images_of_arrays_have_no_files(tmp_path: Path, plan: Plan) -> None:
    real = load_real(DataConfig(str(write_toy_npz(tmp_path / "toy.npz"))))
    made = distill_random(real, [], 2, RandomConfig(), 0, plan, Run()).with_image_encoding("jpeg95")
    assert "original_images" not in made.manifest.extra
