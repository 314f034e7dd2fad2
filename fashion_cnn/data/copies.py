"""data/augmented/: the copies that augment_images makes and train_cnn reads."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import read_json, write_array, write_text

AUGMENTED_DIR = Path("data/augmented")


def save_copies(
    copies: Iterable[np.ndarray], labels: np.ndarray, params: dict, folder: Path = AUGMENTED_DIR
) -> None:
    """Write `copies` as copy_01.npy, …, the `labels` (N,) of their rows as labels.npy, and params.json.

    `params` are those that made the copies.
    """
    written = {folder / "labels.npy"}
    write_array(folder / "labels.npy", labels)
    write_text(folder / "params.json", json.dumps(params, indent=2) + "\n")  # unrounded: not metrics
    for number, copy in enumerate(copies, start=1):
        written.add(path := folder / f"copy_{number:02d}.npy")
        write_array(path, copy)
    for stale in set(folder.glob("*.npy")) - written:  # left by an earlier run with more copies
        stale.unlink()


def load_copies(folder: Path = AUGMENTED_DIR) -> tuple[list[np.ndarray], np.ndarray, dict]:
    """Read what save_copies wrote: memory-mapped copies, labels and params."""
    paths = sorted(folder.glob("copy_*.npy"))
    if not paths:
        raise StageError(f"{folder}: no copies found; `dvc repro augment_images` makes them")
    try:
        copies = [np.load(path, mmap_mode="r") for path in paths]
        labels, params = np.load(folder / "labels.npy"), read_json(folder / "params.json")
    except (ValueError, EOFError) as error:  # not .npy or JSON, or cut short
        raise StageError(f"{folder}: a file is damaged: {error}") from None
    for path, copy in zip(paths, copies, strict=True):
        if copy.shape != (len(labels), 28, 28):
            raise StageError(f"{path}: shape {copy.shape}, expected {(len(labels), 28, 28)}")
    return copies, labels, params
