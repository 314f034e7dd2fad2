"""params.yaml: what is accepted, and the one-line error for anything else."""

import time
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import load_yaml

from fashion_cnn.project.errors import StageError
from fashion_cnn.project.params import leaves, load_params
from project import ROOT
from small_stages import PARAMS

GOOD = yaml.safe_load(yaml.safe_dump(PARAMS))
GOOD["split"] |= {"val_size": 5000, "train_size": None}


@pytest.fixture
def written(tmp_path):
    """Write params.yaml with the value at `where` replaced, and return its path."""

    def write(where: str, value: object):
        params = yaml.safe_load(yaml.safe_dump(GOOD))
        section, _, leaf = where.partition(".") if isinstance(where, str) else (where, "", "")
        if leaf:
            params[section][leaf] = value
        else:
            params[section] = value
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(params, sort_keys=False))
        return path

    return write


def message(path) -> str:
    with pytest.raises(StageError) as raised:
        load_params(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_project_params():
    """The project's params are valid, and they are read as DVC reads them."""
    params = load_params(ROOT / "params.yaml")
    assert params.model_dump() == load_yaml(ROOT / "params.yaml")


def test_leaves(written):
    """The leaves are those of the named sections."""
    split = {"split.seed": 7, "split.val_size": 60, "split.train_size": None}
    params = load_params(written("split", {name.removeprefix("split."): split[name] for name in split}))
    assert leaves(params, "split", "plot_results") == split | {"plot_results.dpi": params.plot_results.dpi}


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("train_cnn.epochs", "five", ["train_cnn.epochs", "'five'", "an integer from 1 to 1000"]),
        ("train_cnn.epochs", True, ["train_cnn.epochs", "True", "an integer"]),
        ("train_cnn.epochs", 2.5, ["train_cnn.epochs", "2.5", "an integer"]),
        ("train_cnn.epochs", None, ["train_cnn.epochs", "None", "an integer"]),
        ("train_cnn.epochs", 0, ["train_cnn.epochs", "0", "from 1"]),
        ("train_cnn.model", "resnet", ["train_cnn.model", "'resnet'", "one of lesson, residual"]),
        ("train_cnn.flips", 1, ["train_cnn.flips", "1", "true or false"]),
        ("train_cnn.tta_views", 3, ["train_cnn.tta_views", "3", "one of 1, 2, 6"]),
        ("train_cnn.tta_views", True, ["train_cnn.tta_views", "True", "one of 1, 2, 6"]),
        ("train_cnn.optimizer", "sgd", ["train_cnn.optimizer", "'sgd'", "one of adamw, muon"]),
        ("train_cnn.learning_rate", float("nan"), ["train_cnn.learning_rate", "nan", "a number above 0"]),
        ("train_cnn.learning_rate", float("inf"), ["train_cnn.learning_rate", "inf", "at most 1"]),
        ("train_cnn.learning_rate", -0.1, ["train_cnn.learning_rate", "-0.1", "above 0"]),
        ("train_cnn.device", "gpu", ["train_cnn.device", "'gpu'", "auto, cpu, cuda"]),
        ("train_cnn.epoch", 3, ["train_cnn.epoch", "not a known key", "did you mean epochs?"]),
        (True, 5, ["1 is not a known key"]),  # how YAML reads `on: 5`
        ("split", {**GOOD["split"], 1: 2}, ["split.1 is not a known key"]),
        ("train_cn", {}, ["train_cn", "not a known key", "did you mean train_cnn?"]),
        ("split.train_size", "all", ["split.train_size", "'all'", "or null"]),
        ("split.train_size", 55_001, ["split.train_size", "55001", "at most 55000"]),
        ("fetch.sources", [], ["fetch.sources", "a list of one or more"]),
        ("fetch.sources", "folder", ["fetch.sources", "'folder'", "a list"]),
        *[
            ("fetch.sources", ["folder", f"apt:{name}"], [f"fetch.sources.1 is 'apt:{name}'", "lower-case"])
            for name in ("-oDir::Bin::dpkg=/bin/true", "", "a", "a b", "Name", "a=1", "../x.deb")
        ],
        ("plot_results", 5, ["plot_results", "5", "a section with dpi"]),
    ],
)
def test_wrong_value(written, where, value, words):
    """The error on a wrong value names it and says what is allowed."""
    text = message(written(where, value))
    for word in ["params.yaml", *words]:
        assert word in text


@pytest.mark.parametrize(
    ("where", "value", "line"),
    [
        ("train_cnn.epochs", "five", "train_cnn.epochs is 'five', expected an integer from 1 to 1000"),
        ("split.seed", -1, "split.seed is -1, expected an integer from 0 to 4294967295"),
        ("split.train_size", "all", "split.train_size is 'all', expected an integer from 1 to 59999 or null"),
        (
            "split.train_size",
            55_001,
            "split.train_size is 55001, expected at most 55000 (60,000 - split.val_size)",
        ),
        (
            "augment_images.max_rotation",
            -0.5,
            "augment_images.max_rotation is -0.5, expected a number from 0 to 180",
        ),
        (
            "train_cnn.learning_rate",
            0,
            "train_cnn.learning_rate is 0, expected a number above 0 and at most 1",
        ),
        ("train_cnn.device", "gpu", "train_cnn.device is 'gpu', expected one of auto, cpu, cuda"),
        (
            "fetch.sources",
            [],
            "fetch.sources is [], expected a list of one or more folders, http(s) addresses "
            "or apt:<package>, in lower-case letters, digits, +, - and .",
        ),
        (
            "fetch.sources",
            ["a", 5],
            "fetch.sources.1 is 5, expected a list of one or more folders, http(s) addresses "
            "or apt:<package>, in lower-case letters, digits, +, - and .",
        ),
        ("train_cnn.epoch", 3, "train_cnn.epoch is not a known key; did you mean epochs?"),
        ("plot_results.zzz", 3, "plot_results.zzz is not a known key, expected one of dpi"),
        ("train_cn", {}, "train_cn is not a known key; did you mean train_cnn?"),
        (
            "zzzzzzzz",
            {},
            "zzzzzzzz is not a known key, expected one of fetch, split, augment_images, train_toy_cnn, "
            "verify_manual_conv, train_cnn, evaluate_cnn, plot_results",
        ),
        (
            "train_toy_cnn",
            5,
            "train_toy_cnn is 5, expected a section with seed, epochs, learning_rate",
        ),
        (
            "plot_results.dpi",
            [[1, [2]]] * 30,
            "plot_results.dpi is [[1, [2]], [1, [2]], [1, [2]], [1, [2]], "
            "[1, [2]], [1, [2]], ...], expected an integer from 50 to 600",
        ),
        (
            "plot_results.dpi",
            "x" * 200,
            f"plot_results.dpi is '{'x' * 37}...{'x' * 38}', expected an integer from 50 to 600",
        ),
    ],
)
def test_wrong_value_line(written, where, value, line):
    """The error on a wrong value or an unknown key is exactly the expected line."""
    path = written(where, value)
    assert message(path) == f"{path}: {line}"


RANGES = {
    "split.seed": (0, 4294967295),
    "split.val_size": (1, 59999),
    "split.train_size": (1, 59999),
    "augment_images.seed": (0, 4294967295),
    "augment_images.copies": (1, 20),
    "augment_images.max_shift": (0, 14),
    "augment_images.max_rotation": (0, 180),
    "train_toy_cnn.seed": (0, 4294967295),
    "train_toy_cnn.epochs": (1, 100_000),
    "verify_manual_conv.seed": (0, 4294967295),
    "verify_manual_conv.images": (1, 16),
    "train_cnn.seed": (0, 4294967295),
    "train_cnn.epochs": (1, 1000),
    "train_cnn.batch_size": (1, 32767),
    "train_cnn.weight_decay": (0, 1),
    "train_cnn.label_smoothing": (0, 0.9),
    "train_cnn.shift": (0, 14),
    "train_cnn.prune_easy": (0, 1),
    "evaluate_cnn.robustness_images": (1, 10000),
    "evaluate_cnn.mistakes": (1, 100),
    "plot_results.dpi": (50, 600),
}
ABOVE_0_AT_MOST_1 = ["train_toy_cnn.learning_rate", "verify_manual_conv.tolerance", "train_cnn.learning_rate"]


@pytest.mark.parametrize("where", RANGES)
def test_ranges(tmp_path, where):
    """Both ends of a range are accepted, and values beyond them are refused."""
    low, high = RANGES[where]
    section, leaf = where.split(".")
    for value, taken in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
        params = {name: dict(values) for name, values in PARAMS.items()}
        params["split"] |= {"val_size": 1, "train_size": 1} if leaf != "val_size" else {"train_size": None}
        params[section][leaf] = value
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(params))
        if taken:
            assert leaves(load_params(path), section)[where] == value
        else:
            assert f"{where} is {value}, expected " in message(path)
            assert f" from {low} to {high}" in message(path)


@pytest.mark.parametrize("where", ABOVE_0_AT_MOST_1)
def test_rates(written, where):
    """Rates above 0 and up to 1 are accepted, and all others are refused."""
    for value in (1e-300, 1, 1.0):
        assert leaves(load_params(written(where, value)), where.split(".")[0])[where] == value
    for value in (0, 0.0, 1.0000001, "0.1", True):
        assert "expected a number above 0 and at most 1" in message(written(where, value))


def test_ranges_are_complete():
    """The range of every number is tested."""
    numbers = {
        f"{section}.{leaf}"
        for section, values in PARAMS.items()
        for leaf, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers - {"train_cnn.tta_views"} == {
        *RANGES,
        *ABOVE_0_AT_MOST_1,
    }  # views are a list of choices, like words


def test_train_size_limit(tmp_path):
    """All train images that remain after the val split may be used to train, but no more."""
    for train_size, taken in ((59_940, True), (59_941, False)):
        params = PARAMS | {"split": {"seed": 0, "val_size": 60, "train_size": train_size}}
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(params))
        if taken:
            assert load_params(path).split.train_size == train_size
        else:
            assert "expected at most 59940 (60,000 - split.val_size)" in message(path)


def test_missing_key(tmp_path):
    """The error on a missing key names it."""
    params = yaml.safe_load(yaml.safe_dump(GOOD))
    del params["train_cnn"]["seed"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    assert "train_cnn.seed is missing, expected an integer from 0" in message(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"split: {seed: 0, seed: 1}", 'found duplicate key "seed"'),
        (b"split: [", "not valid YAML"),
        (b"split: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"split: \xff", "not UTF-8"),
        (b"", "the whole file is None"),
        (b"[1, 2]", "the whole file is [1, 2]"),
        (b"? [a]\n: 1", "fetch is missing"),
        (b"split: {? {a: 1} : 2}", "not valid YAML"),
        (b"a: &a [*a]", "fetch is missing"),
        *[
            (b"split: {seed: " + value + b"}", "params.yaml: ")
            for value in (
                b"2026-99-99",
                b"!!int x",
                b"!!float x",
                b"!!bool x",
                b"0b_",
                b"9" * 5000,
                b"[" * 3000,
                b"[" * 500 + b"]" * 500,
                b"{1: 2}",
                b"!!timestamp x",
                b"!!binary x",
            )
        ],
    ],
)
def test_invalid_file(tmp_path, content, words):
    """A file that does not contain params gives an error of one line."""
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    assert words in message(path)


def test_missing_file(tmp_path):
    """The error on a missing file says where to run the command."""
    path = tmp_path / "params.yaml"
    assert message(path) == f"{path}: not found in {Path.cwd()}; run from the repository root"


NUMBERS = {
    "0.001": 0.001, "1e-3": 0.001, "1E-3": 0.001, "1.e-3": 0.001, ".5": 0.5, "1.": 1.0, "+1": 1,
    "010": 10, "-07": -7, "09": 9, "0x10": 16, "0o10": 8, "0b1": 1, "1_000": 1000, "1_0.5": 10.5,
    "1:30": "1:30", "1:30.5": "1:30.5", "1e": "1e", "yes": "yes", "'010'": "010",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_number_formats(written, text, value):
    """A value is read as DVC reads it, or it is refused."""
    path = written("train_cnn.learning_rate", "PLACE")
    path.write_text(path.read_text().replace("PLACE", text))
    assert load_yaml(path)["train_cnn"]["learning_rate"] == value
    if isinstance(value, str) or not 0 < value <= 1:
        assert f"train_cnn.learning_rate is {value!r}, expected a number above 0" in message(path)
    else:
        read = load_params(path).train_cnn.learning_rate
        assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("section", "dpi"),
    [
        ("{<<: {dpi: 77}}", 77),
        ("{<<: {dpi: 77}, dpi: 99}", 99),  # its own value wins
        ("{dpi: 99, <<: [{dpi: 77}, {dpi: 88}]}", 99),
        ("{<<: [&a {dpi: 77}, {dpi: 88}]}", 77),
    ],
)
def test_merge_keys(tmp_path, section, dpi):
    """Merge keys are read as DVC reads them."""
    path = tmp_path / "params.yaml"
    others = {name: values for name, values in GOOD.items() if name != "plot_results"}
    path.write_text(yaml.safe_dump(others) + f"plot_results: {section}\n")
    assert load_yaml(path)["plot_results"]["dpi"] == dpi
    assert leaves(load_params(path), "plot_results") == {"plot_results.dpi": dpi}


def test_long_file(written):
    """A file that is ten times as long does not take a hundred times as long to read."""
    path = written("split", GOOD["split"] | {f"key_{number}": 1 for number in range(30_000)})
    began = time.monotonic()
    assert "split.key_0 is not a known key" in message(path)
    assert time.monotonic() - began < 15  # 2 s on a busy machine; 40 s with a pass over all keys per key


def test_whole_number(written):
    """A whole number stays as it is written, even where a fraction is allowed."""
    path = written("augment_images.max_rotation", 20)
    assert repr(load_params(path).augment_images.max_rotation) == "20"
