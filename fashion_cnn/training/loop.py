"""Part 2 of the lesson: training the CNN, epoch by epoch.

fashion_cnn/lesson/plain_loop.py is the same training without these additions: images that stay on the GPU,
if there is one, as uint8, so that no step copies them; sums of loss and hits that are read once an epoch,
because each read stalls a GPU; a checkpoint after each epoch; flips, shifts, pruning and a schedule
for the recipes; a CUDA graph of the step.
"""

import math
import time
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from fashion_cnn.models.cnns import to_input
from fashion_cnn.models.inference import loss_and_accuracy, predict, to_device
from fashion_cnn.project.files import round_floats
from fashion_cnn.training.batches import COUNT, INDEX, cut, draw_epoch, halve_easy, length
from fashion_cnn.training.checkpoints import Checkpoint
from fashion_cnn.training.cuda_graph import GraphedStep
from fashion_cnn.training.optimizer import build_optimizer, scheduled, set_rate
from fashion_cnn.training.train_data import TrainData

if TYPE_CHECKING:
    from fashion_cnn.schema import TrainCnn

REFRESH = 50  # steps between two reads of loss and accuracy for the progress bar


def train_cnn(
    model: nn.Module,
    data: TrainData,
    params: "TrainCnn",
    device: torch.device,
    checkpoint: Checkpoint,
    on_epoch: Callable[[dict, float], None],
) -> list[dict]:
    """Train `model` in place according to `params`; return one row of metrics per epoch.

    An epoch takes the images of `data.train` that draw_epoch and halve_easy choose. Validation reads the
    originals of `data.val`. `on_epoch` is called with each row and its images per second. Everything random
    comes from (params.seed, epoch), so a training that resumes from `checkpoint` ends with the same weights.
    """
    images = torch.from_numpy(data.pool).to(device)  # (V, N, 28, 28)
    targets = torch.from_numpy(data.labels).to(device, torch.int64)  # (N,)
    to_device(model, device)
    optimizer = build_optimizer(model, params, device)
    step = TrainStep(model, optimizer, images, targets, params)
    run_step = GraphedStep(step, params.batch_size, device) if device.type == "cuda" else step
    rows = checkpoint.load(model, optimizer, step.losses)
    epochs = params.epochs
    lengths = [length(len(data.train), params, epoch) for epoch in range(1, epochs + 1)]
    # Steps done before the first epoch, and at the end of each.
    steps = [0, *accumulate(math.ceil(taken / params.batch_size) for taken in lengths)]
    with tqdm(total=sum(lengths), initial=sum(lengths[: len(rows)]), unit=" images", disable=None) as bar:
        for epoch in range(len(rows) + 1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}")
            began = time.perf_counter()
            takes = draw_epoch(data.train, len(data.pool), params, epoch)
            takes = halve_easy(takes, step.losses.cpu().numpy(), params, epoch)
            batches = torch.from_numpy(takes).to(device).split(params.batch_size)
            done = range(steps[epoch - 1], steps[epoch])
            rates = [scheduled(params, before, steps[-1]) for before in done]
            train_loss, train_accuracy = train_epoch(step, run_step, batches, rates, bar)
            speed = len(takes) / (time.perf_counter() - began)
            logits = predict(model, data.pool[0, data.val], device)
            val_loss, val_accuracy = loss_and_accuracy(logits, data.labels[data.val])
            metrics = {
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
            }
            # Round here, so that a value is the same wherever it is shown.
            row = {"epoch": epoch, **{name: round_floats(value) for name, value in metrics.items()}}
            rows.append(row)
            checkpoint.save(model, optimizer, step.losses, rows)
            tqdm.write(_describe(row, epochs, speed))
            on_epoch(row, speed)
    return rows


class TrainStep:
    """One step on a batch; sums loss and hits on the device, so that no step waits for a read.

    `losses` (N,) holds the last loss of each image if `params.prune_easy` is not 0.
    """

    def __init__(self, model, optimizer, images: torch.Tensor, targets: torch.Tensor, params: "TrainCnn"):
        self.model, self.optimizer, self.images, self.targets = model, optimizer, images, targets
        self.label_smoothing, self.moved = params.label_smoothing, bool(params.flips or params.shift)
        self.prunes = params.prune_easy
        self.losses = torch.zeros(len(targets), device=images.device)
        self.loss_sum = torch.zeros((), device=images.device)
        self.correct = torch.zeros((), device=images.device, dtype=torch.int64)
        self.seen = torch.zeros((), device=images.device, dtype=torch.int64)

    def __call__(self, takes: torch.Tensor) -> None:
        """Update the weights with the images of `takes` (B, 6)."""
        index, count = takes[:, INDEX], takes[:, COUNT]
        counted = count.sum()
        label = self.targets[index]  # (B,)
        logits = self.model(to_input(cut(self.images, takes, self.moved)))  # (B, 10)
        if self.prunes:
            each = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing, reduction="none")
            self.losses.scatter_(0, index, each.detach())
            loss = (each * count).sum() / counted
        else:  # a branch of its own: the one above sums in another order, which changes the last digits
            loss = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # Loss and hits of the batch before this step. Accuracy reuses the logits; the lesson runs a second
        # forward pass (11 ms of its 35 ms step).
        self.loss_sum += loss.detach() * counted
        self.correct += ((logits.detach().argmax(1) == label) * count).sum()
        self.seen += counted

    def reset(self) -> None:
        """Reset the sums to 0."""
        for total in (self.loss_sum, self.correct, self.seen):
            total.zero_()

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy since the last reset, each image weighted by its count."""
        seen = self.seen.item()
        return self.loss_sum.item() / seen, self.correct.item() / seen


def train_epoch(step, run_step, batches, rates, bar) -> tuple[float, float]:
    """Train one epoch on `batches`, takes (B, 6) each, at the learning rates `rates`.

    The last batch may be smaller. Returns mean loss and accuracy.
    """
    step.model.train()
    step.reset()
    for number, (takes, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        set_rate(step.optimizer, rate)
        run_step(takes)
        bar.update(len(takes))
        # CPU only: reading the means would stall a GPU.
        if number % REFRESH == 0 and not bar.disable and step.images.device.type == "cpu":
            loss, accuracy = step.means()
            bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.2%}")
    return step.means()


def _describe(row: dict, epochs: int, speed: float) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f}, "
        f"accuracy {row['train_accuracy']:.2%}; val loss {row['val_loss']:.4f}, "
        f"accuracy {row['val_accuracy']:.2%}; {speed:,.0f} images/s"
    )
