"""A private folder of images: what a set that is handed on shows of them, and what a set without real images costs.

    python examples/private_folder.py --image-size 16                     # digits, written to a folder first
    python examples/private_folder.py path/to/images --image-size 64 --steps 1000 --epochs 400

The folder has train/<class>/* and test/<class>/*. Nothing leaves this machine: networks are trained here, and no name
is looked up anywhere. For each method printed are its students' accuracy, how many of its images are training images to
the bit, and how near the others come: the median distance (root mean square of pixels in [0, 1]) from an image to the
nearest training image. Test images, which nobody copied, have such a distance too, printed last.

This is a look, no proof. A set without copies still holds what its teachers learned, and soft labels tell more; no
method here is differentially private.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import stillroom


def write_folder(folder: Path, per_class: int) -> Path:
    """Digits as a folder of PNG files, to have one to show this with."""
    digits = stillroom.load_real("digits", train_per_class=per_class)
    for split, images in (("train", digits.train), ("test", digits.test)):
        pixels = images.batch(torch.arange(len(images))).permute(0, 2, 3, 1).numpy()
        for i, (picture, label) in enumerate(zip(pixels, images.labels.tolist(), strict=True)):
            path = folder / split / digits.class_names[label] / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return folder


def nearest(images: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """Root mean square distance of each image, uint8 [n, 3, height, width], to the nearest of `training`, float32."""
    flat, others = (pixels.flatten(1).float() / 255 for pixels in (images, training))
    # Without expanding squares, so that a copy is at 0 exactly.
    found = torch.cdist(flat, others, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return found / flat.shape[1] ** 0.5


def main(words: Sequence[str] | None = None) -> dict[str, tuple[float, int]]:
    """Print the table and return by method the mean top-1 and the number of copies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="none: digits, in a folder of this program's own")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--per-class", type=int, default=None, help="training images of each class; none: all")
    parser.add_argument("--flip", default=None, choices=["on", "off"], help="whether a mirrored image keeps its class")
    parser.add_argument("--methods", nargs="+", default=["random", "infer", "sre2l"])
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100, help="of the methods that optimise")
    parser.add_argument(
        "--networks", nargs="+", default=["convnet_thin"], help="the teachers; the first is the student"
    )
    parser.add_argument("--teacher-epochs", type=int, default=6)
    parser.add_argument(
        "--epochs", type=int, default=40, help="of students on random images; the others take as many steps"
    )
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(words)

    with tempfile.TemporaryDirectory() as own:
        source = Path(args.folder) if args.folder else write_folder(Path(own), args.per_class or 150)
        flip = args.flip or ("on" if args.folder else "off")
        wanted = {"image_size": args.image_size, "resize": "crop", "train_per_class": args.per_class}
        real = stillroom.load_real(str(source), flip=flip, **wanted)
        training = real.train.batch(torch.arange(len(real.train)))
        teachers = stillroom.load_teachers(real, args.networks, recipe="fast", epochs=args.teacher_epochs)

        reached = {}
        print(f"{len(real.train)} private images of {real.classes} classes, {args.ipc} per class in a set\n")
        print(f"{'method':10s}{'top-1':>16s}{'steps':>8s}{'copies':>16s}{'distance':>10s}")
        for method in args.methods:
            optimised = {"steps": args.steps} if method in ("infer", "sre2l", "cda", "gvbsm") else {}
            made = stillroom.distill(method, real, teachers, args.ipc, **optimised)
            epochs = max(1, round(args.epochs * args.ipc * real.classes / made.view_count))  # as many steps
            rate = {"epochs": epochs, "learning_rate": args.learning_rate}
            result = stillroom.evaluate(made, real, args.networks[0], seeds=args.seeds, **rate)
            away = nearest(made.images[torch.arange(len(made.images))], training)
            copies = int((away == 0).sum())
            reached[method] = (result.mean, copies)
            accuracy = f"{100 * result.mean:.1f} ± {100 * result.std:.1f} %"
            others = away[away > 0]
            distance = f"{statistics.median(others.tolist()):.3f}" if len(others) else "-"
            print(
                f"{method:10s}{accuracy:>16s}{result.steps:8d}{f'{copies} of {len(away)}':>16s}{distance:>10s}",
                flush=True,
            )
        test = nearest(real.test.batch(torch.arange(len(real.test))), training)
        print(f"{'test':10s}{'':16s}{'':8s}{f'{int((test == 0).sum())} of {len(test)}':>16s}{test.median():10.3f}")
    return reached


if __name__ == "__main__":
    main()
