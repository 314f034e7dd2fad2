"""Recipes: the files, `fashion-cnn recipe`, and the experiment that one becomes."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from fashion_cnn.cli import cli
from fashion_cnn.commands import recipe
from fashion_cnn.commands.dvc_state import Experiment
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.params import load_params
from project import ROOT

NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def folder(workspace, monkeypatch):
    """A folder with params.yaml and recipes of its own, in which no experiment exists."""
    monkeypatch.setattr(recipe, "experiments", list)
    (workspace / "params.yaml").write_bytes((ROOT / "tests/helpers/params.yaml").read_bytes())
    (workspace / "recipes").mkdir()
    (workspace / "recipes/short.yaml").write_text(
        "# Two epochs, mirrored.\ntrain_cnn:\n  epochs: 2\n  schedule: one-cycle\n  flips: true\n"
        "  learning_rate: 1.0e-2\nsplit: {train_size: null}\n"
    )
    (workspace / "recipes/long.yaml").write_text("# A long one.\ntrain_cnn: {epochs: 9}\n")
    return workspace


def run(capsys, *arguments) -> str:
    cli(["recipe", *arguments], standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_committed_recipe(name, monkeypatch):
    """A committed recipe fits the committed params and says what it is for."""
    monkeypatch.chdir(ROOT)
    assert recipe.read_recipe(name)
    path = ROOT / f"recipes/{name}.yaml"
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines[1:]:  # each param's comment says what it is for
        assert "#" in line or line.endswith(":"), line
    committed = yaml.safe_load((ROOT / "params.yaml").read_text())
    for where, value in recipe.read_recipe(name).items():
        section, key = where.split(".")
        assert value != committed[section][key], f"{where} is {value} without this recipe, too"


def test_list_recipes(folder, capsys):
    """Without a name, the recipes are listed."""
    assert run(capsys).splitlines()[:2] == [
        "long        A long one.", "short       Two epochs, mirrored.",
    ]  # fmt: skip


def test_recipe_becomes_experiment(folder, monkeypatch, capsys):
    """A recipe becomes an experiment of the same name, with its params and no others."""
    asked = []

    def dvc(*arguments):
        asked.append(list(arguments))
        return subprocess.CompletedProcess(arguments, 7)

    monkeypatch.setattr(recipe, "run_dvc", dvc)
    before = (folder / "params.yaml").read_bytes()
    with pytest.raises(SystemExit) as ended:
        run(capsys, "short")
    assert ended.value.code == 7  # DVC's exit code
    [command] = asked
    assert command == [
        "exp", "run", "--name", "short",
        "-S", "train_cnn.epochs=2", "-S", "train_cnn.schedule=one-cycle",
        "-S", "train_cnn.flips=true", "-S", "train_cnn.learning_rate=0.01", "-S", "split.train_size=null",
    ]  # fmt: skip
    assert shlex.split(capsys.readouterr().out) == ["dvc", *command]  # as a person would type it
    assert (folder / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("train_cnn: {epoch: 3}", "train_cnn.epoch is not a known key; did you mean epochs?"),
        ("train_cn: {epochs: 3}", "train_cn is not a known key; did you mean train_cnn?"),
        ("train_cnn: {epochs: 0}", "train_cnn.epochs is 0, expected an integer from 1 to 1000"),
        ("train_cnn: 3", "expected sections of params.yaml, each with some of its keys"),
        ("- train_cnn", "expected sections of params.yaml, each with some of its keys"),
        ("", "expected sections of params.yaml, each with some of its keys"),
        ("train_cnn: [", "not valid YAML"),
        ("train_cnn: {}", "changes nothing, expected a param and its value"),
    ],
)
def test_wrong_recipe(folder, content, line):
    """A recipe that does not fit is refused in one line."""
    (folder / "recipes/wrong.yaml").write_text(content)
    with pytest.raises(StageError) as raised:
        recipe.read_recipe("wrong")
    assert str(raised.value).startswith("recipes/wrong.yaml: ")
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["nope", "", "../params", "short.yaml"])
def test_unknown_recipe(folder, name):
    """The error on an unknown name lists the names there are."""
    with pytest.raises(
        StageError, match=f"{name}: no recipe of this name, expected one of recipes/: long, short$"
    ):
        recipe.read_recipe(name)


def test_recipe_has_run(folder, monkeypatch, capsys):
    """The error on a recipe that has already run says how to get its experiment back."""
    made = Experiment("short", "0" * 40, "refs/exps/…", 0)
    monkeypatch.setattr(recipe, "experiments", lambda: [made])
    with pytest.raises(StageError, match=r"dvc exp apply short.*dvc exp remove short"):
        run(capsys, "short")


@pytest.mark.parametrize("content", ["", "\xff", "train_cnn:\n  epochs: 1\n"])
def test_recipe_without_purpose(folder, capsys, content):
    """A file that does not state its purpose is listed without one."""
    (folder / "recipes/bare.yaml").write_bytes(content.encode("latin-1"))
    assert run(capsys).splitlines()[0] == "bare        "


def test_no_recipes(folder):
    """The error says so if there are no recipes."""
    shutil.rmtree(folder / "recipes")
    with pytest.raises(
        StageError, match="short: no recipe of this name, expected one of recipes/: it is empty"
    ):
        recipe.read_recipe("short")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ladder", "run"])
def test_benchmarks_start(script):
    """The benchmarks start and print their help."""
    command = [sys.executable, ROOT / f"benchmarks/{script}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def in_ladder(code: str) -> object:
    """Evaluate an expression in a process of its own: ladder's modules share names with tests' helpers."""
    command = [sys.executable, "-c", f"import json, ladder; print(json.dumps({code}))"]
    settings = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_ladder_rungs():
    """Every rung of the ladder fits the params and adds one idea to the one before it."""
    params = load_params(ROOT / "params.yaml").model_dump()
    rungs = in_ladder("ladder.rungs()")
    assert set(NAMES) <= set(rungs)
    for settings in rungs.values():
        for where in settings:
            section, key = where.split(".")
            assert key in params[section]
    steps = [rungs[name] for name in rungs if name not in NAMES] + [rungs["fast"]]
    assert [settings.pop("train_cnn.epochs", None) for settings in steps] == [None, *[6] * 6, 10, 10]
    for before, after in itertools.pairwise(steps):
        assert before.items() < after.items()


@pytest.mark.slow
def test_ladder_mean():
    """The mean over movements leaves out the middle and whatever lies beyond the limit."""
    rows = [{"pixels": by, "shift_x": by * by, "shift_y": 0, "n": 100} for by in range(-5, 6)]
    # 2 · (1 + 4 + 9 + 16) over four distances, two directions and two axes
    assert in_ladder(f"ladder.mean({rows}, 'pixels', 4)") == 60 / 16


@pytest.mark.slow
def test_dvc_reads_values(folder):
    """DVC reads the values as they are written.

    The test applies them as `dvc exp run -S` does to params.yaml.
    """
    from dvc.utils.hydra import apply_overrides

    command = recipe.command("short", recipe.read_recipe("short"))
    overrides = [text for flag, text in itertools.pairwise(command) if flag == "-S"]
    apply_overrides(folder / "params.yaml", overrides)
    params = load_params(folder / "params.yaml")
    assert (params.train_cnn.epochs, params.train_cnn.schedule) == (2, "one-cycle")
    assert (params.train_cnn.flips, params.train_cnn.learning_rate) == (True, 0.01)
    assert params.split.train_size is None
