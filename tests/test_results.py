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


def test_rows_come_back_with_their_types(tmp_path):
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
def test_damaged_rows_in_metrics_are_named(tmp_path, content, words):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(StageError) as raised:
        read_rows(path, "shifts", results.SHIFT_COLUMNS)
    assert str(raised.value) == f"{path}: {words}; `dvc repro` writes it again"


def test_columns_that_are_not_named_are_read_as_others(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("epoch,more\n7,0.25\n")
    assert read_table(path, {"epoch": INTEGER}, others=NUMBER) == [{"epoch": 7, "more": 0.25}]


def test_a_loss_that_is_not_finite_is_a_number(tmp_path):
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
def test_a_damaged_table_is_named_with_what_was_expected(tmp_path, content, words):
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
def test_a_cell_that_is_none_of_its_column_is_named(tmp_path, columns, cells, words):
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
def test_metrics_without_a_digest_of_weights_are_named(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(
        StageError, match=r"metrics\.json: weights_sha256 is .*, expected a list of one SHA-256"
    ):
        read_weights_sha256(path)


def test_metrics_give_the_digest_of_their_weights(tmp_path):
    (tmp_path / "metrics.json").write_text(f'{{"weights_sha256": ["{"ab" * 32}"]}}')
    assert read_weights_sha256(tmp_path / "metrics.json") == "ab" * 32


@pytest.mark.parametrize("content", [b"[1]", b"5", b"null", b"{", b"\xff", b"", b"[" * 100_000])
def test_json_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(StageError, match=r"metrics\.json: .*expected (a )?JSON") as raised:
        read_json(tmp_path / "metrics.json")
    assert "\n" not in str(raised.value)


def test_a_stage_says_so_in_one_line(workspace):
    (workspace / "metrics").mkdir()
    (workspace / "metrics/train_toy_cnn.csv").write_bytes(CURVE[:-4])
    command = [sys.executable, str(STAGES / "plot_results.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: metrics/train_toy_cnn.csv: train_loss is '' in row 2, expected a number; "
        "`dvc repro` writes it again\n"
    )


def test_a_kind_of_text_takes_its_values_and_names_them():
    kind = one_of("a", "b", "c")
    assert [kind.convert(text) for text in "abc"] == ["a", "b", "c"]
    assert kind.expected == "one of a, b, c"
    with pytest.raises(ValueError, match="not in tuple"):
        kind.convert("d")


def test_a_wrong_digest_is_shown(tmp_path):
    (tmp_path / "m.json").write_text('{"weights_sha256": ["ab"]}')
    with pytest.raises(StageError, match=r"weights_sha256 is \['ab'\], expected a list of one SHA-256"):
        read_weights_sha256(tmp_path / "m.json")
