"""The batches of each step: their images, variants, flips and shifts."""

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from fashion_cnn.schema import TrainCnn

# The columns of a take, which is an image as one epoch uses it. COUNT: how many images it counts as.
INDEX, VARIANT, FLIP, DOWN, RIGHT, COUNT = range(N_COLUMNS := 6)


def draw_epoch(train: np.ndarray, n_variants: int, params: "TrainCnn", epoch: int) -> np.ndarray:
    """The takes (N, 6) of an epoch: each image of `train` (N,) once, in a new order.

    Variants and shifts are uniform. With `params.flips`, half of the images are mirrored in odd epochs, the
    other half in even ones: airbench's alternating flip (Jordan, arXiv 2404.00498).
    """
    rng = np.random.default_rng([params.seed, epoch])
    takes = np.zeros((len(train), N_COLUMNS), np.int64)
    takes[:, INDEX] = rng.permutation(train)
    takes[:, VARIANT] = rng.integers(n_variants, size=len(train))
    if params.flips:
        first = np.random.default_rng([params.seed, 0]).integers(2, size=train.max() + 1)
        takes[:, FLIP] = (first[takes[:, INDEX]] + epoch) % 2
    if params.shift:
        takes[:, [DOWN, RIGHT]] = rng.integers(-params.shift, params.shift + 1, size=(len(train), 2))
    takes[:, COUNT] = 1
    return takes


def length(n: int, params: "TrainCnn", epoch: int) -> int:
    """How many of `n` images an epoch takes: all, or from epoch 2 on all but half of the easy ones."""
    return n - (int(params.prune_easy * n) // 2 if epoch > 1 else 0)


def halve_easy(takes: np.ndarray, losses: np.ndarray, params: "TrainCnn", epoch: int) -> np.ndarray:
    """`takes` (N, 6) of an epoch without a random half of the easy ones; the other half counts twice.

    Data pruning as in InfoBatch (Qin et al., arXiv 2303.04947), with a fixed share: the easy images are the
    share `params.prune_easy` with the lowest `losses`, one for each image.
    """
    left_out = len(takes) - length(len(takes), params, epoch)
    easy = losses[takes[:, INDEX]].argsort(kind="stable")[: 2 * left_out]
    rng = np.random.default_rng([params.seed, epoch, 1])  # 1: a separate stream; 0 would repeat draw_epoch's
    gone, kept = rng.permutation(easy).reshape(2, left_out)
    takes[kept, COUNT] = 2
    return np.delete(takes, gone, axis=0)


def cut(images: torch.Tensor, takes: torch.Tensor, moved: bool) -> torch.Tensor:
    """The images (B, 28, 28) uint8 of `takes` (B, 6), from all variants `images` (V, N, 28, 28) uint8.

    Without `moved`, flips and shifts are ignored. Pixels that a shift uncovers are black.
    """
    variant, index = takes[:, VARIANT], takes[:, INDEX]
    if not moved:
        return images[variant, index]
    last = images.shape[-1] - 1
    side = torch.arange(last + 1, device=images.device)
    rows = side - takes[:, DOWN, None]  # (B, 28): the row of the image that each row shows
    columns = side - takes[:, RIGHT, None]
    seen = _inside(rows)[:, :, None] & _inside(columns)[:, None, :]
    columns = torch.where(takes[:, FLIP, None] == 1, last - columns, columns)
    rows, columns = rows.clamp(0, last), columns.clamp(0, last)
    return images[variant[:, None, None], index[:, None, None], rows[:, :, None], columns[:, None, :]] * seen


def _inside(places: torch.Tensor) -> torch.Tensor:
    return (places >= 0) & (places < places.shape[-1])
