"""Evaluation on the test split: unmodified, shifted and rotated images, confusions and mistakes."""

import numpy as np
import torch
from torch import nn
from torchvision.transforms import InterpolationMode, functional
from tqdm import tqdm

from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.models.inference import loss_and_accuracy, predict
from fashion_cnn.project.files import pixels_to_text

SHIFTS = range(-5, 6)  # pixels; positive is right and down
ANGLES = range(-30, 31, 5)  # degrees; positive is counterclockwise


def per_class(labels: np.ndarray, predictions: np.ndarray) -> list[dict]:
    """Precision and recall of each class; precision is 0 for a class that is never predicted."""
    rows = []
    for number, name in enumerate(CLASSES):
        actual, predicted = labels == number, predictions == number
        hits = int((actual & predicted).sum())
        precision, recall = hits / max(int(predicted.sum()), 1), hits / max(int(actual.sum()), 1)
        rows.append({"class": name, "precision": precision, "recall": recall, "n": int(actual.sum())})
    return rows


def confusion(labels: np.ndarray, predictions: np.ndarray) -> list[dict]:
    """One row per image: `dvc plots` counts the rows for its confusion template."""
    return [
        {"actual": CLASSES[label], "predicted": CLASSES[prediction]}
        for label, prediction in zip(labels, predictions, strict=True)
    ]


def mistakes(images: np.ndarray, labels: np.ndarray, logits: torch.Tensor, count: int) -> dict[str, list]:
    """The wrong predictions, the most confident first.

    `surest`: the first `count`. `of_each_kind`: the first for each pair of label and prediction.
    """
    confidences, predictions = logits.softmax(1).max(1)
    wrong = np.flatnonzero(predictions.numpy() != labels)
    order = wrong[np.argsort(-confidences.numpy()[wrong], kind="stable")]
    rows = [
        {
            "image": int(index),
            "label": CLASSES[labels[index]],
            "prediction": CLASSES[predictions[index]],
            "confidence": confidences[index].item(),
            "pixels": pixels_to_text(images[index]),
        }
        for index in order
    ]
    kinds: dict[tuple, dict] = {}
    for row in rows:
        kinds.setdefault((row["label"], row["prediction"]), row)
    return {"surest": rows[:count], "of_each_kind": list(kinds.values())}


def robustness(model: nn.Module, images: np.ndarray, labels: np.ndarray, device: torch.device) -> dict:
    """Accuracy on `images` (N, 28, 28) uint8 when shifted along either axis, and when rotated.

    Two tables, because pixels and degrees share no axis. Columns other than `n` differ, because
    `dvc plots` joins a file's tables by row.
    """

    n, moves = len(labels), 2 * len(SHIFTS) + len(ANGLES)
    with tqdm(total=moves, desc="shifts and rotations", disable=None) as bar:

        def accuracy(transform: str, amount: int) -> float:
            found = loss_and_accuracy(predict(model, move(images, transform, amount), device), labels)[1]
            bar.update()
            return found

        shifts = [
            {"pixels": by, "shift_x": accuracy("shift_x", by), "shift_y": accuracy("shift_y", by), "n": n}
            for by in SHIFTS
        ]
        rotations = [{"degrees": by, "rotation": accuracy("rotation", by), "n": n} for by in ANGLES]
    return {"shifts": shifts, "rotations": rotations}


def move(images: np.ndarray, transform: str, amount: int) -> np.ndarray:
    """Move `images` (N, 28, 28) uint8 by "shift_x" or "shift_y" (pixels) or "rotation" (degrees).

    Uncovered pixels are black; rotation interpolates bilinearly.
    """
    tensor = torch.from_numpy(images)
    if transform == "rotation":
        return functional.rotate(tensor, amount, InterpolationMode.BILINEAR).numpy()
    translate = [amount, 0] if transform == "shift_x" else [0, amount]
    return functional.affine(tensor, 0, translate, scale=1, shear=[0]).numpy()


def mean_accuracy(rows: list[dict], amount: str, distance: int, *columns: str) -> float:
    """Mean of `columns` over the rows of `robustness` whose `amount` is ±distance."""
    return float(np.mean([row[name] for row in rows for name in columns if abs(row[amount]) == distance]))
