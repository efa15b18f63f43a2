"""Protocols: how students are trained, by name, so that numbers of different sets can be compared.

stillroom run infer-cifar100-ipc10 --protocol unified
stillroom evaluate runs/mine --protocol paper --student.train.epochs 200      any setting still changes

A result bears a protocol's name only if its students' settings are the protocol's; one that changed any is "own".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stillroom.errors import StillroomError
from stillroom.manifest import LabelKind
from stillroom.students import CIFAR_STUDENT, StudentConfig
from stillroom.train import TrainConfig

ProtocolName = Literal["paper", "unified", "laptop"]
Family = Literal["cifar", "tiny", "imagenet"]  # of datasets, by the size of their images


@dataclass(frozen=True)
class Protocol:
    """Students by family of datasets, the kinds of label that they are trained with, and the networks that label them.

    teachers: () for those that the set was made with.
    """

    students: dict[Family, StudentConfig]
    labels: tuple[LabelKind, ...]
    teachers: tuple[str, ...] = ()


# Table 5 of INFER's paper. Confessed: it says "weight decay 0.9" for Tiny-ImageNet; read as momentum 0.9 with the usual
# decay of 1e-4.
_TINY_TRAIN = TrainConfig(
    epochs=200, batch_size=64, optimizer="sgd", learning_rate=0.2, momentum=0.9, weight_decay=1e-4,
    crop_padding=0, resized_crop=True, mixup_beta=0.8,
)  # fmt: skip
_IMAGENET_TRAIN = replace(CIFAR_STUDENT, epochs=300, batch_size=32, crop_padding=0, resized_crop=True)

# RD3 (Zhong et al., ICLR 2026, arXiv 2509.19743): 400 epochs, batch 50, Adam 1e-3 by a cosine, CutMix, resized crop and
# flip as RDED has them, one ResNet-18 as the teacher, KL. Confessed: the temperature 20 and the crop's share of the
# area from 0.5 are those of RDED's scripts (DD-Ranking keeps its 20 too); no weight decay is stated, so there is none;
# RD3 ends the cosine of students other than ResNet-18 half way down, which is left out (--student.train.cosine-slowdown
# 2 has it), and RDED's shuffling of patches too, since it undoes a collage that only its own images are.
_UNIFIED_TRAIN = TrainConfig(
    epochs=400, batch_size=50, optimizer="adam", learning_rate=1e-3, weight_decay=0.0,
    crop_padding=0, resized_crop=True, resized_crop_scale=(0.5, 1.0), cutmix_beta=1.0,
)  # fmt: skip
_UNIFIED = StudentConfig("resnet18", _UNIFIED_TRAIN, dynamic_epochs=400, temperature=20.0)

# In 2,800 steps instead of 28,000 the paper's rate of 1e-3 leaves students half trained: on held-out training images
# 28.0 % against 31.1 % at 4e-3 and 29.2 % at 1e-2 (1,260 steps, convnet_thin).
_LAPTOP = StudentConfig("convnet_thin", replace(CIFAR_STUDENT, epochs=50, learning_rate=4e-3), dynamic_epochs=25)

PROTOCOLS: dict[ProtocolName, Protocol] = {
    "paper": Protocol(
        {
            "cifar": StudentConfig("resnet18", CIFAR_STUDENT, 80),
            "tiny": StudentConfig("resnet18", _TINY_TRAIN, 50),
            "imagenet": StudentConfig("resnet18", _IMAGENET_TRAIN, 75),
        },
        labels=("static", "dynamic"),
    ),
    "unified": Protocol(
        {"cifar": _UNIFIED, "tiny": _UNIFIED, "imagenet": _UNIFIED}, labels=("dynamic",), teachers=("resnet18",)
    ),
    "laptop": Protocol({"cifar": _LAPTOP, "tiny": _LAPTOP, "imagenet": _LAPTOP}, labels=("static", "dynamic")),
}


def family_of(image_size: int) -> Family:
    """Return the family of datasets whose images have this side in pixels: up to 32, up to 64, or larger."""
    return "cifar" if image_size <= 32 else "tiny" if image_size <= 64 else "imagenet"


def protocol_student(name: ProtocolName, image_size: int | None) -> StudentConfig:
    """Return the students of the protocol; raises StillroomError where they differ by an unknown `image_size`."""
    students = PROTOCOLS[name].students
    if image_size is None and len(set(students.values())) > 1:
        raise StillroomError(
            f"the protocol {name!r} differs by the size of images, which is not known before they are read; give "
            "--data.image-size"
        )
    return students[family_of(image_size or 1)]


def name_protocol(student: StudentConfig, image_size: int, labels: Sequence[str], labellers: Sequence[str]) -> str:
    """Return the protocol that this is, whatever the student's network and its curve; "own" where it is none.

    labels: the kinds of label that students are trained with; labellers: the networks that label.
    """
    for name, protocol in PROTOCOLS.items():
        its = protocol.students[family_of(image_size)]
        if (
            replace(its, network=student.network, measure_every_epochs=student.measure_every_epochs) == student
            # Hard labels are the controls', replayed ones dynamic labels that are stored.
            and {"dynamic" if kind == "replayed" else kind for kind in labels} <= {"hard", *protocol.labels}
            and (not protocol.teachers or set(labellers) == set(protocol.teachers) or set(labels) == {"hard"})
        ):
            return name
    return "own"
