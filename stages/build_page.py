"""Write the page on which the trained CNNs can be looked into: page/fashion-cnn.html."""

from pathlib import Path

from lib.fashion_mnist import CLASSES, TRAIN_IMAGES, TRAIN_LABELS, read_idx
from lib.models.device import prepare_torch
from lib.page import contents
from lib.page.html import PAGE, html
from lib.params import load_params
from lib.reporting.outbox import Outbox
from lib.results import read_weights_sha256
from lib.split import split_indices
from lib.stage.files import read_tensors, write_text
from lib.stage.process import run_stage
from lib.trainings import CNNS

TENSORS = Path("data/toy.safetensors")


def main() -> None:
    split = load_params("split").split
    outbox = Outbox()
    prepare_torch("cpu")
    toy = read_tensors(TENSORS, "images", "labels")  # images (2, 1, 4, 4), labels (2,)
    images, labels = read_idx(TRAIN_IMAGES), read_idx(TRAIN_LABELS)
    _, val = split_indices(len(labels), split.val_size, split.train_size, split.seed)
    shown = {
        "classes": CLASSES,
        "toy": contents.toy(toy["images"], toy["labels"]),
        "cnns": {name: contents.cnn(training) for name, training in CNNS.items()},
        "images": contents.examples(images, labels, val),
    }
    write_text(PAGE, html(shown))
    for training in CNNS.values():
        outbox.report("build_page", training, read_weights_sha256(training.metrics), {}, [PAGE])
    outbox.close()


if __name__ == "__main__":
    run_stage(main)
