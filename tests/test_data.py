"""IDX files, safetensors and splits: what is read, and the one line for what is damaged."""

import numpy as np
import pytest

from lib.copies import load_copies, save_copies
from lib.errors import StageError
from lib.files import (
    pixels_from_text,
    pixels_to_text,
    read_tensors,
    replace_atomically,
    write_json,
    write_tensors,
)
from lib.idx import IdxFile, read_idx
from lib.splits import split_indices

SMALL = IdxFile("small-idx3-ubyte", (3, 2, 2), "unused")
CONTENT = SMALL.header + bytes(range(12))


def test_an_idx_file_is_read_in_its_shape(tmp_path):
    (tmp_path / SMALL.name).write_bytes(CONTENT)
    assert read_idx(SMALL, tmp_path).tolist() == np.arange(12).reshape(3, 2, 2).tolist()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "begins with nothing, expected IDX magic 00000803"),
        (CONTENT[:-1], "27 bytes, expected 28"),
        (CONTENT + b"x", "29 bytes, expected 28"),
        (b"\1" + CONTENT[1:], "begins with 01000803, expected IDX magic 00000803"),
        (CONTENT[:7] + b"\4" + CONTENT[8:], "shape (4, 2, 2), expected (3, 2, 2)"),
        (CONTENT[:9], "shape (3,), expected (3, 2, 2)"),
    ],
)
def test_a_damaged_idx_file_is_named_with_what_was_expected(tmp_path, content, words):
    (tmp_path / SMALL.name).write_bytes(content)
    with pytest.raises(StageError, match="small-idx3-ubyte") as raised:
        read_idx(SMALL, tmp_path)
    assert words in str(raised.value)


def test_a_missing_idx_file_says_how_to_get_it(tmp_path):
    with pytest.raises(StageError, match="dvc repro fetch_fashion_mnist"):
        read_idx(SMALL, tmp_path)


def test_tensors_come_back_and_their_bytes_do_not_vary(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros(2, np.float32)}
    write_tensors(tmp_path / "one.safetensors", tensors)
    # Another order and another memory layout of the same values.
    write_tensors(tmp_path / "two.safetensors", {"a": tensors["a"], "b": np.asfortranarray(tensors["b"])})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert read_tensors(tmp_path / "one.safetensors")["b"].tolist() == tensors["b"].tolist()


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: b"\xff" * 8 + c[8:], lambda c: b"", lambda c: c[:20]]
)
def test_a_damaged_safetensors_file_is_named(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": np.zeros(4, np.float32)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StageError, match=r"x\.safetensors: not a whole safetensors file"):
        read_tensors(path)


def test_other_tensors_than_expected_are_named(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": np.zeros(4, np.float32)})
    with pytest.raises(StageError, match=r"x\.safetensors: holds a, expected images, labels"):
        read_tensors(tmp_path / "x.safetensors", "images", "labels")


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("earlier")
    with pytest.raises(IsADirectoryError), replace_atomically(path) as partial:
        partial.write_text("half") and tmp_path.read_text()
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_have_a_line_a_row_and_numbers_of_six_digits(tmp_path):
    path = tmp_path / "metrics.json"
    rows = [{"by": -1, "share": 1 / 3}, {"by": 1, "share": 2 / 3}]
    returned = write_json(path, {"loss": 1 / 7, "count": 3, "weights_sha256": ["ab"], "rows": rows})
    assert path.read_text() == (
        '{\n  "loss": 0.142857,\n  "count": 3,\n  "weights_sha256": [\n    "ab"\n  ],\n'
        '  "rows": [\n    {"by": -1, "share": 0.333333},\n    {"by": 1, "share": 0.666667}\n  ]\n}\n'
    )
    assert returned == {"loss": 0.142857, "count": 3}


def test_pixels_survive_being_text(images):
    assert (pixels_from_text(pixels_to_text(images[0])) == images[0]).all()


def test_splits_are_disjoint_complete_and_seeded():
    train, val = split_indices(100, 20, None, seed=3)
    assert sorted([*train, *val]) == list(range(100))
    assert len(val) == 20
    again, other = split_indices(100, 20, None, seed=3)[0], split_indices(100, 20, None, seed=4)[0]
    assert train.tolist() == again.tolist() != other.tolist()


def test_a_quick_look_keeps_the_validation_images():
    train, val = split_indices(100, 20, None, seed=3)
    few, same_val = split_indices(100, 20, 10, seed=3)
    assert val.tolist() == same_val.tolist()
    assert set(few) < set(train)
    assert len(few) == 10


def test_copies_come_back_and_stale_ones_go(tmp_path, images):
    labels = np.arange(16, dtype=np.uint8)
    save_copies([images, images + 1, images + 2], labels, {"copies": 3}, tmp_path)
    save_copies([images, images + 1], labels, {"copies": 2, "max_rotation": 12.3456789}, tmp_path)
    copies, read_labels, params = load_copies(tmp_path)
    assert (len(copies), params) == (2, {"copies": 2, "max_rotation": 12.3456789})
    assert (copies[1] == images + 1).all()
    assert read_labels.tolist() == labels.tolist()


def test_damaged_or_absent_copies_are_named(tmp_path, images):
    with pytest.raises(StageError, match="dvc repro augment_images"):
        load_copies(tmp_path)
    save_copies([images], np.zeros(16, np.uint8), {}, tmp_path)
    for damaged in (b"not numpy", b""):
        (tmp_path / "copy_01.npy").write_bytes(damaged)
        with pytest.raises(StageError, match="damaged"):
            load_copies(tmp_path)
    save_copies([images[:3]], np.zeros(16, np.uint8), {}, tmp_path)
    with pytest.raises(StageError, match=r"copy_01\.npy: shape \(3, 28, 28\), expected \(16, 28, 28\)"):
        load_copies(tmp_path)
