"""The split of Fashion-MNIST's train images into train and val."""

import numpy as np


def split_indices(
    n_images: int, val_size: int, train_size: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (train, val), two disjoint ascending arrays of image indices.

    The first `val_size` of a seeded permutation are val, whatever `train_size` is; the next
    `train_size` (None: all that remain) are train.
    """
    order = np.random.default_rng(seed).permutation(n_images)
    val, rest = order[:val_size], order[val_size:]
    return np.sort(rest[:train_size]), np.sort(val)
