"""params.yaml: what is accepted, and the one line for what is not."""

import pytest
import yaml
from conftest import ROOT

from lib.errors import StageError
from lib.params import leaves, load_params

GOOD = yaml.safe_load((ROOT / "tests/params.yaml").read_text())


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
        load_params("split", path=path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_only_the_named_sections_come():
    params = load_params("split", "train_cnn", path=ROOT / "tests/params.yaml")
    assert sorted(vars(params)) == ["split", "train_cnn"]
    assert leaves(params)["train_cnn.epochs"] == GOOD["train_cnn"]["epochs"]


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("train_cnn.epochs", "five", ["train_cnn.epochs", "'five'", "an integer from 1 to 1000"]),
        ("train_cnn.epochs", True, ["train_cnn.epochs", "True", "an integer"]),
        ("train_cnn.epochs", 2.5, ["train_cnn.epochs", "2.5", "an integer"]),
        ("train_cnn.epochs", None, ["train_cnn.epochs", "None", "an integer"]),
        ("train_cnn.epochs", 0, ["train_cnn.epochs", "0", "from 1"]),
        ("train_cnn.learning_rate", float("nan"), ["train_cnn.learning_rate", "nan", "a number above 0"]),
        ("train_cnn.learning_rate", float("inf"), ["train_cnn.learning_rate", "inf", "at most 1"]),
        ("train_cnn.learning_rate", -0.1, ["train_cnn.learning_rate", "-0.1", "above 0"]),
        ("train_cnn.device", "gpu", ["train_cnn.device", "'gpu'", "auto, cpu, cuda"]),
        ("train_cnn.epoch", 3, ["train_cnn.epoch", "not a known key", "did you mean epochs?"]),
        (True, 5, ["1 is not a known key"]),  # what YAML makes of `on: 5`
        ("split", {**GOOD["split"], 1: 2}, ["split.1 is not a known key"]),
        ("train_cn", {}, ["train_cn", "not a known key", "did you mean train_cnn?"]),
        ("split.train_size", "all", ["split.train_size", "'all'", "or null"]),
        ("split.train_size", 59_501, ["split.train_size", "59501", "at most 59500"]),
        ("fetch.sources", [], ["fetch.sources", "a list of one or more"]),
        ("fetch.sources", "folder", ["fetch.sources", "'folder'", "a list"]),
        *[
            ("fetch.sources", ["folder", f"apt:{name}"], [f"fetch.sources.1 is 'apt:{name}'", "lower-case"])
            for name in ("-oDir::Bin::dpkg=/bin/true", "", "a", "a b", "Name", "a=1", "../x.deb")
        ],
        ("plot_results", 5, ["plot_results", "5", "a section with dpi"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(written, where, value, words):
    text = message(written(where, value))
    for word in ["params.yaml", *words]:
        assert word in text


def test_a_missing_key_is_named(tmp_path):
    params = yaml.safe_load(yaml.safe_dump(GOOD))
    del params["train_cnn"]["seed"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    assert "train_cnn.seed is missing, expected an integer from 0" in message(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"split: {seed: 0, seed: 1}", "'seed' stands twice"),
        (b"split: [", "not valid YAML"),
        (b"split: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"split: \xff", "not UTF-8"),
        (b"", "the whole file is None"),
        (b"[1, 2]", "the whole file is [1, 2]"),
        (b"? [a]\n: 1", "not valid YAML"),
        (b"split: {? {a: 1} : 2}", "not valid YAML"),
        (b"a: &a [*a]", "not"),
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
def test_a_file_that_is_not_params_is_one_line(tmp_path, content, words):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    assert words in message(path)


def test_a_missing_file_says_where_to_run(tmp_path):
    assert "run from the repository root" in message(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.001"])
def test_numbers_are_read_as_dvc_reads_them(written, text):
    path = written("train_cnn.learning_rate", "PLACE")
    path.write_text(path.read_text().replace("PLACE", text))
    assert load_params("train_cnn", path=path).train_cnn.learning_rate == 0.001


@pytest.mark.parametrize("text", ["010", "-07", "1:30", "0x10", "0b1", "1_000", "1:30.5", "1_0.5"])
def test_numbers_that_dvc_may_read_otherwise_are_refused(written, text):
    path = written("train_cnn.learning_rate", "PLACE")
    path.write_text(path.read_text().replace("PLACE", text))
    assert f"{text} is not a plain decimal number" in message(path)


def test_a_whole_number_stays_as_written(written):
    path = written("augment_images.max_rotation", 20)
    assert repr(leaves(load_params("augment_images", path=path))["augment_images.max_rotation"]) == "20"
