"""Convert a picture to the network's input, by the recipe that made Fashion-MNIST (arXiv:1708.07747)."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from fashion_cnn.project.errors import StageError

SIZE = 28
MOST = 100_000_000  # pixels; a larger picture is refused
ENOUGH = 4_000_000  # pixels; a larger picture is reduced to about this many
NOISE = 13  # of 255: a picture that differs less from its background is blank
NEAR = 0.05  # of the strongest difference: pixels this near the background are background, as in the recipe
LEAST = 3  # of 255: the same for a pale garment
SURE = 5  # standard deviations of noise; a pixel beyond them is garment
# Beyond these, a picture gets a line of warning, because it hardly resembles the training images.
FAINT = 40  # of 255: the garment differs by less from its background
BUSY = 0.25  # share of the border that is far from a plain background
MIXED = 0.2  # ratio of the garment's parts lighter and darker than the background, lesser to greater
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns of attacks


@dataclass(frozen=True)
class Prepared:
    """The network's input made from a picture, and the doubts about it."""

    image: np.ndarray  # (28, 28) uint8, light on black
    inverted: bool  # whether the garment was darker than its background, or a 28×28 background was light
    doubts: list[str]


def read_picture(path: Path) -> Prepared:
    """Read a picture as network input. Raises StageError if the file is not a picture, or a blank one."""
    try:
        return prepare(to_grey(path))
    except ValueError as error:
        raise StageError(f"{path}: {error}") from None
    except MemoryError:
        raise StageError(f"{path}: too large for the memory here, expected a smaller picture") from None


def prepare(grey: np.ndarray) -> Prepared:
    """Convert a picture's brightness (H, W), from 0 to 255, to the network's input.

    A 28×28 picture is not moved or scaled; any other is trimmed to the garment, which is scaled until its
    longer side fills the square, and centred. Raises ValueError if it is blank.
    """
    background, noise, busy = background_of(grey)
    garment = grey - background
    is_known = grey.shape == (SIZE, SIZE)
    mask = (np.abs(garment) > NOISE) if is_known else garment_in(garment, noise)
    if not mask.any():
        raise ValueError("blank, expected a garment that differs from its background")
    if is_known:
        is_light = float(np.median(background)) > 127
        return Prepared(np.rint(255 - grey if is_light else grey).astype(np.uint8), is_light, [])
    lighter, darker = garment[mask].clip(0).sum(), -garment[mask].clip(None, 0).sum()
    inverted = bool(darker > lighter)
    rows, columns = ndimage.find_objects(mask.astype(int))[0]
    garment = (np.where(mask, garment, 0)[rows, columns] * (-1 if inverted else 1)).clip(0)
    strongest = max(1.0, float(np.percentile(garment[mask[rows, columns]], 99)))
    doubts = []
    if busy > BUSY:
        doubts.append(f"its border is busy: {100 * busy:.0f} % of it is far from a plain background")
    if min(lighter, darker) > MIXED * max(lighter, darker):
        doubts.append("some parts are lighter than the background, others darker; the fainter were left out")
    if strongest < FAINT:
        doubts.append(f"little contrast: the garment differs by {strongest:.0f} of 255")
    if max(garment.shape) < SIZE:
        doubts.append(f"small: the garment has {garment.shape[1]}×{garment.shape[0]} pixels")
    return Prepared(in_the_middle((garment * 255 / strongest).clip(0, 255)), inverted, doubts)


def background_of(grey: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The brightness of the background (H, W), its noise, and the share of the border that is far from it.

    The background is a plane fitted to the border's pixels, without those that are far from it. The noise is
    a standard deviation, estimated from the median deviation.
    """
    edge = np.ones(grey.shape, bool)
    edge[1:-1, 1:-1] = False
    row, column = np.nonzero(edge)
    down, across = (np.linspace(-1, 1, length) for length in grey.shape)
    terms, values = np.stack([np.ones(len(row)), down[row], across[column]], 1), grey[edge]
    plane = np.array([np.median(values), 0, 0])
    for _ in range(10):
        deviation = np.abs(values - terms @ plane)
        noise = 1.4826 * float(np.median(deviation))
        is_background = deviation <= max(3 * noise, NOISE)
        plane = np.linalg.lstsq(terms[is_background], values[is_background], rcond=None)[0]
    busy = float((np.abs(values - terms @ plane) > 2 * NOISE).mean())
    return plane[0] + plane[1] * down[:, None] + plane[2] * across, noise, busy


def garment_in(garment: np.ndarray, noise: float) -> np.ndarray:
    """The garment's mask (H, W): the large connected parts that differ from the background."""
    # The window grows with the noise, so that noise changes a window's mean by less than NOISE.
    window = min(max(1, math.ceil(SURE * noise / NOISE)), max(1, min(garment.shape) // 10))
    differs = np.abs(ndimage.uniform_filter(garment, window))
    if (strongest := differs.max()) <= NOISE:
        return np.zeros(garment.shape, bool)
    least = max(NEAR * strongest, SURE * noise / window, LEAST)
    parts, _ = ndimage.label(differs > least, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return ((sizes > 0) & (sizes >= sizes.max() / 20))[parts]


def to_grey(path: Path) -> np.ndarray:
    """The picture's brightness (H, W), float from 0 to 255, upright; a large picture is reduced first.

    Transparent areas become black behind a light garment, and white behind a dark one. 32-bit values have no
    fixed scale: the lowest becomes 0, the highest 255.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            if (pixels := picture.width * picture.height) > MOST:
                most = f"{MOST / 1e6:.0f}"
                raise StageError(f"{path}: {pixels / 1e6:.0f} megapixels, expected at most {most}")
            ImageOps.exif_transpose(picture, in_place=True)
            has_16_bits = picture.mode.startswith("I;16")
            upright = reduced(picture, math.ceil(math.sqrt(pixels / ENOUGH)))
            if has_16_bits:
                return np.asarray(upright, np.float64) / 257
            if upright.mode in ("I", "F"):
                return over_its_range(np.asarray(upright, np.float64))
            coloured = upright.convert("RGBA")
            grey = np.asarray(coloured.convert("L"), np.float64)
            opacity = np.asarray(coloured.getchannel("A"), np.float64) / 255
            is_dark = (grey * opacity).sum() < 127 * opacity.sum()
            return grey * opacity + (255 if is_dark else 0) * (1 - opacity)
    except UnidentifiedImageError:
        raise StageError(f"{path}: not a picture that Pillow reads, expected PNG, JPEG or the like") from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise StageError(f"{path}: {reason}; expected a picture such as PNG or JPEG") from None


def reduced(picture: Image.Image, factor: int) -> Image.Image:
    """The picture, reduced to the means of factor × factor pixels."""
    if factor == 1:
        return picture
    has_means = {"1": "L", "P": "RGBA", "PA": "RGBA", "I;": "I"}  # for modes that reduce() cannot average
    return picture.convert(has_means.get(picture.mode[:2], picture.mode)).reduce(factor)


def over_its_range(values: np.ndarray) -> np.ndarray:
    """Scale values so that the lowest is 0 and the highest 255."""
    if not np.isfinite(values).all():
        raise ValueError("some of its values are not finite")
    return (values - values.min()) * 255 / max(float(np.ptp(values)), np.finfo(float).tiny)


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
