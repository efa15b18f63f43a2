"""A distilled set in Lightning's Trainer: views in a plain DataLoader, soft labels mixed by torchvision's MixUp.

    python examples/train_with_lightning.py DIR [EPOCHS]      # DIR: a set's folder, or "owner/name" on the Hub

The student is timm's ResNet-18; `train` takes any network with as many outputs as the set has classes.
"""

import sys

import lightning
import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

import stillroom


class Student(lightning.LightningModule):
    """A network trained on soft labels: cross-entropy takes probabilities where it takes classes."""

    def __init__(self, network, steps, learning_rate=1e-3):
        super().__init__()
        self.network, self.steps, self.learning_rate = network, steps, learning_rate

    def training_step(self, batch, index):
        images, soft_labels = batch
        return cross_entropy(self.network(images), soft_labels)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def mix(examples):
    """A DataLoader's collate_fn: a batch of (image, soft label), mixed in the same shares by torchvision's MixUp."""
    return v2.MixUp(alpha=0.8)(*default_collate(examples))


def train(distilled, network, epochs, batch_size=64, **trainer):
    """The network, trained on the set's views; `trainer`: settings of Lightning's Trainer."""
    crop = v2.RandomCrop(distilled.manifest.image_size, padding=4)
    views = distilled.views(transform=crop, temperature=20)
    loader = DataLoader(views, min(batch_size, len(views)), shuffle=True, drop_last=True, collate_fn=mix)
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, **trainer)
    trainer.fit(Student(network, epochs * len(loader)), loader)
    return network


if __name__ == "__main__":
    distilled = stillroom.load(sys.argv[1])
    network = timm.create_model("resnet18", num_classes=len(distilled.manifest.class_names))
    network = train(distilled, network, int(sys.argv[2]) if len(sys.argv) > 2 else 100)
    torch.save(network.state_dict(), "student.pt")
