"""Recompute both CNNs by explicit loops, and compare with torch: values, gradients, counts."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lib.by_hand.comparison import compare_counts, compare_gradients, compare_layers
from lib.by_hand.walkthrough import parameters_table, weights_table, write_out
from lib.fashion_mnist import TRAIN_IMAGES, read_idx
from lib.models.cnns import CNN_SHAPE, TOY_SHAPE, build_cnn, build_toy_cnn, fresh, input_array, load_weights
from lib.models.device import prepare_torch
from lib.params import load_params
from lib.reporting.outbox import Outbox
from lib.stage.errors import StageError
from lib.stage.files import read_tensors, sha256_of, write_json, write_text
from lib.stage.process import run_stage
from lib.trainings import TOY

METRICS = TOY.evaluation_results.with_suffix(".json")
WALKTHROUGH = TOY.evaluation_results.with_suffix(".md")


def main() -> None:
    params = load_params("verify_manual_conv").verify_manual_conv
    outbox = Outbox()
    prepare_torch("cpu", threads=1)  # one order of summation on every machine
    toy = read_tensors(Path("data/toy.safetensors"), "images", "labels")
    toy_model = load_weights(build_toy_cnn(), TOY.weights)
    cnn = fresh(build_cnn, params.seed)
    images = input_array(read_idx(TRAIN_IMAGES)[: params.images])  # (n, 1, 28, 28)

    toy_rows = [compare_layers(toy_model, image[None]) for image in toy["images"]]
    cnn_rows = compare_layers(cnn, images)
    errors = {
        "max_abs_error_toy_forward": _largest("toy, both images", toy_rows[0] + toy_rows[1]),
        "max_abs_error_cnn_conv": _largest("CNN", cnn_rows, "Conv2d"),
        "max_abs_error_cnn_pool": _largest("CNN", cnn_rows, "MaxPool2d"),
        "max_abs_error_cnn_linear": _largest("CNN", cnn_rows, "Linear"),
        "max_abs_error_conv_gradients": _gradient_error(cnn, images, cnn_rows, params.seed),
    }
    counts = {"toy_cnn": compare_counts(toy_model, TOY_SHAPE), "cnn": compare_counts(cnn, CNN_SHAPE)}
    _check(errors, counts, params.tolerance)

    totals = {f"parameters_{name}": sum(row["by_formula"] for row in rows) for name, rows in counts.items()}
    metrics = {name: error for name, (error, _) in errors.items()} | totals
    metrics = write_json(METRICS, metrics)
    write_text(WALKTHROUGH, _walkthrough(toy, toy_model, toy_rows, counts))
    outbox.report("verify_manual_conv", TOY, sha256_of(TOY.weights), metrics, [METRICS, WALKTHROUGH])
    outbox.close()


def _largest(model: str, rows: list[dict], layer: str = "") -> tuple[float, str]:
    """The largest error among the layers whose names begin with `layer`, and where it is."""
    chosen = [row for row in rows if row["layer"].startswith(layer)]
    return _worst((row["error"], f"{model}, {row['layer']}") for row in chosen)


def _gradient_error(cnn, images: np.ndarray, rows: list[dict], seed: int) -> tuple[float, str]:
    """Each convolution, on the first image: it reads what torch's layers before it give."""
    rng = np.random.default_rng(seed)
    inputs = [images, *(row["by_torch"] for row in rows)]  # of each layer
    return _worst(
        (compare_gradients(cnn[n], inputs[n][:1], rng), f"CNN, {row['layer']}")
        for n, row in enumerate(rows)
        if row["layer"].startswith("Conv2d")
    )


def _worst(errors: Iterable[tuple[float, str]]) -> tuple[float, str]:
    """The largest of `errors`; NaN, which max() alone would pass over, is larger than any number."""
    return max(errors, key=lambda error: math.inf if math.isnan(error[0]) else error[0])


def _check(errors: dict, counts: dict, tolerance: float) -> None:
    for name, (error, where) in errors.items():
        if not error <= tolerance:  # true for NaN, too
            raise StageError(f"{name} is {error:.3g} at {where}, expected at most {tolerance:g}")
    for name, rows in counts.items():
        for row in rows:
            if row["by_formula"] != row["by_summary"]:
                raise StageError(
                    f"{name}, {row['layer']}: {row['by_formula']} parameters by the formula, "
                    f"torchsummary counts {row['by_summary']}"
                )


def _walkthrough(toy: dict, model, rows: list[list[dict]], counts: dict) -> str:
    text = (
        "# The toy CNN by hand\n\nEvery intermediate value of both images, by loops and by torch; "
        f"written by `verify_manual_conv`.\n\n{weights_table(model)}"
    )
    for number, (image, label) in enumerate(zip(toy["images"], toy["labels"], strict=True)):
        text += f"\n## Image {number}\n\n" + write_out(model, image, rows[number], label)
    for name, title in (("toy_cnn", "The toy's parameters"), ("cnn", "The Fashion-MNIST CNN's parameters")):
        text += f"\n## {title}\n\n" + parameters_table(counts[name])
    return text


if __name__ == "__main__":
    run_stage(main)
