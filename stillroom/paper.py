"""The numbers of INFER's paper (Zhang et al., ICLR 2025): top-1 in percent, mean and standard deviation, by cell.

ConvNet128, as this field has it, is `convnet_in`. A table shows these numbers beside its own only where the cell is the
paper's: its dataset, budget, labels, student and training.
"""

from __future__ import annotations

# dataset -> ipc of the columns; the rows are (method, labels, student) -> mean ± std in these columns.
_CIFAR10, _CIFAR100 = ("cifar10", (10, 50)), ("cifar100", (10, 50, 100))
_TINY, _IMAGENET = ("tiny-imagenet", (10, 50)), ("imagenet", (10, 50))
_R = "resnet18"  # the first of its teachers, and two and three of them
_RM, _RME = f"{_R},mobilenet_v2", f"{_R},mobilenet_v2,efficientnet_b0"

# fmt: off
_ROWS = (
    # Table 1. Its SRe2L and G-VBSM rows have dynamic labels; methods that are not among METHODS are left out.
    (_CIFAR10,  "random", "hard",    "resnet18",    "29.6±0.9 36.7±1.7"),
    (_CIFAR10,  "sre2l",  "dynamic", "resnet18",    "27.2±0.5 47.5±0.6"),
    (_CIFAR10,  "gvbsm",  "dynamic", "resnet18",    "53.5±0.6 59.2±0.4"),
    (_CIFAR10,  "infer",  "static",  "resnet18",    "32.0±0.5 60.4±1.6"),
    (_CIFAR10,  "infer",  "dynamic", "resnet18",    "30.7±0.3 60.7±0.9"),
    (_CIFAR10,  "random", "hard",    "convnet_in",     "31.0±0.5 50.6±0.3"),
    (_CIFAR10,  "gvbsm",  "dynamic", "convnet_in",     "46.5±0.7 54.3±0.3"),
    (_CIFAR10,  "infer",  "static",  "convnet_in",     "34.0±0.4 57.0±0.2"),
    (_CIFAR10,  "infer",  "dynamic", "convnet_in",     "30.1±0.8 52.4±0.7"),
    (_CIFAR100, "random", "hard",    "resnet18",    "15.8±0.2 32.0±0.0 47.5±0.0"),
    (_CIFAR100, "sre2l",  "dynamic", "resnet18",    "31.6±0.5 49.5±0.3 -"),
    (_CIFAR100, "gvbsm",  "dynamic", "resnet18",    "59.5±0.4 65.0±0.5 -"),
    (_CIFAR100, "infer",  "static",  "resnet18",    "45.2±0.04 62.8±0.4 66.3±0.1"),
    (_CIFAR100, "infer",  "dynamic", "resnet18",    "53.4±0.6 68.9±0.1 73.3±0.2"),
    (_CIFAR100, "random", "hard",    "convnet_in",     "14.6±0.5 33.4±0.4 42.8±0.3"),
    (_CIFAR100, "gvbsm",  "dynamic", "convnet_in",     "38.7±0.2 45.7±0.4 -"),
    (_CIFAR100, "infer",  "static",  "convnet_in",     "41.0±0.4 53.8±0.2 57.0±0.02"),
    (_CIFAR100, "infer",  "dynamic", "convnet_in",     "37.2±0.3 50.7±0.3 53.4±0.2"),
    (_TINY,     "random", "hard",    "resnet18",    "12.1±0.3 17.7±0.0"),
    (_TINY,     "sre2l",  "dynamic", "resnet18",    "- 41.1±0.4"),
    (_TINY,     "gvbsm",  "dynamic", "resnet18",    "- 47.6±0.3"),
    (_TINY,     "infer",  "static",  "resnet18",    "32.0±0.1 52.9±0.1"),
    (_TINY,     "infer",  "dynamic", "resnet18",    "41.0±0.4 54.6±0.4"),
    (_TINY,     "random", "hard",    "convnet_in",     "5.0±0.2 15.0±0.4"),
    (_TINY,     "infer",  "static",  "convnet_in",     "22.8±0.3 32.3±0.3"),
    (_TINY,     "infer",  "dynamic", "convnet_in",     "24.9±0.3 33.9±0.6"),
    # Table 2; its starred rows are static.
    (_IMAGENET, "random", "hard",    "resnet18",    "10.5±0.4 31.4±0.3"),
    (_IMAGENET, "random", "hard",    "resnet50",    "9.3±0.3 31.5±0.2"),
    (_IMAGENET, "random", "hard",    "resnet101",   "10.0±0.4 33.1±0.1"),
    (_IMAGENET, "sre2l",  "static",  "resnet18",    "9.8±0.1 17.3±0.5"),
    (_IMAGENET, "sre2l",  "static",  "resnet50",    "8.7±0.3 17.2±0.4"),
    (_IMAGENET, "sre2l",  "static",  "resnet101",   "8.8±0.2 15.8±0.2"),
    (_IMAGENET, "gvbsm",  "static",  "resnet18",    "11.9±0.2 32.9±0.1"),
    (_IMAGENET, "gvbsm",  "static",  "resnet50",    "14.5±0.2 38.1±0.2"),
    (_IMAGENET, "gvbsm",  "static",  "resnet101",   "13.9±0.1 38.9±0.4"),
    (_IMAGENET, "infer",  "static",  "resnet18",    "28.7±0.2 51.8±0.2"),
    (_IMAGENET, "infer",  "static",  "resnet50",    "26.9±0.3 53.3±0.3"),
    (_IMAGENET, "infer",  "static",  "resnet101",   "26.5±0.1 52.2±0.3"),
    (_IMAGENET, "sre2l",  "dynamic", "resnet18",    "21.3±0.6 46.8±0.2"),
    (_IMAGENET, "sre2l",  "dynamic", "resnet50",    "28.4±0.1 55.6±0.3"),
    (_IMAGENET, "sre2l",  "dynamic", "resnet101",   "30.9±0.1 60.8±0.5"),
    (_IMAGENET, "gvbsm",  "dynamic", "resnet18",    "31.4±0.5 51.8±0.4"),
    (_IMAGENET, "gvbsm",  "dynamic", "resnet50",    "35.4±0.8 58.7±0.3"),
    (_IMAGENET, "gvbsm",  "dynamic", "resnet101",   "38.2±0.4 61.0±0.4"),
    (_IMAGENET, "infer",  "dynamic", "resnet18",    "36.3±0.3 55.6±0.2"),
    (_IMAGENET, "infer",  "dynamic", "resnet50",    "38.3±0.5 63.4±0.3"),
    (_IMAGENET, "infer",  "dynamic", "resnet101",   "38.9±0.5 60.7±0.1"),
    # Table 4
    (_CIFAR100, "sre2l",  "dynamic", "resnet50",        "22.4±1.3 52.8±0.7 -"),
    (_CIFAR100, "infer",  "static",  "resnet50",        "43.3±0.4 62.4±0.6 -"),
    (_CIFAR100, "infer",  "dynamic", "resnet50",        "52.3±0.4 70.0±0.2 -"),
    (_CIFAR100, "sre2l",  "dynamic", "mobilenet_v2",    "16.1±0.5 43.2±0.2 -"),
    (_CIFAR100, "infer",  "static",  "mobilenet_v2",    "46.7±0.1 64.1±0.2 -"),
    (_CIFAR100, "infer",  "dynamic", "mobilenet_v2",    "43.3±0.7 67.2±0.2 -"),
    (_CIFAR100, "sre2l",  "dynamic", "efficientnet_b0", "11.1±0.3 24.9±1.7 -"),
    (_CIFAR100, "infer",  "static",  "efficientnet_b0", "32.5±0.3 55.0±0.5 -"),
    (_CIFAR100, "infer",  "dynamic", "efficientnet_b0", "34.9±0.8 62.7±0.4 -"),
    (_CIFAR100, "sre2l",  "dynamic", "shufflenet_v2",   "11.8±0.7 27.5±1.1 -"),
    (_CIFAR100, "infer",  "static",  "shufflenet_v2",   "38.7±0.2 61.5±0.2 -"),
    (_CIFAR100, "infer",  "dynamic", "shufflenet_v2",   "30.9±0.5 62.1±0.2 -"),
    # Table 3: fewer teachers' compensators, labelled by all
    (_CIFAR100, f"infer:teachers=[{_R}]",      "static",  "resnet18", "40.9±0.1 59.7±0.2 -"),
    (_CIFAR100, f"infer:teachers=[{_R}]",      "dynamic", "resnet18", "38.1±1.7 65.3±0.2 -"),
    (_CIFAR100, f"infer:teachers=[{_RM}]",     "static",  "resnet18", "43.2±0.2 61.2±0.04 -"),
    (_CIFAR100, f"infer:teachers=[{_RM}]",     "dynamic", "resnet18", "46.2±0.4 67.3±0.1 -"),
    (_CIFAR100, f"infer:teachers=[{_RME}]",    "static",  "resnet18", "44.8±0.5 61.7±0.1 -"),
    (_CIFAR100, f"infer:teachers=[{_RME}]",    "dynamic", "resnet18", "50.6±0.7 68.3±0.2 -"),
    # Table 6: all teachers' compensators, labelled by fewer
    (_CIFAR100, f"infer:labelled_by=[{_R}]",   "static",  "resnet18", "37.6±0.5 57.8±0.1 -"),
    (_CIFAR100, f"infer:labelled_by=[{_R}]",   "dynamic", "resnet18", "46.4±0.2 69.0±0.1 -"),
    (_CIFAR100, f"infer:labelled_by=[{_RM}]",  "static",  "resnet18", "42.7±0.1 61.3±0.3 -"),
    (_CIFAR100, f"infer:labelled_by=[{_RM}]",  "dynamic", "resnet18", "53.2±1.0 70.2±0.3 -"),
    (_CIFAR100, f"infer:labelled_by=[{_RME}]", "static",  "resnet18", "44.1±0.5 61.8±0.2 -"),
    (_CIFAR100, f"infer:labelled_by=[{_RME}]", "dynamic", "resnet18", "53.0±0.6 69.0±0.1 -"),
)
# fmt: on

PublishedCell = tuple[str, int, str, str, str]  # dataset, ipc, method (as a grid names its variant), labels, student


def _read_rows() -> dict[PublishedCell, tuple[float, float]]:
    numbers: dict[PublishedCell, tuple[float, float]] = {}
    for (dataset, columns), method, labels, student, row in _ROWS:
        for ipc, text in zip(columns, row.split(), strict=True):
            if text != "-":
                mean, std = text.split("±")
                numbers[dataset, ipc, method, labels, student] = float(mean), float(std)
    return numbers


# (dataset, ipc, method, labels, student) -> (mean, standard deviation)
PAPER = _read_rows()
