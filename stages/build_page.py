"""Write the page that shows what happens inside the trained CNNs: page/fashion-cnn.html."""

from fashion_cnn.project.params import load_params
from fashion_cnn.project.process import run_stage, start

if __name__ == "__main__":
    start(load_params)  # before the slow imports, which read the environment

from pathlib import Path

from fashion_cnn.data.fashion_mnist import CLASSES, TRAIN_IMAGES, TRAIN_LABELS, read_idx
from fashion_cnn.data.split import split_indices
from fashion_cnn.lesson.results import read_weights_sha256
from fashion_cnn.models.device import prepare_torch
from fashion_cnn.page import contents
from fashion_cnn.page.html import PAGE, html
from fashion_cnn.project.catalog import CNNS
from fashion_cnn.project.files import read_tensors, write_text
from fashion_cnn.project.stage_records import StageRecords

TENSORS = Path("data/toy.safetensors")


def main() -> None:
    params = load_params()
    split = params.split
    records = StageRecords()
    prepare_torch("cpu")
    toy = read_tensors(TENSORS, "images", "labels")  # images (2, 1, 4, 4), labels (2,)
    images, labels = read_idx(TRAIN_IMAGES), read_idx(TRAIN_LABELS)
    _, val = split_indices(len(labels), split.val_size, split.train_size, split.seed)
    shown = {
        "classes": CLASSES,
        "toy": contents.toy(toy["images"], toy["labels"], params.train_toy_cnn.learning_rate),
        "cnns": {name: contents.cnn(training) for name, training in CNNS.items()},
        "images": contents.examples(images, labels, val),
    }
    write_text(PAGE, html(shown))
    for training in CNNS.values():
        records.report("build_page", training, read_weights_sha256(training.metrics), {}, [PAGE])
    records.close()


if __name__ == "__main__":
    run_stage(main)
