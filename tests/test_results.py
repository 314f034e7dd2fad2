"""Tables and metrics that are read back: what is read, and the one-line error for a damaged file."""

import subprocess
import sys

import numpy as np
import pytest

from fashion_cnn.lesson import results
from fashion_cnn.lesson.results import INTEGER, NUMBER, one_of, read_rows, read_table, read_weights_sha256
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import pixels_to_text, read_json, write_csv, write_json
from project import STAGES

CURVE = b"epoch,train_loss\n1,0.5\n2,nan\n"
PIXELS = pixels_to_text(np.arange(784).reshape(28, 28))


def test_read_types(tmp_path):
    """Rows are read with the types of their columns."""
    path = tmp_path / "table.csv"
    row = {"label": "T-shirt/top", "prediction": "Bag", "confidence": 0.5, "pixels": PIXELS}
    write_csv(path, [row | {"unread": "x"}])
    write_json(tmp_path / "table.json", {"rows": [row | {"unread": [1]}]})
    for [read] in (
        read_table(path, results.MISTAKES),
        read_rows(tmp_path / "table.json", "rows", results.MISTAKES),
    ):
        assert (read.pop("pixels") == np.arange(784).reshape(28, 28) % 256).all()
        assert read == {"label": "T-shirt/top", "prediction": "Bag", "confidence": 0.5}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "shifts is None, expected a list of rows"),
        ('{"shifts": 5}', "shifts is 5, expected a list of rows"),
        ('{"shifts": [5]}', "shifts is [5], expected a list of rows"),
        ('{"shifts": []}', "no rows, expected at least one"),
        ('{"shifts": [{"pixels": 1}]}', "its columns are 'pixels', expected shift_x, shift_y, n as well"),
        (
            '{"shifts": [{"pixels": "x", "shift_x": 1, "shift_y": 1, "n": 9}]}',
            "pixels is 'x' in row 1, expected an integer",
        ),
        (
            '{"shifts": [{"pixels": 1, "shift_x": 1, "shift_y": 1, "n": 9}, {}]}',
            "pixels is None in row 2, expected an integer",
        ),
    ],
)
def test_damaged_metrics_rows(tmp_path, content, words):
    """The error for damaged rows in metrics says what is wrong and what was expected."""
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(StageError) as raised:
        read_rows(path, "shifts", results.SHIFT_COLUMNS)
    assert str(raised.value) == f"{path}: {words}; `dvc repro` writes it again"


def test_other_columns(tmp_path):
    """Columns that are not named are read with the type that is given for others."""
    path = tmp_path / "table.csv"
    path.write_text("epoch,more\n7,0.25\n")
    assert read_table(path, {"epoch": INTEGER}, others=NUMBER) == [{"epoch": 7, "more": 0.25}]


def test_non_finite_loss(tmp_path):
    """A loss that is not finite is read as a number."""
    (tmp_path / "curve.csv").write_bytes(CURVE)
    losses = [row["train_loss"] for row in read_table(tmp_path / "curve.csv", results.TOY_CURVE)]
    assert losses[0] == 0.5
    assert np.isnan(losses[1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no rows, expected at least one"),
        (b"epoch,loss\n1,2\n", "its columns are 'epoch, loss', expected train_loss as well"),
        (b"\xef\xbb\xbf" + CURVE, "expected epoch as well"),
        (b"epoch,train_loss\n", "no rows, expected at least one"),
        (CURVE + b"3,\n", "train_loss is '' in row 3, expected a number"),
        (CURVE + b"3,low\n", "train_loss is 'low' in row 3, expected a number"),
        (CURVE + b"3.5,1\n", "epoch is '3.5' in row 3, expected an integer"),
        (CURVE + b"3,0.5\x00\n", r"train_loss is '0.5\x00' in row 3, expected a number"),
        (CURVE + b"3\n", "row 3 has 1 cells, expected 2"),
        (CURVE + b"3,1,2\n", "row 3 has 3 cells, expected 2"),
        (CURVE + b"\n", "row 3 has 0 cells, expected 2"),
        (CURVE + b"3,0.5\xff\n", "expected CSV in UTF-8"),
        (CURVE + b'3,"0.5\n', "expected CSV in UTF-8"),
        (CURVE + b"3," + b"1" * 200_000 + b"\n", "expected CSV in UTF-8"),
    ],
)
def test_damaged_table(tmp_path, content, words):
    """The error for a damaged table names its file and what was expected."""
    path = tmp_path / "curve.csv"
    path.write_bytes(content)
    with pytest.raises(StageError) as raised:
        read_table(path, results.TOY_CURVE)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert message.endswith("; `dvc repro` writes it again")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("columns", "cells", "words"),
    [
        (results.CONFUSION, ["Hat", "Bag"], "actual is 'Hat' in row 1, expected one of T-shirt/top, Trouser"),
        (results.MISTAKES, ["Bag", "Coat", "1", PIXELS[:-2]], "expected 784 pixels as 1568 hexadecimal"),
        (results.MISTAKES, ["Bag", "Coat", "1", PIXELS + "00"], "expected 784 pixels as 1568 hexadecimal"),
        (results.MISTAKES, ["Bag", "Coat", "1", "x" + PIXELS[1:]], "expected 784 pixels as 1568 hexadecimal"),
        (results.MISTAKES, ["Bag", "Coat", "1", ""], "pixels is '' in row 1, expected 784 pixels"),
    ],
)
def test_invalid_cell(tmp_path, columns, cells, words):
    """The error for a cell that does not fit its column names the cell."""
    path = tmp_path / "table.csv"
    path.write_text(f"{','.join(columns)}\n{','.join(cells)}\n")
    with pytest.raises(StageError) as raised:
        read_table(path, columns)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "content",
    ["{}", '{"weights_sha256": 1}', '{"weights_sha256": []}', '{"weights_sha256": ["ab", "cd"]}',
     '{"weights_sha256": ["ab"]}'],
)  # fmt: skip
def test_invalid_weights_digest(tmp_path, content):
    """The error for metrics without a valid digest of weights names their file."""
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(
        StageError, match=r"metrics\.json: weights_sha256 is .*, expected a list of one SHA-256"
    ):
        read_weights_sha256(path)


def test_read_weights_digest(tmp_path):
    """The digest of the weights is read from their metrics."""
    (tmp_path / "metrics.json").write_text(f'{{"weights_sha256": ["{"ab" * 32}"]}}')
    assert read_weights_sha256(tmp_path / "metrics.json") == "ab" * 32


@pytest.mark.parametrize("content", [b"[1]", b"5", b"null", b"{", b"\xff", b"", b"[" * 100_000])
def test_json_without_object(tmp_path, content):
    """The error for JSON that does not hold an object names its file."""
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(StageError, match=r"metrics\.json: .*expected (a )?JSON") as raised:
        read_json(tmp_path / "metrics.json")
    assert "\n" not in str(raised.value)


def test_a_stage_says_so_in_one_line(workspace):
    """A stage reports a damaged table in one line."""
    (workspace / "metrics").mkdir()
    (workspace / "metrics/train_toy_cnn.csv").write_bytes(CURVE[:-4])
    command = [sys.executable, str(STAGES / "plot_results.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: metrics/train_toy_cnn.csv: train_loss is '' in row 2, expected a number; "
        "`dvc repro` writes it again\n"
    )


def test_one_of():
    """A column that is one of several texts accepts only these and names them."""
    kind = one_of("a", "b", "c")
    assert [kind.convert(text) for text in "abc"] == ["a", "b", "c"]
    assert kind.expected == "one of a, b, c"
    with pytest.raises(ValueError, match="not in tuple"):
        kind.convert("d")


def test_wrong_digest_shown(tmp_path):
    """The error for a wrong digest shows the digest."""
    (tmp_path / "m.json").write_text('{"weights_sha256": ["ab"]}')
    with pytest.raises(StageError, match=r"weights_sha256 is \['ab'\], expected a list of one SHA-256"):
        read_weights_sha256(tmp_path / "m.json")
