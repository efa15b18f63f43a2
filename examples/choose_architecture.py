"""Choosing an architecture from a distilled set: do its students rank networks as training on all real images does?

    python examples/choose_architecture.py --image-size 16                # digits
    python examples/choose_architecture.py --data cifar10 --full-epochs 6 --steps 100 --epochs 60

Each network is trained on all real images, on a distilled set, and on as many random images with the same labels in as
many steps. Printed is Spearman's rank correlation of each small set's accuracies with the full ones: what the distilled
set gains over random images is the difference of two such numbers, and over few networks it says little.

Accuracy is over the test split: this asks whether the orders agree. To choose a network that is then to be tested, give
--holdout 20 or so, and choose on images held out of training.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import stillroom

NETWORKS = ["convnet_thin", "convnet", "convnet_in", "resnet10_thin", "resnet18_thin"]


def rank(values: Sequence[float]) -> list[float]:
    """The rank of each value, 1 the lowest; equal ones share the mean of their ranks."""
    return [(sum(o < value for o in values) + sum(o <= value for o in values) + 1) / 2 for value in values]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks; 0 where all values of one are equal, which orders nothing."""
    try:
        return statistics.correlation(rank(a), rank(b))
    except statistics.StatisticsError:
        return 0.0


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Print the table and return the correlation with full training by set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--holdout", type=int, default=0, help="training images per class to measure on")
    parser.add_argument("--method", default="infer")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="of the method, if it optimises anything")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="the candidates")
    parser.add_argument("--teachers", nargs="+", default=["convnet_thin"], help="that make and label the small sets")
    parser.add_argument("--full-epochs", type=int, default=4, help="on all real images")
    parser.add_argument("--epochs", type=int, default=30, help="on the distilled set")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args(words)

    size = {} if args.image_size is None else {"image_size": args.image_size, "resize": "squash"}
    real = stillroom.load_real(args.data, holdout_per_class=args.holdout, **size)
    full = stillroom.load_teachers(real, args.networks, recipe="fast", epochs=args.full_epochs)
    teachers = stillroom.load_teachers(real, args.teachers, recipe="fast", epochs=args.full_epochs)
    optimised = args.method in ("infer", "sre2l", "cda", "gvbsm")
    distilled = stillroom.distill(args.method, real, teachers, args.ipc, **({"steps": args.steps} if optimised else {}))
    small = {args.method: distilled, "random": stillroom.distill("random", real, teachers, args.ipc)}

    reached: dict[str, list[float]] = {"full": [teacher.accuracy["top1"] for teacher in full]}
    by_seed: dict[str, list[list[float]]] = {}
    for name, each in small.items():
        epochs = max(1, round(args.epochs * distilled.view_count / each.view_count))  # as many steps
        settings = {"epochs": epochs, "learning_rate": args.learning_rate, "seeds": args.seeds}
        found = [stillroom.evaluate(each, real, network, **settings) for network in args.networks]
        print(f"{name}: {found[0].steps} steps", flush=True)
        reached[name] = [result.mean for result in found]
        by_seed[name] = [list(top1) for top1 in zip(*(result.top1 for result in found), strict=True)]

    print(f"\n{'top-1 in %':24s}" + "".join(f"{name:>12s}" for name in reached))
    for i, network in enumerate(args.networks):
        print(f"{network:24s}" + "".join(f"{100 * column[i]:12.1f}" for column in reached.values()))
    found_by = {name: rank_correlation(reached["full"], reached[name]) for name in small}
    for name, value in found_by.items():
        seeds = ", ".join(f"{rank_correlation(reached['full'], one):+.2f}" for one in by_seed[name])
        print(f"rank correlation of {name} with full training: {value:+.2f} (by seed: {seeds})")
    print(f"gain of {args.method} over random images: {found_by[args.method] - found_by['random']:+.2f}")
    return found_by


if __name__ == "__main__":
    main()
