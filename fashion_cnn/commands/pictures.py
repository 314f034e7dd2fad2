"""Making a picture what the network knows: the recipe by which Fashion-MNIST was made (arXiv:1708.07747)."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fashion_cnn.project.errors import StageError

SIZE = 28
NOISE = 13  # of 255: pixels this near the background are background, 5 % as in the recipe


def read_picture(path: Path) -> tuple[np.ndarray, bool]:
    """A garment as (28, 28) uint8, light on black, and whether it had to be inverted for that.

    A picture of 28×28 keeps its place; any other is trimmed to the garment, which then fills the square by
    its longer side, in the middle. Raises StageError if the file is no picture, or a blank one.
    """
    grey = to_grey(path)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = float(np.median(border))
    inverted = background > 127
    if inverted:
        grey, background = 255 - grey, 255 - background
    rows, columns = np.nonzero(np.abs(grey - background) > NOISE)
    if not len(rows):
        raise StageError(f"{path}: blank, expected a garment that differs from its background")
    if grey.shape == (SIZE, SIZE):
        return np.rint(grey).astype(np.uint8), inverted
    grey = grey[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    grey = np.clip(grey - background, 0, None) * 255 / (255 - background)
    return in_the_middle(grey), inverted


def to_grey(path: Path) -> np.ndarray:
    """The picture's brightness (H, W), float from 0 to 255, upright.

    What is transparent becomes black behind a light garment, and white behind a dark one.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, which convert() would cut at 255
                values = np.asarray(upright, np.float64)
                top = 65535 if values.max() > 255 else 255
                return values.clip(0, top) * 255 / top
            coloured = upright.convert("RGBA")
            grey = np.asarray(coloured.convert("L"), np.float64)
            opacity = np.asarray(coloured.getchannel("A"), np.float64) / 255
            is_dark = (grey * opacity).sum() < 127 * opacity.sum()
            return grey * opacity + (255 if is_dark else 0) * (1 - opacity)
    except UnidentifiedImageError:
        raise StageError(f"{path}: no picture that Pillow reads, expected PNG, JPEG or the like") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise StageError(f"{path}: {reason}; expected a picture such as PNG or JPEG") from None


def in_the_middle(grey: np.ndarray) -> np.ndarray:
    """Shrink (H, W) by area, or enlarge it, until its longer side is 28; then centre it on black."""
    height, width = grey.shape
    scale = SIZE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    kind = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(grey.astype(np.float32)).resize(size, kind))
    square = np.zeros((SIZE, SIZE), np.uint8)
    top, left = (SIZE - size[1]) // 2, (SIZE - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = np.rint(small.clip(0, 255))
    return square


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write (28, 28) uint8 as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
