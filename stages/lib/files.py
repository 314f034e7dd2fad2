"""Reading and writing outputs: whole or not at all, and the same bytes for the same content."""

import csv
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lib.errors import StageError


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path; it takes the place of `path` only when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with plain line feeds."""
    with replace_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, metrics: dict) -> None:
    """Write metrics; floats keep six significant digits, enough to read and to compare."""
    write_text(path, json.dumps({key: _round(value) for key, value in metrics.items()}, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """Read what write_json wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows that share the keys of the first; floats keep six significant digits."""
    with replace_atomically(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _round(value) for key, value in row.items()} for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read rows as write_csv wrote them; every value is text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one array as .npy, which can be memory-mapped."""
    with replace_atomically(path) as partial, partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write arrays as safetensors: the same bytes for the same content, and no pickle."""
    with replace_atomically(path) as partial:
        try:
            save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, partial)
        except SafetensorError as error:  # safetensors' own word for a full disk and the like
            raise StageError(f"{path}: cannot be written: {error}") from None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file. Raises StageError where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise StageError(f"{path}: not found, expected a safetensors file; `dvc repro` makes it") from None
    except SafetensorError as error:
        raise StageError(f"{path}: not a whole safetensors file: {error}") from None


def pixels_to_text(image: np.ndarray) -> str:
    """A (28, 28) uint8 image as hexadecimal text, for a CSV cell."""
    return image.astype(np.uint8).tobytes().hex()


def pixels_from_text(text: str) -> np.ndarray:
    """The (28, 28) uint8 image that pixels_to_text wrote."""
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(28, 28)


def _round(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value
