"""Part 3 of the lesson: shifted and rotated copies of the train images, made by imgaug."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import cv2
import numpy as np
from tqdm import tqdm

from fashion_cnn.project.errors import StageError
from fashion_cnn.project.process import die_with_parent, usable_threads

BLOCK = 1000  # images per task; each block has its own seed, so the number of workers changes no byte


def augment(
    images: np.ndarray,
    *,
    copies: int,
    max_shift: int,
    max_rotation: float,
    seed: int,
    workers: int | None = None,
) -> Iterator[np.ndarray]:
    """Yield `copies` arrays like `images` (N, 28, 28) uint8; row i of each is made from image i.

    Each image is shifted by up to `max_shift` pixels along each axis and rotated by up to
    `max_rotation` degrees, uniformly; uncovered pixels are black. The result depends only on the
    seed, not on `workers` (None: one for each core this process may use).
    """
    imgaug_augmenters()  # import it once, before the workers are forked: it takes a second
    _keep_opencv_single()  # here too: a worker forked while OpenCV has threads would wait for them forever
    task = partial(_augment_block, max_shift=max_shift, max_rotation=max_rotation)
    starts = range(0, len(images), BLOCK)
    blocks = [images[start : start + BLOCK] for start in starts]
    with (
        _start_pool(workers or usable_threads()) as pool,
        tqdm(total=copies * len(images), unit=" images", desc="augment", disable=None) as bar,
    ):
        for copy in range(copies):
            rows = []
            for augmented in pool.map(task, blocks, [(seed, copy, start // BLOCK) for start in starts]):
                rows.append(augmented)
                bar.update(len(augmented))
            yield np.concatenate(rows)


def _start_pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    try:
        return ProcessPoolExecutor(workers, context, initializer=_start_worker)
    except OSError as error:  # from creating semaphores
        raise StageError(
            f"shared memory: {error.strerror}, expected /dev/shm to be writable, as several processes use it"
        ) from None


def _start_worker() -> None:
    die_with_parent()
    _keep_opencv_single()


def _keep_opencv_single() -> None:
    cv2.setNumThreads(1)  # its own threads would compete with the workers; this saves a tenth of the time


def _augment_block(
    images: np.ndarray, entropy: tuple[int, int, int], max_shift: int, max_rotation: float
) -> np.ndarray:
    augmenters = imgaug_augmenters()
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    shift = (-max_shift, max_shift)
    affine = augmenters.Affine(
        translate_px={"x": shift, "y": shift}, rotate=(-max_rotation, max_rotation), cval=0, seed=seed
    )
    return affine(images=images)


def imgaug_augmenters():
    """Return imgaug.augmenters, patched so that it loads with NumPy 2.

    imgaug 0.4.0, its last release, reads np.sctypes, which NumPy 2 removed. Delete the patch with
    imgaug, or once a release of it no longer reads np.sctypes.
    """
    if not hasattr(np, "sctypes"):
        np.sctypes = {  # type: ignore[attr-defined]
            "int": [np.int8, np.int16, np.int32, np.int64],
            "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
            "float": [np.float16, np.float32, np.float64],
            "complex": [np.complex64, np.complex128],
            "others": [bool, object, bytes, str, np.void],
        }
    from imgaug import augmenters

    return augmenters
