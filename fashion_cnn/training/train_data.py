"""The data of a training: train images in all their variants, and the split."""

from dataclasses import dataclass

import numpy as np

from fashion_cnn.data.copies import load_copies
from fashion_cnn.data.fashion_mnist import TRAIN_IMAGES, TRAIN_LABELS, read_idx
from fashion_cnn.data.split import split_indices


@dataclass(frozen=True)
class TrainData:
    """V variants of each of N images, and the split."""

    pool: np.ndarray  # (V, N, 28, 28) uint8, the original first
    labels: np.ndarray  # (N,) uint8
    train: np.ndarray  # ascending indices of the train split
    val: np.ndarray  # and of the val split
    made_by: dict[str, object]  # the params that made the copies, under their paths in params.yaml


def load_train_data(images: str, val_size: int, train_size: int | None, seed: int) -> TrainData:
    """The originals, plus their copies if `images` is "augmented", split by split_indices."""
    originals = read_idx(TRAIN_IMAGES)
    copies, labels, made_by = load_copies() if images == "augmented" else ([], read_idx(TRAIN_LABELS), {})
    train, val = split_indices(len(labels), val_size, train_size, seed)
    return TrainData(np.stack([originals, *copies]), labels, train, val, made_by)
