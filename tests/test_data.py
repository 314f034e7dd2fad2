"""IDX files, safetensors and splits: what is read, and the one-line error for a damaged file."""

import numpy as np
import pytest
from torchvision import datasets

from fashion_cnn.data.copies import load_copies, save_copies
from fashion_cnn.data.fashion_mnist import CLASSES, FILES, RAW_DIR, IdxFile, read_idx
from fashion_cnn.data.split import split_indices
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import (
    pixels_from_text,
    pixels_to_text,
    read_json,
    read_tensors,
    replace_atomically,
    round_floats,
    sha256_of,
    write_array,
    write_csv,
    write_json,
    write_tensors,
    write_text,
)

SMALL = IdxFile("small-idx3-ubyte", (3, 2, 2), "unused")
CONTENT = SMALL.header + bytes(range(12))


def test_idx_shape(tmp_path):
    """An IDX file is read in its shape."""
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
def test_damaged_idx(tmp_path, content, words):
    """The error names a damaged IDX file and says what was expected."""
    (tmp_path / SMALL.name).write_bytes(content)
    with pytest.raises(StageError, match="small-idx3-ubyte") as raised:
        read_idx(SMALL, tmp_path)
    assert str(raised.value).endswith(words)


def test_fashion_mnist_files():
    """The four files and the classes are those of Fashion-MNIST."""
    assert [(file.name, file.size, file.sha256[:8]) for file in FILES] == [
        ("train-images-idx3-ubyte", 47_040_016, "c59f468a"),
        ("train-labels-idx1-ubyte", 60_008, "bad3541b"),
        ("t10k-images-idx3-ubyte", 7_840_016, "5b4141f0"),
        ("t10k-labels-idx1-ubyte", 10_008, "0402a96d"),
    ]
    assert [file.header.hex() for file in FILES[:2]] == [
        "000008030000ea600000001c0000001c",
        "000008010000ea60",
    ]
    assert list(CLASSES) == datasets.FashionMNIST.classes
    assert RAW_DIR.as_posix() == "data/FashionMNIST/raw"


def test_idx_writable(tmp_path):
    """An IDX file is read as writable bytes."""
    (tmp_path / SMALL.name).write_bytes(CONTENT)
    values = read_idx(SMALL, tmp_path)
    assert values.dtype == np.uint8
    values += 1  # torch warns about read-only arrays


def test_missing_idx(tmp_path):
    """The error for a missing IDX file says how to get it."""
    with pytest.raises(StageError) as raised:
        read_idx(SMALL, tmp_path)
    path = tmp_path / SMALL.name
    assert str(raised.value) == f"{path}: not found; `dvc repro fetch_fashion_mnist` fetches it"


def test_tensors_round_trip(tmp_path):
    """Tensors are read as they were written, and the same values give the same bytes."""
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros(2, np.float32)}
    write_tensors(tmp_path / "one.safetensors", tensors)
    # The same values in another order and another memory layout.
    write_tensors(tmp_path / "two.safetensors", {"a": tensors["a"], "b": np.asfortranarray(tensors["b"])})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert read_tensors(tmp_path / "one.safetensors")["b"].tolist() == tensors["b"].tolist()


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: b"\xff" * 8 + c[8:], lambda c: b"", lambda c: c[:20]]
)
def test_damaged_safetensors(tmp_path, damage):
    """The error names a damaged safetensors file."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": np.zeros(4, np.float32)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StageError, match=r"x\.safetensors: damaged, or not a safetensors file"):
        read_tensors(path)


def test_unexpected_tensors(tmp_path):
    """The error names tensors other than the expected ones."""
    write_tensors(tmp_path / "x.safetensors", {"a": np.zeros(4, np.float32)})
    with pytest.raises(StageError, match=r"x\.safetensors: holds a, expected images, labels"):
        read_tensors(tmp_path / "x.safetensors", "images", "labels")


def test_failed_write(tmp_path):
    """A failed write leaves the earlier file in place."""
    path = tmp_path / "out.txt"
    path.write_text("earlier")
    with pytest.raises(IsADirectoryError), replace_atomically(path) as partial:
        partial.write_text("half") and tmp_path.read_text()
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_round_floats():
    """`round_floats` keeps six significant digits."""
    assert round_floats(1 / 3) == 0.333333
    assert round_floats(123456.7) == 123457.0
    assert round_floats(1234567) == 1234567  # not a float
    assert round_floats("0.1234567") == "0.1234567"
    assert round_floats(float("nan")) != round_floats(float("nan"))


def test_write_json_round_trip(tmp_path):
    """Metrics are written as they are returned, and read as they were written."""
    path = tmp_path / "new/folder/m.json"
    written = write_json(path, {"loss": 1 / 3, "n": 7, "names": ["é"]})
    assert written == {"loss": 0.333333, "n": 7}
    assert read_json(path) == written | {"names": ["é"]}
    assert path.read_bytes().endswith(b"\n}\n") is True
    assert path.read_text().startswith('{\n  "loss": 0.333333,\n')


@pytest.mark.parametrize("content", [b"{", b"", b"\xff"])
def test_damaged_json(tmp_path, content):
    """The error names a damaged JSON file."""
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(StageError, match=r"/m\.json: .*; expected JSON as a stage writes it$"):
        read_json(path)


def test_json_not_an_object(tmp_path):
    """The error shows JSON that is not an object."""
    (tmp_path / "m.json").write_text("[1, 2]")
    with pytest.raises(StageError, match=r"m\.json: holds \[1, 2\], expected a JSON object"):
        read_json(tmp_path / "m.json")


def test_write_csv(tmp_path):
    """Rows are written as they are returned."""
    path = tmp_path / "new/t.csv"
    rows = [{"epoch": 1, "loss": 1 / 3, "name": 'é, "x"'}, {"epoch": 2, "loss": 0.5, "name": ""}]
    assert write_csv(path, rows) == [rows[0] | {"loss": 0.333333}, rows[1]]
    assert path.read_bytes() == 'epoch,loss,name\n1,0.333333,"é, ""x"""\n2,0.5,\n'.encode()


def test_write_csv_one_row(tmp_path):
    """A single row is written as a table."""
    write_csv(tmp_path / "t.csv", [{"epoch": 1}])
    assert (tmp_path / "t.csv").read_text() == "epoch\n1\n"


def test_write_text(tmp_path):
    """Text is written as UTF-8 with plain line feeds."""
    write_text(tmp_path / "t.md", "é\n4×4\n")
    assert (tmp_path / "t.md").read_bytes() == b"\xc3\xa9\n4\xc3\x974\n"


def test_sha256_of(tmp_path):
    """`sha256_of` gives the digest of a file's bytes."""
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_write_array(tmp_path):
    """An array is read as it was written, and an array of objects is refused."""
    write_array(tmp_path / "a.npy", np.arange(3))
    assert np.load(tmp_path / "a.npy", allow_pickle=False).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="pickle"):
        write_array(tmp_path / "a.npy", np.array([{}], object))
    assert np.load(tmp_path / "a.npy", allow_pickle=False).tolist() == [0, 1, 2]


def test_replace_atomically(tmp_path):
    """A file appears only when it is whole."""
    path = tmp_path / "new/out.txt"
    with replace_atomically(path) as partial:
        partial.write_text("half")
        assert partial.parent == path.parent  # on the same disk, so that it can be renamed
        assert partial.name == ".out.txt.part"
        assert not path.exists()
    assert path.read_text() == "half"
    with replace_atomically(path) as partial:  # into an existing folder
        partial.write_text("whole")
    assert path.read_text() == "whole"


def test_missing_tensors(tmp_path):
    """The error for missing tensors says how to get them."""
    with pytest.raises(StageError) as raised:
        read_tensors(tmp_path / "x.safetensors")
    words = "not found, expected a safetensors file; `dvc repro` makes it"
    assert str(raised.value) == f"{tmp_path}/x.safetensors: {words}"
    write_tensors(tmp_path / "x.safetensors", {"a": np.zeros(1), "b": np.zeros(1)})
    with pytest.raises(StageError, match=r"holds (a, b|b, a), expected images, labels$"):
        read_tensors(tmp_path / "x.safetensors", "images", "labels")
    write_tensors(tmp_path / "x.safetensors", {})
    with pytest.raises(StageError, match=r"holds nothing, expected images$"):
        read_tensors(tmp_path / "x.safetensors", "images")


def test_write_json_layout(tmp_path):
    """Metrics have one line per row, and numbers have six digits."""
    path = tmp_path / "metrics.json"
    rows = [{"by": -1, "share": 1 / 3}, {"by": 1, "share": 2 / 3}]
    returned = write_json(path, {"loss": 1 / 7, "count": 3, "weights_sha256": ["ab"], "rows": rows})
    assert path.read_text() == (
        '{\n  "loss": 0.142857,\n  "count": 3,\n  "weights_sha256": [\n    "ab"\n  ],\n'
        '  "rows": [\n    {"by": -1, "share": 0.333333},\n    {"by": 1, "share": 0.666667}\n  ]\n}\n'
    )
    assert returned == {"loss": 0.142857, "count": 3}


def test_pixels_round_trip(images):
    """Pixels survive the conversion to text and back."""
    assert (pixels_from_text(pixels_to_text(images[0])) == images[0]).all()


def test_split_indices():
    """Splits are disjoint and complete, and depend on the seed."""
    train, val = split_indices(100, 20, None, seed=3)
    assert sorted([*train, *val]) == list(range(100))
    assert [list(train), list(val)] == [sorted(train), sorted(val)]
    assert set(val) == set(np.random.default_rng(3).permutation(100)[:20])
    assert len(val) == 20
    again, other = split_indices(100, 20, None, seed=3)[0], split_indices(100, 20, None, seed=4)[0]
    assert train.tolist() == again.tolist() != other.tolist()


def test_split_train_size():
    """A quick look with few train images keeps the validation images."""
    train, val = split_indices(100, 20, None, seed=3)
    few, same_val = split_indices(100, 20, 10, seed=3)
    assert val.tolist() == same_val.tolist()
    assert set(few) < set(train)
    assert len(few) == 10


def test_copies_round_trip(tmp_path, images):
    """Copies are read as they were saved, and saving deletes stale ones."""
    labels = np.arange(16, dtype=np.uint8)
    save_copies([images, images + 1, images + 2], labels, {"copies": 3}, tmp_path)
    save_copies([images, images + 1], labels, {"copies": 2, "max_rotation": 12.3456789}, tmp_path)
    copies, read_labels, params = load_copies(tmp_path)
    assert (len(copies), params) == (2, {"copies": 2, "max_rotation": 12.3456789})
    assert isinstance(copies[0], np.memmap)  # 47 MB each
    names = ["copy_01.npy", "copy_02.npy", "labels.npy", "params.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "params.json").read_text() == '{\n  "copies": 2,\n  "max_rotation": 12.3456789\n}\n'
    assert (copies[1] == images + 1).all()
    assert read_labels.tolist() == labels.tolist()


def test_damaged_copies(tmp_path, images):
    """The error names damaged or absent copies."""
    with pytest.raises(StageError) as raised:
        load_copies(tmp_path)
    assert str(raised.value) == f"{tmp_path}: no copies found; `dvc repro augment_images` makes them"
    save_copies([images], np.zeros(16, np.uint8), {}, tmp_path)
    for damaged in (b"not numpy", b""):
        (tmp_path / "copy_01.npy").write_bytes(damaged)
        with pytest.raises(StageError, match=f"^{tmp_path}: a file is damaged: "):
            load_copies(tmp_path)
    save_copies([images[:3]], np.zeros(16, np.uint8), {}, tmp_path)
    with pytest.raises(StageError, match=r"copy_01\.npy: shape \(3, 28, 28\), expected \(16, 28, 28\)"):
        load_copies(tmp_path)
