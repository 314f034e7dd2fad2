"""The stages in this process, on a few synthetic images, and a plain evaluation of what they write.

Nothing here depends on the user's params.yaml or results. It uses only the lesson's model of the package.
"""

import csv
import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from fashion_cnn.data.fashion_mnist import IdxFile
from fashion_cnn.models.cnns import build_cnn
from fashion_cnn.training import train_data

# tests/helpers/params.yaml, with values that fit the few images and differ from one section to the next.
PARAMS = yaml.safe_load(Path(__file__).with_name("params.yaml").read_text())
for section, values in {
    "split": {"seed": 3, "val_size": 60, "train_size": 130},
    "augment_images": {"seed": 5, "copies": 2, "max_shift": 3, "max_rotation": 15},
    "train_toy_cnn": {"epochs": 40, "learning_rate": 0.02},
    "verify_manual_conv": {"seed": 6, "tolerance": 0.001},
    "train_cnn": {"seed": 4, "epochs": 3, "batch_size": 16},
    "evaluate_cnn": {"robustness_images": 40, "mistakes": 7},
}.items():
    PARAMS[section] |= values
# Each name in fashion_cnn.data.fashion_mnist, with the file's name and its shape here.
FILES = {
    "TRAIN_IMAGES": ("train-images-idx3-ubyte", (250, 28, 28)),
    "TRAIN_LABELS": ("train-labels-idx1-ubyte", (250,)),
    "TEST_IMAGES": ("t10k-images-idx3-ubyte", (150, 28, 28)),
    "TEST_LABELS": ("t10k-labels-idx1-ubyte", (150,)),
}
IMAGES = ("original", "augmented")
TOY, COPIES = ("build_toy_tensors",), ("augment_images",)
# Each stage, in order, and those whose outputs it reads.
PIPELINE = {
    TOY: [],
    COPIES: [],
    ("train_toy_cnn",): [TOY],
    ("verify_manual_conv",): [TOY, ("train_toy_cnn",)],
    ("train_cnn", "original"): [],
    ("train_cnn", "augmented"): [COPIES],
    ("evaluate_cnn", "original"): [("train_cnn", "original")],
    ("evaluate_cnn", "augmented"): [("train_cnn", "augmented")],
}
PIPELINE |= {("plot_results",): [*PIPELINE], ("build_page",): [*PIPELINE]}


class Results:
    """A folder with small data, in which a stage runs when a test asks for its outputs."""

    def __init__(self, folder: Path):
        self.folder, self.done = folder, set()
        make_data(folder)

    def need(self, *stage: str) -> None:
        """Run `stage` once, after the stages that it reads from."""
        if stage not in self.done:
            self.rerun(*stage)

    def rerun(self, *stage: str) -> Path:
        """Run `stage`, after the stages that it reads from, and return the folder.

        A test that looks at a stage's outputs runs the stage itself, so that `make mutate` knows which
        tests cover its code.
        """
        for earlier in PIPELINE[stage]:
            self.need(*earlier)
        run_stage(self.folder, *stage)
        self.done.add(stage)
        return self.folder

    def copy(self, to: Path, *stage: str) -> Path:
        """A copy of the folder, in which `stage` has run; the data is linked, not copied."""
        self.need(*stage)
        return Path(shutil.copytree(self.folder, to, copy_function=_link))


def _link(source: str, target: str) -> None:
    (os.link if "FashionMNIST" in source else shutil.copy)(source, target)


def make_data(folder: Path) -> None:
    """Write four small IDX files: each class a coarse pattern, half hidden by noise."""
    rng = np.random.default_rng(8)
    patterns = 255 * (rng.random((10, 4, 4)) < 0.4).repeat(7, axis=1).repeat(7, axis=2)  # (10, 28, 28)
    for split in ("TRAIN", "TEST"):
        labels = rng.integers(0, 10, FILES[f"{split}_LABELS"][1]).astype(np.uint8)
        noise = rng.integers(0, 256, FILES[f"{split}_IMAGES"][1])
        images = (0.5 * patterns[labels] + 0.5 * noise).astype(np.uint8)
        images[0] //= 64  # dim: its rounding errors are smaller than any other image's
        labels[::6] = rng.integers(0, 10, len(labels[::6]))  # wrong ones, so that each model makes mistakes
        for kind, values in (("IMAGES", images), ("LABELS", labels)):
            name, shape = FILES[f"{split}_{kind}"]
            raw = folder / "data/FashionMNIST/raw"
            raw.mkdir(parents=True, exist_ok=True)
            (raw / name).write_bytes(IdxFile(name, shape, "").header + values.tobytes())


def read_data(folder: Path, name: str) -> np.ndarray:
    name, shape = FILES[name]
    size = int(np.prod(shape))
    return np.fromfile(folder / "data/FashionMNIST/raw" / name, np.uint8)[-size:].reshape(shape)


def run_stage(folder: Path, stage: str, *arguments: str, **changes: object) -> MagicMock:
    """Run one stage in `folder`, with `changes` to PARAMS given as section__leaf=value.

    Returns the mock that replaces the two names through which stages reach MLflow.
    """
    params = {section: dict(values) for section, values in PARAMS.items()}
    for where, value in changes.items():
        section, leaf = where.split("__")
        params[section][leaf] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    module, tracking = importlib.import_module(f"stages.{stage}"), MagicMock()
    tracking.open_run.return_value.__exit__.return_value = False
    with small_data(folder, module) as patch:
        patch.setattr("sys.argv", [stage, *arguments])
        for name in ("open_run", "StageRecords"):
            if hasattr(module, name):
                patch.setattr(module, name, getattr(tracking, name))
        module.main()
    return tracking


@contextmanager
def small_data(folder: Path, *modules: ModuleType) -> Iterator[pytest.MonkeyPatch]:
    """Enter `folder`, and have `modules` and load_train_data read its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FASHION_CNN_ROOT", str(folder))
        for name, (file, shape) in FILES.items():
            for reader in (*modules, train_data):
                if hasattr(reader, name):
                    patch.setattr(reader, name, IdxFile(file, shape, ""))
        yield patch


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that stages write below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for name in ("data", "models", "metrics")
        for path in (folder / name).rglob("*")
        if path.is_file()
    }


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(train, val), by PARAMS."""
    order = np.random.default_rng(PARAMS["split"]["seed"]).permutation(len(labels))
    first, count = PARAMS["split"]["val_size"], PARAMS["split"]["train_size"]
    return np.sort(order[first : first + count]), np.sort(order[:first])


def logits_of(weights: dict[str, torch.Tensor], images: np.ndarray) -> np.ndarray:
    """(N, 28, 28) uint8 through the CNN's ten layers in float64: (N, 10)."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = torch.from_numpy(images)[:, None].double() / 255
    for layer in ("0", "3"):
        x = F.relu(F.max_pool2d(F.conv2d(x, w[f"{layer}.weight"], w[f"{layer}.bias"]), 2))
    x = F.relu(F.linear(x.flatten(1), w["7.weight"], w["7.bias"]))
    return F.linear(x, w["9.weight"], w["9.bias"]).numpy()


def probabilities(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def loss_and_accuracy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    of_label = probabilities(logits)[np.arange(len(labels)), labels]
    return -np.log(of_label).mean(), (logits.argmax(1) == labels).mean()


def evaluate(weights: Path, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    return loss_and_accuracy(logits_of(load_file(weights), images), labels)


def train(pool: np.ndarray, labels: np.ndarray) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Plain code for the training of train_cnn.py: its last weights, and each epoch's train metrics."""
    params, (index, _) = PARAMS["train_cnn"], split(labels)
    torch.manual_seed(params["seed"])
    model = build_cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=params["learning_rate"])
    rows = []
    for epoch in range(1, params["epochs"] + 1):
        rng = np.random.default_rng([params["seed"], epoch])
        order = rng.permutation(index)
        variants = rng.integers(len(pool), size=len(order))
        losses, hits = [], []  # of each image
        for start in range(0, len(order), params["batch_size"]):
            chosen = order[start : start + params["batch_size"]]
            batch = torch.tensor(pool[variants[start : start + params["batch_size"]], chosen] / 255).float()
            logits, label = model(batch[:, None]), torch.from_numpy(labels[chosen]).long()
            each = F.cross_entropy(logits, label, reduction="none")
            optimizer.zero_grad()
            each.mean().backward()
            optimizer.step()
            losses += each.tolist()
            hits += (logits.argmax(1) == label).tolist()
        rows.append({"train_loss": np.mean(losses), "train_accuracy": np.mean(hits)})
    return model.state_dict(), rows


def shifted(images: np.ndarray, right: int, down: int) -> np.ndarray:
    """Shift by whole pixels; black comes in."""
    padded = np.pad(images, ((0, 0), (14, 14), (14, 14)))
    return padded[:, 14 - down : 42 - down, 14 - right : 42 - right].copy()


def rotated(images: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate counterclockwise about the middle; each pixel is interpolated from the four at its source."""
    angle = np.deg2rad(degrees)
    down, right = np.mgrid[:28, :28] - 13.5
    # The source of each pixel in a counterclockwise rotation (on a screen, where rows go down).
    x = np.cos(angle) * right - np.sin(angle) * down + 13.5
    y = np.sin(angle) * right + np.cos(angle) * down + 13.5
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    padded = np.pad(images.astype(float), ((0, 0), (14, 14), (14, 14)))
    total = np.zeros(images.shape)
    for i, j in np.ndindex(2, 2):
        share = (1 - abs(y - top - i)) * (1 - abs(x - left - j))
        total += share * padded[:, top + i + 14, left + j + 14]
    return np.round(total).astype(np.uint8)
