"""Recompute both CNNs by explicit loops and compare with torch: values, gradients, counts."""

from fashion_cnn.project.params import load_params
from fashion_cnn.project.process import run_stage, start

if __name__ == "__main__":
    start(load_params)  # before the slow imports, which read the environment

from pathlib import Path

import numpy as np

from fashion_cnn.data.fashion_mnist import TRAIN_IMAGES, read_idx
from fashion_cnn.lesson.by_hand.comparison import compare_counts, compare_layers, fill_batch_norms
from fashion_cnn.lesson.by_hand.errors import cnn_errors, largest
from fashion_cnn.lesson.by_hand.walkthrough import parameters_table, weights_table, write_out
from fashion_cnn.models.cnns import (
    CNN_SHAPE,
    TOY_SHAPE,
    build_cnn,
    build_toy_cnn,
    fresh,
    input_array,
    load_weights,
)
from fashion_cnn.models.device import prepare_torch
from fashion_cnn.project.catalog import TOY
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import read_tensors, sha256_of, write_json, write_text
from fashion_cnn.project.stage_records import StageRecords

METRICS = TOY.evaluated
WALKTHROUGH = TOY.evaluation_results.with_suffix(".md")


def main() -> None:
    params = load_params()
    how, name = params.verify_manual_conv, params.train_cnn.model
    records = StageRecords()
    prepare_torch("cpu", threads=1)  # on more, its float64 sums have no fixed order
    toy = read_tensors(Path("data/toy.safetensors"), "images", "labels")
    toy_model = load_weights(build_toy_cnn(), TOY.weights)
    cnn = fresh(lambda: build_cnn(name), how.seed).eval()
    fill_batch_norms(cnn, np.random.default_rng(how.seed))
    images = input_array(read_idx(TRAIN_IMAGES)[: how.images])  # (n, 1, 28, 28)

    toy_rows = [compare_layers(toy_model, image[None]) for image in toy["images"]]
    cnn_rows = compare_layers(cnn, images)
    errors = {
        "max_abs_error_toy_forward": largest("toy, both images", toy_rows[0] + toy_rows[1]),
        **cnn_errors(cnn, images, cnn_rows, how.seed),
    }
    counts = {"toy_cnn": compare_counts(toy_model, TOY_SHAPE), "cnn": compare_counts(cnn, CNN_SHAPE)}
    _check(errors, counts, how.tolerance)

    totals = {f"parameters_{name}": sum(row["by_formula"] for row in rows) for name, rows in counts.items()}
    metrics = {name: error for name, (error, _) in errors.items()} | totals
    metrics = write_json(METRICS, metrics)
    write_text(WALKTHROUGH, _walkthrough(toy, toy_model, toy_rows, counts))
    records.report("verify_manual_conv", TOY, sha256_of(TOY.weights), metrics, [METRICS, WALKTHROUGH])
    records.close()


def _check(errors: dict, counts: dict, tolerance: float) -> None:
    for name, (error, where) in errors.items():
        if not error <= tolerance:  # also true for NaN
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
