"""Read and write outputs: writes are atomic, and the same content gives the same bytes."""

import csv
import hashlib
import json
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from fashion_cnn.project.errors import StageError


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


def md5_of(content: bytes) -> str:
    """DVC's digest of a file's bytes, in hex; FIPS allows MD5 if it is not used for security."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with plain line feeds."""
    with replace_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, metrics: dict) -> dict:
    """Write metrics, with lists one item per line; floats keep six significant digits.

    `dvc plots` draws lists of rows, and `dvc metrics show` leaves them out. Returns the numbers as written,
    without the lists, so that MLflow shows the same.
    """
    metrics = round_floats(metrics)
    lines = [f"  {json.dumps(name)}: {_json_value(value)}" for name, value in metrics.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return numbers(metrics)


def numbers(metrics: dict) -> dict:
    """The metrics that are numbers: only these fit into MLflow and `dvc metrics show`."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def weights_digest(metrics: object) -> str | None:
    """The SHA-256 of the weights in the metrics of a training; None if there is none."""
    match metrics:
        case {"weights_sha256": [str(digest)]} if re.fullmatch("[0-9a-f]{64}", digest):
            return digest
    return None


def read_json(path: Path) -> dict:
    """Read what write_json wrote. Raises StageError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, deep nesting
        raise StageError(f"{path}: {error}; expected JSON as a stage writes it") from None
    if not isinstance(content, dict):
        raise StageError(
            f"{path}: holds {reprlib.repr(content)}, expected a JSON object as a stage writes it"
        )
    return content


def write_csv(path: Path, rows: list[dict]) -> list[dict]:
    """Write rows with the keys of the first; floats keep six significant digits. Returns them as written."""
    rows = round_floats(rows)
    with replace_atomically(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one array as .npy, which can be memory-mapped."""
    with replace_atomically(path) as partial, partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write arrays as safetensors: the same bytes for the same content, and no pickle."""
    content = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata or None)
    with replace_atomically(path) as partial:
        partial.write_bytes(content)


def read_tensors(path: Path, *expected: str) -> dict[str, np.ndarray]:
    """Read a safetensors file; if `expected` names tensors, it must hold exactly these.

    Raises StageError if it is missing, damaged, or holds other tensors.
    """
    try:
        tensors = load(path.read_bytes())
    except FileNotFoundError:
        raise StageError(f"{path}: not found, expected a safetensors file; `dvc repro` makes it") from None
    except (SafetensorError, KeyError) as error:  # KeyError: a type that NumPy lacks
        raise StageError(f"{path}: damaged, or not a safetensors file: {error}") from None
    if expected and set(tensors) != set(expected):
        raise StageError(f"{path}: holds {', '.join(tensors) or 'nothing'}, expected {', '.join(expected)}")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The `metadata` that write_tensors was given. Raises StageError as read_tensors does."""
    read_tensors(path)
    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def pixels_to_text(image: np.ndarray) -> str:
    """A (28, 28) uint8 image as hexadecimal text, for a file of metrics."""
    return image.astype(np.uint8).tobytes().hex()


def pixels_from_text(text: str) -> np.ndarray:
    """The (28, 28) uint8 image that pixels_to_text wrote."""
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(28, 28)


def round_floats(value: Any) -> Any:
    """Round floats to six significant digits, also in lists and dictionaries; anything else is unchanged."""
    if isinstance(value, dict):
        return {key: round_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _json_value(value: object) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
    return json.dumps(value)
