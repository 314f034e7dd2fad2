"""Name the garment in pictures: the three most probable classes of each."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fashion_cnn.commands.pictures import read_picture, write_picture
from fashion_cnn.commands.registry import CHAMPION, Classify, load_classifier
from fashion_cnn.commands.repair import check_weights
from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.models.device import prepare_torch
from fashion_cnn.project.catalog import DEFAULT_CNN
from fashion_cnn.project.errors import StageError

TOP = 3


def main(pictures: Sequence[Path], model: str | None, show: Path | None, as_json: bool) -> None:
    """Classify each picture; a file that is not one gets an error line, and the rest are processed."""
    names = [path.name for path in pictures]
    if show and (twice := {name for name in names if names.count(name) > 1}):
        raise StageError(f"--show: several pictures are called {min(twice)}, expected each name once")
    prepare_torch("cpu")
    classify = load_classifier(model) if model else load_default()
    answers = [answer(path, classify, show) for path in pictures]
    if as_json:
        print(json.dumps(answers, indent=2))
    else:
        for one in answers:
            print(in_words(one), file=sys.stderr if "error" in one else sys.stdout)
    sys.exit(any("error" in one for one in answers))


def load_default() -> Classify:
    """The champion's classifier if there is a champion, otherwise that of the weights in models/."""
    try:
        return load_classifier(CHAMPION)
    except StageError as error:
        check_weights(DEFAULT_CNN.weights)
        print(f"{error}; using {DEFAULT_CNN.weights}", file=sys.stderr)
        return load_classifier(str(DEFAULT_CNN.weights))


def answer(path: Path, classify: Classify, show: Path | None) -> dict:
    """The answer for one file: its most probable classes, or why it cannot be read."""
    try:
        seen = read_picture(path)
    except StageError as error:
        return {"file": str(path), "error": str(error)}
    if show:
        write_picture(show / f"{path.name}.28x28.png", seen.image)
    [probabilities] = classify(seen.image[None])
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    top = [
        {"class": CLASSES[number], "probability": round(float(probabilities[number]), 4)} for number in order
    ]
    doubts = [] if probabilities.max() > 0.5 else ["no class has a probability above one half"]
    return {"file": str(path), "inverted": seen.inverted, "top": top, "doubts": seen.doubts + doubts}


def in_words(one: dict) -> str:
    """One line about one file, and one for each doubt."""
    if "error" in one:
        return f"error: {one['error']}"
    top = ", ".join(f"{guess['class']} {100 * guess['probability']:.1f} %" for guess in one["top"])
    inverted = " (inverted: darker than its background)" if one["inverted"] else ""
    doubts = [f"  doubtful: {doubt}" for doubt in one["doubts"]]
    return "\n".join([f"{one['file']}: {top}{inverted}", *doubts])
