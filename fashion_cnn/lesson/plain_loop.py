"""Part 2 of the lesson in plain steps: forward, loss, backward, step, accuracy.

Usage: python -m fashion_cnn.lesson.plain_loop original|augmented, after `make repro`. It trains with the
split, seed, epochs, batch_size and learning_rate of params.yaml, prints each epoch, and writes nothing. With
the committed params it prints the numbers of the stage train_cnn, up to rounding errors that grow with the
number of steps. The stage uses fashion_cnn/training/loop.py, whose docstring lists what it adds.
"""

from fashion_cnn.project.catalog import named_cnn
from fashion_cnn.project.params import load_params
from fashion_cnn.project.process import run_stage, start

if __name__ == "__main__":
    start(named_cnn, load_params)  # before the slow imports, which read the environment

import numpy as np
import torch
from torch.nn import functional as F

from fashion_cnn.models.cnns import build_cnn, fresh, to_input
from fashion_cnn.models.device import prepare_torch
from fashion_cnn.models.inference import loss_and_accuracy, predict
from fashion_cnn.schema import Params
from fashion_cnn.training.train_data import load_train_data


def train(images: str, params: Params) -> list[dict]:
    """Train on "original" or "augmented" images; return one row of metrics per epoch."""
    device = prepare_torch("cpu")
    split, how, rows = params.split, params.train_cnn, []
    data = load_train_data(images, split.val_size, split.train_size, split.seed)
    pool = torch.from_numpy(data.pool)  # (V, N, 28, 28) uint8: the images, and their copies if there are any
    labels = torch.from_numpy(data.labels).long()  # (N,)
    model = fresh(build_cnn, how.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=how.learning_rate)
    for epoch in range(1, how.epochs + 1):
        rng = np.random.default_rng([how.seed, epoch])
        order = torch.from_numpy(rng.permutation(data.train))
        variants = torch.from_numpy(rng.integers(len(pool), size=len(order)))
        loss_sum, correct = 0.0, 0
        model.train()
        for index, variant in zip(order.split(how.batch_size), variants.split(how.batch_size), strict=True):
            logits = model(to_input(pool[variant, index]))  # (B, 10)
            loss = F.cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(index)
            correct += (logits.argmax(1) == labels[index]).sum().item()
        logits = predict(model, data.pool[0, data.val], device)
        row = {
            "epoch": epoch,
            "train_loss": loss_sum / len(order),
            "train_accuracy": correct / len(order),
            "val_accuracy": loss_and_accuracy(logits, data.labels[data.val])[1],
        }
        print(", ".join(f"{name} {value:.6g}" for name, value in row.items()))
        rows.append(row)
    return rows


def main() -> None:
    """Train on the images that the command line names."""
    train(named_cnn().images, load_params())


if __name__ == "__main__":
    run_stage(main)
