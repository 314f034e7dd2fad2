"""The CNNs' accuracy on pictures as `fashion-cnn predict` prepares them, by the kind of picture.

Usage, after `make repro`: python benchmarks/sheets.py [--images 1000]. It enlarges val images, puts them on
sheets, and prints a table of accuracies, in percent.
"""

import argparse

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fashion_cnn.commands.pictures import prepare
from fashion_cnn.models.cnns import load_cnn
from fashion_cnn.models.inference import loss_and_accuracy, predict
from fashion_cnn.project.catalog import CNNS
from fashion_cnn.project.params import load_params
from fashion_cnn.training.train_data import load_train_data

SHEET = 400  # pixels, square; the garment's square is 280


def enlarged(image: np.ndarray, size: int) -> np.ndarray:
    """(28, 28) uint8 to (size, size) from 0 to 1."""
    picture = Image.fromarray(image.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(picture, np.float64) / 255, 0, 1)


def on_sheet(image: np.ndarray, size: int = 280, top: int = 60, left: int = 60) -> np.ndarray:
    """How much garment is in each pixel of a sheet, from 0 to 1."""
    sheet = np.zeros((SHEET, SHEET))
    sheet[top : top + size, left : left + size] = enlarged(image, size)
    return sheet


def noise(rng: np.random.Generator) -> np.ndarray:
    """Noise of standard deviation 10."""
    return rng.normal(0, 10, (SHEET, SHEET))


GRADIENT = np.linspace(255, 155, SHEET)
KINDS = {  # each makes a sheet from an image and a generator
    "the images themselves": None,
    "dark on a white sheet": lambda image, _: 255 * (1 - on_sheet(image)),
    "pale: 30 of 255 darker than the sheet": lambda image, _: 255 - 30 * on_sheet(image),
    "before a gradient from 255 to 155": lambda image, _: GRADIENT * (1 - on_sheet(image)),
    "noise, standard deviation 10": lambda image, rng: 245 * (1 - on_sheet(image)) + noise(rng),
    "gradient and noise": lambda image, rng: GRADIENT * (1 - on_sheet(image)) + noise(rng),
    "a third of the size, off-centre": lambda image, rng: (
        255 * (1 - on_sheet(image, 93, *rng.integers(10, SHEET - 103, 2)))
    ),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    count = parser.parse_args().images
    split, cpu = load_params().split, torch.device("cpu")
    data = load_train_data("original", split.val_size, split.train_size, split.seed)
    images, labels = data.pool[0, data.val[:count]], data.labels[data.val[:count]]
    networks = [load_cnn(training.weights) for training in CNNS.values()]
    print(f"| pictures | {' | '.join(f'trained on {name}' for name in CNNS)} |\n|---|---|---|")
    for words, draw in KINDS.items():
        rng = np.random.default_rng(0)
        seen = images
        if draw:
            bar = tqdm(images, words, leave=False, disable=None)
            seen = np.stack([prepare(np.rint(draw(image, rng).clip(0, 255))).image for image in bar])
        shares = [loss_and_accuracy(predict(network, seen, cpu), labels)[1] for network in networks]
        cells = [f"{100 * share:.1f} %" for share in shares]
        print(f"| {words} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
