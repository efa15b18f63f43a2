"""Sets in other people's training loops: a plain DataLoader, torchvision's transforms, Lightning's Trainer, timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conftest import Finished
from test_foreign import load_example
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

import stillroom
from stillroom.distilled import DistilledSet, find_set, load_distilled
from stillroom.export import export_set

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries that import others warn of much


@pytest.fixture(scope="module")
def digits() -> DistilledSet:
    """Six random digits of each class, with soft labels that are right and not sure."""
    plain = stillroom.distill("random", stillroom.load_real("digits"), [], ipc=6, labels="hard")
    sure = torch.nn.functional.one_hot(plain.labels, 10) * 4.0
    return plain.with_labels(sure + torch.rand(sure.shape, generator=torch.Generator().manual_seed(0)))


def test_soft_labels_survive_a_plain_data_loader_with_torchvisions_mixup(finished: Finished) -> None:
    made = load_distilled(find_set(finished.directory))
    transform = v2.Compose([v2.RandomCrop(8, padding=1), v2.RandomHorizontalFlip()])
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def collate(examples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        batches.append(tuple(default_collate(examples)))
        return v2.MixUp(alpha=0.8)(*batches[-1])

    loader = DataLoader(made.views(transform=transform, temperature=4), batch_size=8, collate_fn=collate)
    mixed = list(loader)
    assert sum(map(len, (images for images, _ in mixed))) == made.view_count
    expected = (made.soft_labels.float() / 4).softmax(1)
    assert torch.allclose(torch.cat([labels for _, labels in batches]), expected)
    for (images, labels), (plain_images, plain_labels) in zip(mixed, batches, strict=True):
        assert labels.dtype == torch.float32
        assert torch.allclose(labels.sum(1), torch.ones(len(labels)))
        # One share, of each image and its neighbour: it is found from the images, and must be that of the labels.
        other = plain_images.roll(1, 0)
        share = ((images - other) * (plain_images - other)).sum() / (plain_images - other).square().sum()
        assert torch.allclose(labels, share * plain_labels + (1 - share) * plain_labels.roll(1, 0), atol=1e-5)


def test_lightnings_trainer_learns_from_a_set(digits: DistilledSet) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    example = load_example("train_with_lightning")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    example.train(
        digits, network, epochs=2, batch_size=20, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    assert any(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
    assert network.eval()(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_timms_parts_learn_from_a_set(digits: DistilledSet) -> None:
    example = load_example("train_with_timm")
    torch.manual_seed(0)
    _, losses = example.train(digits, timm.create_model("test_resnet", num_classes=10), epochs=6, batch_size=20)
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_timms_script_reads_the_exported_folder(finished: Finished, tmp_path: Path) -> None:
    """By the reader that its --data-dir and --train-split go to, as the example's docstring has them."""
    made = load_distilled(find_set(finished.directory))
    export_set(made, "folder", tmp_path / "folder")
    read = timm.data.create_dataset("", root=str(tmp_path), split="folder")
    assert len(read) == made.view_count
    assert sorted({label for _, label in read}) == [0, 1, 2, 3]
