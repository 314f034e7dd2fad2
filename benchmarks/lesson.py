"""The lesson's loops as the lesson has them, against which the project is measured.

Per-item Dataset, DataLoader, default Adam, and a second forward pass for the accuracy of each batch.
"""

import sys
import time

import numpy as np
import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset, TensorDataset


class FashionDataset(Dataset):
    """All images as float32 at once, returned one by one."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images = (images.float() / 255).view(-1, 1, 28, 28)
        self.labels = labels

    def __getitem__(self, index):
        return self.images[index], self.labels[index]

    def __len__(self):
        return len(self.images)


def loader(images: np.ndarray, labels: np.ndarray, batch_size: int = 32) -> DataLoader:
    """Shuffled batches of (N, 28, 28) uint8 `images` with their `labels`."""
    dataset = FashionDataset(torch.from_numpy(images), torch.from_numpy(labels).long())
    return DataLoader(dataset, batch_size=batch_size, shuffle=True)


def train_batch(images, labels, model, optimizer, loss_function) -> float:
    """One step; returns its loss."""
    loss = loss_function(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def accuracy(images, labels, model) -> list[bool]:
    """Which images of a batch the model now gets right, by a second forward pass."""
    model.eval()
    return (model(images).max(-1)[1] == labels).cpu().numpy().tolist()


def train(model: nn.Module, batches, steps: int | None = None, optimizer=None) -> tuple[float, float]:
    """One epoch, or its first `steps` steps; returns mean loss and accuracy."""
    optimizer, loss_function = optimizer or Adam(model.parameters(), lr=1e-3), nn.CrossEntropyLoss()
    losses, hits = [], []
    for number, (images, labels) in enumerate(batches, start=1):
        losses.append(train_batch(images, labels, model, optimizer, loss_function))
        hits.extend(accuracy(images, labels, model))
        if number == steps:
            break
    return float(np.mean(losses)), float(np.mean(hits))


def train_toy(model: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int) -> list[float]:
    """The toy's epochs through a DataLoader, one image a batch; returns the loss of each epoch."""
    batches = DataLoader(TensorDataset(torch.from_numpy(images), torch.from_numpy(labels)))
    optimizer, loss_function = Adam(model.parameters(), lr=1e-2), nn.BCELoss()
    losses = []
    for _ in range(epochs):
        epoch_losses = []
        for image, label in batches:
            model.train()
            loss = loss_function(model(image).flatten(), label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            epoch_losses.append(loss.item())
        losses.append(float(np.mean(epoch_losses)))
    return losses


def main(seed: int, steps: int | None = None) -> None:
    """Train the CNN for five epochs in the current folder, and print how many seconds they took.

    The weights are written where train_cnn would put them, for evaluate_cnn. With `steps`, the seconds of
    five epochs are estimated from that many steps, at most an epoch's, and no weights are written.
    """
    from fashion_cnn.models.cnns import build_cnn, fresh, save_weights
    from fashion_cnn.project.catalog import CNNS
    from fashion_cnn.project.params import load_params
    from fashion_cnn.training.train_data import load_train_data

    split = load_params().split
    data = load_train_data("original", split.val_size, split.train_size, split.seed)
    model = fresh(build_cnn, seed)
    batches = loader(data.pool[0, data.train], data.labels[data.train])
    optimizer = Adam(model.parameters(), lr=1e-3)
    torch.set_num_threads(2)
    if steps:
        train(fresh(build_cnn, seed), batches, steps=20)  # one-time work: first allocations
        steps = min(steps, len(batches))
        began = time.perf_counter()
        train(model, batches, steps, optimizer)
        print((time.perf_counter() - began) / steps * 5 * len(batches))
        return
    began = time.perf_counter()
    for _ in range(5):
        train(model, batches, optimizer=optimizer)
    seconds = time.perf_counter() - began
    save_weights(model, CNNS["original"].weights)
    print(seconds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
