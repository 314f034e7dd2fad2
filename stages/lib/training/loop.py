"""Part 2 of the lesson: training the CNN, one epoch after the other."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from lib.inference import loss_and_accuracy, predict, to_device
from lib.models.cnns import to_input
from lib.stage.files import round_floats
from lib.training.checkpoints import Checkpoint
from lib.training.cuda_graph import GraphedStep
from lib.training.data import TrainData

if TYPE_CHECKING:
    from params_schema import TrainCnn

REFRESH = 50  # steps between two readings of loss and accuracy for the progress bar


def train_cnn(
    model: nn.Module,
    data: TrainData,
    params: "TrainCnn",
    device: torch.device,
    checkpoint: Checkpoint,
    on_epoch: Callable[[dict, float], None],
) -> list[dict]:
    """Train `model` in place with Adam and cross-entropy; return one row of metrics an epoch.

    `params` has epochs, batch_size, learning_rate and seed. An epoch takes each image of `data.train`
    once, in a fresh order, as one of its variants, uniformly. Validation reads the originals of
    `data.val`. `on_epoch` is called with each row and its images per second. Everything random comes
    from (params.seed, epoch), so a training that resumes from `checkpoint` ends in the same weights.
    """
    # The whole set stays on the device as uint8, a quarter of its size as float32; a step cuts its
    # batch from there, where the lesson's Dataset fetches image by image (0.4 ms of its 35 ms step).
    images = torch.from_numpy(data.pool).to(device)  # (V, N, 28, 28)
    targets = torch.from_numpy(data.labels).to(device, torch.int64)  # (N,)
    to_device(model, device)
    on_cuda = device.type == "cuda"
    # fused: one pass over all weights instead of several for each.
    optimizer = torch.optim.Adam(model.parameters(), lr=params.learning_rate, fused=True, capturable=on_cuda)
    step = TrainStep(model, optimizer, images, targets)
    run_step = GraphedStep(step, params.batch_size, device) if on_cuda else step
    rows = checkpoint.load(model, optimizer)
    n, epochs = len(data.train), params.epochs
    with tqdm(total=epochs * n, initial=len(rows) * n, unit=" images", disable=None) as bar:
        for epoch in range(len(rows) + 1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}")
            began = time.perf_counter()
            rng = np.random.default_rng([params.seed, epoch])
            order = rng.permutation(data.train)
            variants = rng.integers(len(data.pool), size=n)
            train_loss, train_accuracy = train_epoch(step, run_step, order, variants, params.batch_size, bar)
            speed = n / (time.perf_counter() - began)
            logits = predict(model, data.pool[0, data.val], device)
            val_loss, val_accuracy = loss_and_accuracy(logits, data.labels[data.val])
            metrics = {
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
            }
            # Rounded here, so that every place that shows a value shows the same one.
            row = {"epoch": epoch, **{name: round_floats(value) for name, value in metrics.items()}}
            rows.append(row)
            checkpoint.save(model, optimizer, rows)
            tqdm.write(_describe(row, epochs, speed))
            on_epoch(row, speed)
    return rows


class TrainStep:
    """One step on a batch; sums loss and hits on the device, where reading them costs no wait."""

    def __init__(self, model: nn.Module, optimizer, images: torch.Tensor, targets: torch.Tensor):
        self.model, self.optimizer, self.images, self.targets = model, optimizer, images, targets
        self.loss_sum = torch.zeros((), device=images.device)
        self.correct = torch.zeros((), device=images.device, dtype=torch.int64)

    def __call__(self, variant: torch.Tensor, index: torch.Tensor) -> None:
        """Update the weights with the images `index` (B,), each in its variant `variant` (B,)."""
        label = self.targets[index]  # (B,)
        logits = self.model(to_input(self.images[variant, index]))  # (B, 10)
        loss = F.cross_entropy(logits, label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # Those of the batch before its own step. Accuracy reuses the logits: the lesson runs a second
        # forward pass (11 ms of its 35 ms step).
        self.loss_sum += loss.detach() * len(index)
        self.correct += (logits.detach().argmax(1) == label).sum()


def train_epoch(step, run_step, order, variants, batch_size, bar) -> tuple[float, float]:
    """One pass over the images `order` in their `variants`; mean loss, and accuracy."""
    step.model.train()
    step.loss_sum.zero_()
    step.correct.zero_()
    device = step.images.device
    batches = zip(
        torch.from_numpy(variants).to(device).split(batch_size),
        torch.from_numpy(order).to(device).split(batch_size),  # the last may be shorter
        strict=True,
    )
    seen = 0
    for number, (variant, index) in enumerate(batches, start=1):
        run_step(variant, index)
        seen += len(index)
        bar.update(len(index))
        # Not on a GPU, which this would make wait for.
        if number % REFRESH == 0 and not bar.disable and device.type == "cpu":
            loss, accuracy = step.loss_sum.item() / seen, step.correct.item() / seen
            bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.2%}")
    return step.loss_sum.item() / seen, step.correct.item() / seen


def _describe(row: dict, epochs: int, speed: float) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f}, "
        f"accuracy {row['train_accuracy']:.2%}; val loss {row['val_loss']:.4f}, "
        f"accuracy {row['val_accuracy']:.2%}; {speed:,.0f} images/s"
    )
