"""The page's content, as one JSON-serializable value."""

import base64
import math
from collections import Counter

import numpy as np
from torch import nn

from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.lesson import results
from fashion_cnn.lesson.results import INTEGER, NUMBER, read_rows, read_table
from fashion_cnn.lesson.toy import PARAMETERS
from fashion_cnn.models.cnns import build_toy_cnn, load_cnn, load_weights
from fashion_cnn.models.residual import Residual
from fashion_cnn.project.catalog import TOY, TOY_HISTORY, Training

PER_CLASS = 3  # val images
POINTS = 500  # at most in a curve; a longer one is thinned
TOY_MOMENT = {"epoch": INTEGER} | dict.fromkeys(PARAMETERS, NUMBER)


def toy(images: np.ndarray, labels: np.ndarray, learning_rate: float) -> dict:
    """Part 1: both images (2, 1, 4, 4), the trained model, and the history of its parameters and its loss."""
    model = load_weights(build_toy_cnn(), TOY.weights)
    moments = read_table(TOY_HISTORY, TOY_MOMENT)
    return {
        "images": [plain(image) for image in images],
        "labels": labels.tolist(),
        "learning_rate": learning_rate,
        "layers": layers(model, plain),
        "moments": [[row[name] for name in ("epoch", *PARAMETERS)] for row in moments],
        "curve": curve(read_table(TOY.curve, results.TOY_CURVE)),
    }


def cnn(training: Training) -> dict:
    """Parts 2 and 3: a CNN's weights, and the results of its training and its evaluation."""
    confusion = read_table(training.confusion, results.CONFUSION)
    counts = Counter((row["actual"], row["predicted"]) for row in confusion)
    model = load_cnn(training.weights)
    return {
        "layers": layers(model, int16),
        "views": model.views,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": curve(read_table(training.curve, results.CURVE)),
        "shifts": columns(read_rows(training.evaluated, "shifts", results.SHIFT_COLUMNS)),
        "rotations": columns(read_rows(training.evaluated, "rotations", results.ROTATION_COLUMNS)),
        "confusion": [[counts[actual, predicted] for predicted in CLASSES] for actual in CLASSES],
        "mistakes": mistakes(training),
    }  # fmt: skip


def mistakes(training: Training) -> list[dict]:
    """The most confident mistakes, overall and of each kind, each once."""
    found = {}
    for part in ("surest", "of_each_kind"):
        for row in read_rows(training.mistakes, part, results.MISTAKES):
            packed = pixels(row["pixels"])
            found[packed] = row | {"pixels": packed, "confidence": number(row["confidence"])}
    return list(found.values())


def examples(images: np.ndarray, labels: np.ndarray, val: np.ndarray) -> list[dict]:
    """The first PER_CLASS images of each class among the val images."""
    chosen = [index for number in range(len(CLASSES)) for index in val[labels[val] == number][:PER_CLASS]]
    return [
        {"index": int(index), "label": CLASSES[labels[index]], "pixels": pixels(images[index])}
        for index in chosen
    ]


def layers(model: nn.Sequential, pack, before: int = 0) -> list[dict]:
    """Each layer's type as torch names it, with what the browser needs to compute it.

    A residual block becomes its layers, an Add with the index of the layer before the block, and a ReLU.
    `before` counts the layers before these.
    """
    found: list[dict] = []
    for layer in model:
        here = before + len(found)
        entry: dict[str, object] = {"type": type(layer).__name__}
        match layer:
            case Residual():
                found += layers(layer, pack, here)
                found += [{"type": "Add", "to": here - 1}, {"type": "ReLU"}]
                continue
            case nn.BatchNorm2d():
                entry["epsilon"] = layer.eps
            case nn.MaxPool2d():
                entry["size"] = layer.kernel_size
            case nn.Conv2d():
                entry["padding"] = layer.padding[0]
        of_norm = isinstance(layer, nn.BatchNorm2d)  # a few numbers for each map
        arrays = {name: value.numpy() for name, value in layer.state_dict().items() if value.ndim}
        found.append(entry | {name: (plain if of_norm else pack)(array) for name, array in arrays.items()})
    return found


def plain(values: np.ndarray) -> dict:
    """An array as numbers."""
    return {
        "shape": values.shape,
        "numbers": [number(value) for value in values.astype(float).ravel().tolist()],
    }


def int16(values: np.ndarray) -> dict:
    """An array as base64 of int16 multiples of one step: half the bytes of float32.

    -32768 stands for a value that is not finite, as after a training that diverged.
    """
    finite = np.isfinite(values)
    step = float(np.abs(values[finite]).max(initial=0)) / 32767 or 1.0
    codes = np.full(values.shape, -32768)
    codes[finite] = np.round(values[finite] / step)
    return {"shape": values.shape, "step": step, "int16": _base64(codes.astype("<i2"))}


def pixels(image: np.ndarray) -> str:
    """An image (28, 28) uint8 as base64."""
    return _base64(image.astype(np.uint8))


def curve(rows: list[dict]) -> dict:
    """The columns of a curve, thinned to at most POINTS rows and the last, and the number of epochs."""
    step = math.ceil(len(rows) / POINTS)
    kept = rows[::step] if (len(rows) - 1) % step == 0 else [*rows[::step], rows[-1]]
    return {"epochs": len(rows), "step": step, **columns(kept)}


def columns(rows: list[dict]) -> dict[str, list]:
    """Rows as columns."""
    return {name: [number(row[name]) for row in rows] for name in rows[0]}


def number(value: float) -> float | None:
    """`value`, or None (JSON's null) if it is not finite: JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
