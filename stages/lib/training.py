"""Part 2 of the lesson: training the CNN, one epoch after the other."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from lib.inference import loss_and_accuracy, predict, to_device, to_input

REFRESH = 50  # steps between two readings of loss and accuracy for the progress bar


def train_cnn(
    model: nn.Module,
    pool: np.ndarray,
    labels: np.ndarray,
    train_index: np.ndarray,
    val_index: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[dict, float], None],
) -> list[dict]:
    """Train `model` in place with Adam and cross-entropy; return one row of metrics an epoch.

    `pool` (V, N, 28, 28) uint8 holds V variants of each of N images, the original first; `labels`
    (N,) uint8. An epoch takes each image of `train_index` once, in a fresh order, as one of its
    variants, uniformly. Validation reads the originals of `val_index`. `on_epoch` is called with
    each row and its images per second. Everything random comes from (seed, epoch).
    """
    # The whole set stays on the device as uint8, a quarter of its size as float32; a step cuts
    # its batch from there, where the lesson's Dataset fetches image by image (55 to 36 ms a step).
    images = torch.from_numpy(pool).to(device)  # (V, N, 28, 28)
    targets = torch.from_numpy(labels).to(device, torch.int64)  # (N,)
    to_device(model, device)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=learning_rate, fused=True
    )  # one pass over all weights
    rows = []
    with tqdm(total=epochs * len(train_index), unit=" images", disable=None) as bar:
        for epoch in range(1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}")
            began = time.perf_counter()
            rng = np.random.default_rng([seed, epoch])
            order = rng.permutation(train_index)
            variants = rng.integers(len(pool), size=len(order))
            batches = _batches(order, variants, batch_size, device)
            row = {"epoch": epoch, **_train_epoch(model, optimizer, images, targets, batches, bar)}
            speed = len(order) / (time.perf_counter() - began)
            val_logits = predict(model, pool[0, val_index], device)
            row["val_loss"], row["val_accuracy"] = loss_and_accuracy(val_logits, labels[val_index])
            rows.append(row)
            tqdm.write(_describe(row, epochs, speed))
            on_epoch(row, speed)
    return rows


def _batches(order: np.ndarray, variants: np.ndarray, batch_size: int, device: torch.device):
    """Pairs (variant, image) of index tensors, each (batch_size,); the last may be shorter."""
    return zip(
        torch.from_numpy(variants).to(device).split(batch_size),
        torch.from_numpy(order).to(device).split(batch_size),
        strict=True,
    )


def _train_epoch(model, optimizer, images, targets, batches, bar) -> dict:
    """One pass; loss and accuracy are those of each batch before its own step, as in the lesson."""
    model.train()
    loss_sum = torch.zeros((), device=images.device)
    correct = torch.zeros((), device=images.device, dtype=torch.int64)
    seen = 0
    for step, (variant, index) in enumerate(batches, start=1):
        label = targets[index]  # (B,)
        logits = model(to_input(images[variant, index]))  # (B, 10)
        loss = F.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Sums stay on the device, and accuracy reuses the logits: the lesson runs a second forward.
        loss_sum += loss.detach() * len(index)
        correct += (logits.detach().argmax(1) == label).sum()
        seen += len(index)
        bar.update(len(index))
        if step % REFRESH == 0 and not bar.disable:
            bar.set_postfix(loss=f"{loss_sum.item() / seen:.4f}", accuracy=f"{correct.item() / seen:.2%}")
    return {"train_loss": loss_sum.item() / seen, "train_accuracy": correct.item() / seen}


def _describe(row: dict, epochs: int, speed: float) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f}, "
        f"accuracy {row['train_accuracy']:.2%}; val loss {row['val_loss']:.4f}, "
        f"accuracy {row['val_accuracy']:.2%}; {speed:,.0f} images/s"
    )
