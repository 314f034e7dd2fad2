"""Read what the stages write into metrics/, checking every column and cell."""

import csv
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import pixels_from_text, read_json, weights_digest


class Kind(NamedTuple):
    """The type of a column's cells: `convert` raises ValueError for a cell that is not `expected`."""

    convert: Callable[[str], object]
    expected: str


def one_of(*values: str) -> Kind:
    """A column that holds only `values`."""
    return Kind(lambda text: values[values.index(text)], "one of " + ", ".join(values))


INTEGER = Kind(int, "an integer")
NUMBER = Kind(float, "a number")
CLASS = one_of(*CLASSES)
PIXELS = Kind(pixels_from_text, "784 pixels as 1568 hexadecimal digits")

# The columns that figures are drawn from.
TOY_CURVE = {"epoch": INTEGER, "train_loss": NUMBER}
CURVE = TOY_CURVE | {"train_accuracy": NUMBER, "val_loss": NUMBER, "val_accuracy": NUMBER}
CONFUSION = {"actual": CLASS, "predicted": CLASS}
SHIFT_COLUMNS = {"pixels": INTEGER, "shift_x": NUMBER, "shift_y": NUMBER, "n": INTEGER}
ROTATION_COLUMNS = {"degrees": INTEGER, "rotation": NUMBER, "n": INTEGER}
MISTAKES = {"label": CLASS, "prediction": CLASS, "confidence": NUMBER, "pixels": PIXELS}


def read_table(path: Path, columns: dict[str, Kind], others: Kind | None = None) -> list[dict]:
    """Read `columns` of the rows that write_csv wrote, and every other column as `others`, if given.

    Raises StageError naming the file, what it holds and what was expected.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _damaged(path, f"{error}, expected CSV in UTF-8") from None
    for number, cells in enumerate(rows, start=1):
        if len(cells) != len(header):
            raise _damaged(path, f"row {number} has {len(cells)} cells, expected {len(header)}")
    kinds = columns if others is None else dict.fromkeys(header, others) | columns
    return _typed(path, header, [dict(zip(header, cells, strict=True)) for cells in rows], kinds)


def read_rows(path: Path, name: str, columns: dict[str, Kind]) -> list[dict]:
    """Read `columns` of the rows that write_json wrote as `name`; raises the same errors as read_table."""
    rows = read_json(path).get(name)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _damaged(path, f"{name} is {reprlib.repr(rows)}, expected a list of rows")
    return _typed(path, list(rows[0]) if rows else [], rows, columns)


def read_weights_sha256(path: Path) -> str:
    """The digest of the weights in a training's metrics. Raises StageError if there is none."""
    metrics = read_json(path)
    if digest := weights_digest(metrics):
        return digest
    found = reprlib.repr(metrics.get("weights_sha256"))
    raise _damaged(path, f"weights_sha256 is {found}, expected a list of one SHA-256")


def _typed(path: Path, header: list[str], rows: list[dict], kinds: dict[str, Kind]) -> list[dict]:
    if not rows:
        raise _damaged(path, "no rows, expected at least one")
    if missing := [name for name in kinds if name not in header]:
        found = reprlib.repr(", ".join(header))
        raise _damaged(path, f"its columns are {found}, expected {', '.join(missing)} as well")
    return [
        {name: _convert(path, number, name, row.get(name), kind) for name, kind in kinds.items()}
        for number, row in enumerate(rows, start=1)
    ]


def _convert(path: Path, number: int, name: str, cell: object, kind: Kind) -> object:
    try:
        return kind.convert(str(cell))
    except ValueError:
        what = f"{name} is {reprlib.repr(cell)} in row {number}, expected {kind.expected}"
        raise _damaged(path, what) from None


def _damaged(path: Path, what: str) -> StageError:
    return StageError(f"{path}: {what}; `dvc repro` writes it again")
