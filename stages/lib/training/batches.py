"""What each step takes: which images, in which variants, flipped and shifted how."""

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from params_schema import TrainCnn

# The columns of a take.
INDEX, VARIANT, FLIP, DOWN, RIGHT = range(N_COLUMNS := 5)


def draw_epoch(train: np.ndarray, n_variants: int, params: "TrainCnn", epoch: int) -> np.ndarray:
    """The takes (N, 5) of an epoch, which takes each image of `train` (N,) once, in a fresh order.

    Variants and shifts are uniform. With `params.flips`, half of the images are mirrored in odd epochs, the
    other half in even ones: an image is never seen the same way round twice in a row.
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
    return takes


def cut(images: torch.Tensor, takes: torch.Tensor, moved: bool) -> torch.Tensor:
    """The images of `takes` (B, 5), (B, 28, 28) uint8, of all variants `images` (V, N, 28, 28) uint8.

    Unless `moved`, they are as they are. What a shift brings into view is black.
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
