"""A distilled set in timm's own parts: its networks, optimisers, schedules and loss, on views with soft labels.

    python examples/train_with_timm.py DIR [EPOCHS]      # DIR: a set's folder, or "owner/name" on the Hub

timm's training script is in its repository (huggingface/pytorch-image-models), not in its package.
It reads class folders, so hard labels alone. What `stillroom export` writes it takes as it is (REAL: the real images):

    stillroom export DIR folder --to folder
    ln -s REAL/test folder-test
    python train.py --data-dir . --train-split folder --val-split folder-test --model resnet18 --num-classes 10 \
        --img-size 32 --batch-size 64 --opt adamw --lr 1e-3 --sched cosine --epochs 100 --mixup 0.8

timm's Mixup makes soft labels of classes. Ours are soft already, so images are mixed here, and labels with them.
"""

import sys

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader

import stillroom


def train(distilled, network, epochs, batch_size=64, learning_rate=1e-3, mixup=0.8):
    """The network, trained on the set's views; returns it and the mean loss of each epoch."""
    views = distilled.views(temperature=20)
    loader = DataLoader(views, min(batch_size, len(views)), shuffle=True, drop_last=True)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=learning_rate, weight_decay=0.01)
    schedule, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=0)
    loss_function, losses = SoftTargetCrossEntropy(), []
    network.train()
    for epoch in range(epochs):
        total = 0.0
        for images, soft_labels in loader:
            share = torch.distributions.Beta(mixup, mixup).sample()
            images = share * images + (1 - share) * images.flip(0)
            soft_labels = share * soft_labels + (1 - share) * soft_labels.flip(0)
            loss = loss_function(network(images), soft_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        schedule.step(epoch + 1)
        losses.append(total / len(loader))
    return network, losses


if __name__ == "__main__":
    distilled = stillroom.load(sys.argv[1])
    network = timm.create_model("resnet18", num_classes=len(distilled.manifest.class_names))
    network, losses = train(distilled, network, int(sys.argv[2]) if len(sys.argv) > 2 else 100)
    print(f"loss: {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last")
    torch.save(network.state_dict(), "student.pt")
