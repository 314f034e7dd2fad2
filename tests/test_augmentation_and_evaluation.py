"""Augmented copies, and the evaluation of known inputs."""

import hashlib
import io
import subprocess
import sys
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

import small_stages
from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.lesson import augmentation, evaluation
from fashion_cnn.lesson.augmentation import imgaug_augmenters
from fashion_cnn.project.errors import StageError

SETTINGS = {"copies": 2, "max_shift": 4, "max_rotation": 20.0, "seed": 0}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_copies_independent_of_workers(images, monkeypatch, workers):
    """The copies do not depend on the number of workers."""
    monkeypatch.setattr(augmentation, "BLOCK", 4)  # four blocks of the sixteen images
    copies = np.stack(list(augmentation.augment(images, **SETTINGS, workers=workers)))
    assert copies.shape == (2, *images.shape)
    assert copies.dtype == np.uint8
    assert hashlib.sha256(copies).hexdigest().startswith("07ee61c2b2b0cf50")


def test_block_depends_on_seed_alone(images):
    """A block depends on its seed alone: this process computes the same bytes as the workers."""
    block = augmentation._augment_block(images, (0, 0, 0), max_shift=4, max_rotation=20.0)
    [copy] = augmentation.augment(images, copies=1, max_shift=4, max_rotation=20.0, seed=0)
    assert (block == copy).all()
    assert hashlib.sha256(block).hexdigest().startswith("03b6e7ff50edaf73")


def test_blocks_drawn_independently(images, monkeypatch):
    """Each block of each copy is drawn independently of the others."""
    monkeypatch.setattr(augmentation, "BLOCK", 4)
    same = np.repeat(images[:4], 4, axis=0).reshape(4, 4, 28, 28).transpose(1, 0, 2, 3).reshape(16, 28, 28)
    copies = [*augmentation.augment(same, **SETTINGS)]
    blocks = {copy[start : start + 4].tobytes() for copy in copies for start in range(0, 16, 4)}
    assert len(blocks) == 8  # four blocks of the same four images, in two copies


class Bar(tqdm):
    made: ClassVar[list] = []

    def __init__(self, **settings):
        super().__init__(**settings | {"disable": False, "file": io.StringIO()})
        self.made.append(self)


class InThisProcess:
    """Stand-in for the pool of workers; it records how it was created."""

    made: ClassVar[list] = []

    def __init__(self, workers, context, initializer):
        self.made.append((workers, context.get_start_method()))
        initializer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


@pytest.mark.parametrize(("asked", "made"), [(None, 5), (2, 2)])
def test_worker_per_core(images, monkeypatch, asked, made):
    """`augment` starts a worker for each core unless it is asked for another number."""
    monkeypatch.setattr(augmentation, "usable_threads", lambda: 5)
    monkeypatch.setattr(augmentation, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(augmentation, "die_with_parent", lambda: cv2.setNumThreads(4))
    monkeypatch.setattr(InThisProcess, "made", [])
    copies = list(augmentation.augment(images, **SETTINGS, workers=asked))
    assert InThisProcess.made == [(made, "fork")]
    assert cv2.getNumThreads() == 1
    assert (copies[0] == next(augmentation.augment(images, **SETTINGS))).all()


def test_numpy_sctypes(monkeypatch):
    """NumPy gets the `sctypes` that imgaug reads, and keeps its own if it has them."""
    monkeypatch.delattr(np, "sctypes", raising=False)
    assert imgaug_augmenters().__name__ == "imgaug.augmenters"
    assert {kind: [np.dtype(t).name for t in types] for kind, types in np.sctypes.items()} == {
        "int": ["int8", "int16", "int32", "int64"],
        "uint": ["uint8", "uint16", "uint32", "uint64"],
        "float": ["float16", "float32", "float64"],
        "complex": ["complex64", "complex128"],
        "others": ["bool", "object", "bytes", "str", "void"],
    }
    has = object()
    monkeypatch.setattr(np, "sctypes", has)
    imgaug_augmenters()
    assert np.sctypes is has


def test_no_progress_bar_off_terminal(images, capfd):
    """`augment` shows a progress bar only on a terminal."""
    list(augmentation.augment(images, **SETTINGS))
    assert capfd.readouterr() == ("", "")


def test_progress_bar_counts_all_copies(images, monkeypatch):
    """The progress bar counts the images of all copies."""
    monkeypatch.setattr(augmentation, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    list(augmentation.augment(images, **SETTINGS))
    [bar] = Bar.made
    assert (bar.n, bar.total, bar.unit, bar.desc) == (32, 32, " images", "augment")


def test_unwritable_dev_shm(images, monkeypatch):
    """The error names /dev/shm if it is not writable."""

    def refuse(*arguments, **settings):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(augmentation, "ProcessPoolExecutor", refuse)
    with pytest.raises(StageError, match="shared memory: Read-only file system, expected /dev/shm "):
        next(augmentation.augment(images, copies=1, max_shift=1, max_rotation=1, seed=0))


def test_workers_beside_opencv_threads():
    """Workers start even if OpenCV has threads."""
    # In a process of its own, with a time limit: a worker forked next to those threads would hang.
    code = (
        "import cv2, numpy as np\n"
        "from fashion_cnn.lesson.augmentation import augment\n"
        "cv2.setNumThreads(4)\n"
        "cv2.GaussianBlur(np.zeros((4000, 4000), np.uint8), (9, 9), 0)\n"
        f"print(len(list(augment(np.zeros((16, 28, 28), np.uint8), **{SETTINGS}, workers=2))))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["2"], done.stderr


def test_copies_differ(images):
    """Copies differ from their image, from each other and from those of another seed."""
    first, second = augmentation.augment(images, **SETTINGS)
    other, _ = augmentation.augment(images, **{**SETTINGS, "seed": 1})
    for one, two in ((first, images), (first, second), (first, other)):
        assert (one != two).any(axis=(1, 2)).all()


def test_copies_keep_image_order():
    """Row i of a copy is made from image i."""
    # Image i is a central block of brightness 10·(i + 1); a shift of 2 px keeps it inside.
    images = np.zeros((16, 28, 28), np.uint8)
    images[:, 8:20, 8:20] = 10 * (np.arange(16)[:, None, None] + 1)
    [copy] = augmentation.augment(images, copies=1, max_shift=2, max_rotation=0.0, seed=0)
    assert copy.max(axis=(1, 2)).tolist() == images.max(axis=(1, 2)).tolist()
    assert (copy.sum((1, 2), dtype=int) == images.sum((1, 2), dtype=int)).all()


def test_shift_and_rotation_limits():
    """Shifts and rotations reach their limits in both directions, and shifts bring in black."""
    images = np.full((2000, 28, 28), 200, np.uint8)
    copy = augmentation._augment_block(images, (0, 0, 0), max_shift=3, max_rotation=0.0)
    # The number of black columns or rows at each side of each image.
    for axis in (1, 2):
        black = copy.max(axis=3 - axis) == 0  # (N, 28)
        first, last = black.argmin(axis=1), black[:, ::-1].argmin(axis=1)
        shifts = first - last
        assert set(np.unique(shifts)) == set(range(-3, 4))
        assert np.bincount(shifts + 3).min() > 2000 / 7 * 0.75  # uniform: 286 of each expected
    assert set(np.unique(copy)) == {0, 200}
    # A bar through the middle: the height of its right end gives the angle.
    images = np.zeros((1000, 28, 28), np.uint8)
    images[:, 13:15] = 255
    copy = augmentation._augment_block(images, (0, 0, 0), max_shift=0, max_rotation=20.0)
    rows = np.arange(28)[:, None]
    end = copy[:, :, 24].astype(float)
    height = 13.5 - (end * rows[:, 0]).sum(1) / end.sum(1)
    angles = np.rad2deg(np.arctan2(height, 24 - 13.5))
    assert (angles.min(), angles.max()) == pytest.approx((-20, 20), abs=1)
    assert angles.mean() == pytest.approx(0, abs=2)


def test_no_shift_no_rotation(images):
    """Without a shift and a rotation, a copy equals its image."""
    [copy] = augmentation.augment(images, copies=1, max_shift=0, max_rotation=0.0, seed=0)
    assert (copy == images).all()


def test_shift_whole_pixels(images):
    """Shifts move an image by whole pixels and bring in black."""
    right = evaluation.move(images, "shift_x", 3)
    assert (right[:, :, 3:] == images[:, :, :-3]).all()
    assert not right[:, :, :3].any()
    up = evaluation.move(images, "shift_y", -2)
    assert (up[:, :-2] == images[:, 2:]).all()
    assert not up[:, -2:].any()


def test_rotation_direction(images):
    """Rotation is counterclockwise, and a rotation by 0° changes nothing."""
    assert (evaluation.move(images, "rotation", 0) == images).all()
    assert (evaluation.move(images, "rotation", 90) == np.rot90(images, axes=(1, 2))).all()


@pytest.mark.parametrize("degrees", [-30, -15, 5, 20])
def test_rotation_interpolates(images, degrees):
    """Rotation interpolates each pixel from the four pixels around its source."""
    expected = small_stages.rotated(images, degrees).astype(int)
    difference = np.abs(evaluation.move(images, "rotation", degrees).astype(int) - expected)
    assert difference.max() <= 1  # a value halfway between two integers
    assert (difference > 0).mean() < 0.01


def test_per_class_by_hand():
    labels, predictions = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    rows = evaluation.per_class(labels, predictions)
    assert [row["class"] for row in rows] == list(CLASSES)
    assert rows[0] == {"class": CLASSES[0], "precision": 1.0, "recall": 2 / 3, "n": 3}
    assert rows[1] == {"class": CLASSES[1], "precision": 0.5, "recall": 1.0, "n": 1}
    assert rows[2] == {"class": CLASSES[2], "precision": 0, "recall": 0, "n": 0}


def test_precision_of_one_prediction():
    """A class that is predicted once, and correctly, has full precision."""
    rows = evaluation.per_class(np.array([4, 4]), np.array([4, 5]))
    assert (rows[4]["precision"], rows[4]["recall"]) == (1.0, 0.5)


def test_confusion_length_mismatch():
    """`confusion` requires a prediction for each label."""
    with pytest.raises(ValueError, match="shorter"):
        evaluation.confusion(np.array([0, 9]), np.array([6]))


def test_confusion_rows():
    """`confusion` returns one row per image."""
    rows = evaluation.confusion(np.array([0, 9]), np.array([6, 9]))
    assert rows == [
        {"actual": "T-shirt/top", "predicted": "Shirt"},
        {"actual": "Ankle boot", "predicted": "Ankle boot"},
    ]


def test_mistakes_most_confident_first(images):
    """`mistakes` returns only mistakes, the most confident first."""
    logits = torch.zeros(4, 10)
    logits[torch.arange(4), torch.tensor([1, 1, 2, 3])] = torch.tensor([1.0, 5.0, 9.0, 3.0])
    rows = evaluation.mistakes(images[:4], np.array([1, 0, 2, 0]), logits, count=12)["surest"]
    assert [(row["image"], row["label"], row["prediction"]) for row in rows] == [
        (1, "T-shirt/top", "Trouser"),
        (3, "T-shirt/top", "Dress"),
    ]
    for row in rows:
        assert row["pixels"] == images[row["image"]].tobytes().hex()
        assert row["confidence"] == logits.softmax(1)[row["image"]].max().item()
    fewer = evaluation.mistakes(images[:4], np.array([1, 0, 2, 0]), logits, count=1)
    assert fewer == {"surest": rows[:1], "of_each_kind": rows}


def test_mistakes_of_equal_confidence(images):
    """Mistakes of equal confidence keep the order of their images."""
    many = np.repeat(images, 30, axis=0)
    rows = evaluation.mistakes(many, np.ones(480, np.uint8), torch.zeros(480, 10), count=480)
    assert [row["image"] for row in rows["surest"]] == list(range(480))
    assert [row["image"] for row in rows["of_each_kind"]] == [0]


class LeftOrRight(nn.Module):
    """Class 0 if the left half is brighter, 1 otherwise."""

    def forward(self, images):
        left, right = images[..., :14].sum((1, 2, 3)), images[..., 14:].sum((1, 2, 3))
        return torch.stack([left - right, right - left, *[torch.full_like(left, -1e9)] * 8], dim=1)


class UpperLeft(nn.Module):
    """Class 0 if most of the light is in the first eight rows of the left half, 1 otherwise."""

    def forward(self, images):
        share = images[..., :8, :14].sum((1, 2, 3)) / images.sum((1, 2, 3))
        return torch.stack([share, 1 - share], dim=1)


def test_robustness_shift_down_and_rotation():
    """`robustness` measures the effect of a shift down and of a rotation."""
    images = np.zeros((3, 28, 28), np.uint8)
    images[:, 6, 13] = 255  # a shift down by 2 or right by 1, or a clockwise rotation, moves it out
    labels, device = np.zeros(3, np.uint8), torch.device("cpu")
    moved = evaluation.robustness(UpperLeft(), images, labels, device)
    assert moved["shifts"] == [
        {"pixels": by, "shift_x": float(by < 1), "shift_y": float(by < 2), "n": 3} for by in range(-5, 6)
    ]
    assert moved["rotations"] == [
        {"degrees": by, "rotation": float(by >= 0), "n": 3} for by in range(-30, 31, 5)
    ]


def test_robustness_shift():
    """`robustness` measures the effect of a shift to the right."""
    images = np.zeros((4, 28, 28), np.uint8)
    images[:, 14, 12] = 255  # two pixels left of the middle: a shift right by 2 moves it across
    moved = evaluation.robustness(LeftOrRight(), images, np.zeros(4, np.uint8), torch.device("cpu"))
    assert moved["shifts"] == [
        {"pixels": by, "shift_x": float(by < 2), "shift_y": 1.0, "n": 4} for by in range(-5, 6)
    ]
    assert [row["degrees"] for row in moved["rotations"]] == list(range(-30, 31, 5))
    assert {row["n"] for row in moved["rotations"]} == {4}
    assert evaluation.mean_accuracy(moved["shifts"], "pixels", 3, "shift_x", "shift_y") == (1 + 0 + 1 + 1) / 4
    assert evaluation.mean_accuracy(moved["shifts"], "pixels", 3, "shift_x") == (1 + 0) / 2
