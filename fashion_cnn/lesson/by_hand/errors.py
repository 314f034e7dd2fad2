"""The largest error of each kind of layer in a CNN's comparison, and where it is."""

import math
from collections.abc import Iterable

import numpy as np

from fashion_cnn.lesson.by_hand.comparison import compare_gradients

# What the metrics call each kind of layer.
KINDS = {
    "conv": "Conv2d", "pool": "MaxPool2d", "batch_norm": "BatchNorm2d", "residual": "Residual",
    "linear": "Linear",
}  # fmt: skip
GRADIENTS = ("conv", "batch_norm", "residual")
Error = tuple[float, str]


def cnn_errors(cnn, images: np.ndarray, rows: list[dict], seed: int) -> dict[str, Error]:
    """The largest error of each kind of layer that `cnn` has: in values, then in gradients.

    `rows` are those of compare_layers on `images` (N, 1, 28, 28).
    """
    has = {
        word: layer for word, layer in KINDS.items() if any(row["layer"].startswith(layer) for row in rows)
    }
    values = {f"max_abs_error_cnn_{word}": largest("CNN", rows, layer) for word, layer in has.items()}
    return values | {
        f"max_abs_error_{word}_gradients": _gradient_error(cnn, images, rows, has[word], seed)
        for word in GRADIENTS
        if word in has
    }


def largest(model: str, rows: list[dict], layer: str = "") -> Error:
    """The largest error among the layers whose names begin with `layer`, and where it is."""
    chosen = [row for row in rows if row["layer"].startswith(layer)]
    return _worst((row["error"], f"{model}, {row['layer']}") for row in chosen)


def _gradient_error(cnn, images: np.ndarray, rows: list[dict], layer: str, seed: int) -> Error:
    """The largest error in the gradients of that kind of layer, on the first image.

    Each layer reads the outputs of torch's layers before it. Batch norm's gradients are sums of sums, so they
    are in float64: float32's rounding would hide a small error.
    """
    rng = np.random.default_rng(seed)
    inputs = [images, *(row["by_torch"] for row in rows)]  # of each layer
    precision = np.float32 if layer == "Conv2d" else np.float64
    return _worst(
        (compare_gradients(cnn[n], inputs[n][:1].astype(precision), rng), f"CNN, {row['layer']}")
        for n, row in enumerate(rows)
        if row["layer"].startswith(layer)
    )


def _worst(errors: Iterable[Error]) -> Error:
    """The largest of `errors`; NaN, which max() alone could skip, counts as larger than any number."""
    return max(errors, key=lambda error: math.inf if math.isnan(error[0]) else error[0])
