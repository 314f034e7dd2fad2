"""`fashion-cnn back`, and what `make repro` prints at its end, in a project of two stages."""

import io
import json
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from crash import Started, kill, stage_processes, wait_for_text, wait_until_gone
from fashion_cnn.commands import repair, summary
from pipeline import dvc, ran, set_params, tool, try_tool, two_stages
from project import git

pytestmark = pytest.mark.slow

WEIGHTS = Path("models/toy_cnn.safetensors")
# Replaces train_toy_cnn, without torch and MLflow, which take seconds and do not matter to `back`.
STAND_IN = """
import time
import numpy as np
from fashion_cnn.project.params import load_params
from fashion_cnn.project.files import write_csv, write_json, write_tensors
from fashion_cnn.project.process import run_stage
from fashion_cnn.project.catalog import TOY, TOY_HISTORY

def main():
    params = load_params().train_toy_cnn
    if params.epochs == 99999:
        time.sleep(600)
    write_tensors(TOY.weights, {"weights": np.array([params.seed, params.epochs])})
    write_csv(TOY_HISTORY, [{"epoch": 1}])
    write_csv(TOY.curve, [{"epoch": 1, "train_loss": params.seed}])
    write_json(TOY.metrics, {"train_loss": params.seed})

run_stage(main)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return two_stages(tmp_path_factory.mktemp("back") / "project", training=STAND_IN)


def changes(project: Path) -> str:
    return git(project, "status", "--porcelain")


def assert_back_without_training(project: Path, weights: bytes) -> None:
    assert (project / WEIGHTS).exists() is False or (project / WEIGHTS).read_bytes() != weights
    assert ran(tool(project, "back")) == []
    assert changes(project) == ""
    assert (project / WEIGHTS).read_bytes() == weights


def test_back_from_edit(project):
    """`back` restores the committed params and results after an edit and a `dvc repro`."""
    weights = (project / WEIGHTS).read_bytes()
    set_params(project, {"train_toy_cnn": {"seed": 1}})
    dvc(project, "repro")
    assert_back_without_training(project, weights)


def test_back_from_experiment(project):
    """`back` returns from an experiment, which DVC keeps."""
    weights = (project / WEIGHTS).read_bytes()
    dvc(project, "exp", "run", "--name", "other-seed", "-S", "train_toy_cnn.seed=1")
    other = (project / WEIGHTS).read_bytes()
    assert_back_without_training(project, weights)
    dvc(project, "exp", "apply", "other-seed")
    assert (project / WEIGHTS).read_bytes() == other


@pytest.fixture
def training(project) -> Iterator[Started]:
    """A `dvc exp run` whose training outlasts every test."""
    command = ("-m", "dvc", "exp", "run", "-S", "train_toy_cnn.epochs=99999")
    started = Started(project, project.parent / "logs/training.log", *command)
    wait_for_text(started, "Running stage 'train_toy_cnn'")
    assert not started.ended()
    time.sleep(1)
    yield started
    kill_all(started)


def kill_all(started: Started) -> None:
    running = stage_processes(started.project)
    kill(started, "both")
    assert wait_until_gone(running, timeout=10)


def branch(project: Path) -> str:
    return git(project, "branch", "--show-current").strip()


def test_back_from_killed_experiment(finished, project, training):
    """`back` returns from an experiment that was killed."""
    weights = (finished / WEIGHTS).read_bytes()
    kill_all(training)
    assert branch(project) == ""
    assert_back_without_training(project, weights)
    assert branch(project) == branch(finished)
    assert ran(dvc(project, "exp", "run", "-S", "train_toy_cnn.epochs=101").stdout) == ["train_toy_cnn"]


def test_back_refused_while_dvc_runs(project, training):
    """`back` changes nothing while DVC is at work."""
    assert "-S train_toy_cnn.epochs=99999` is running here" in refused(project)
    assert yaml.safe_load((project / "params.yaml").read_text())["train_toy_cnn"]["epochs"] == 99999


def refused(project: Path) -> str:
    done = try_tool(project, "back")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    return line


def test_drop_folders_absent_from_cache(tmp_path, monkeypatch):
    """Folders that DVC's cache lacks are dropped from dvc.lock, too.

    DVC lists them with a trailing slash.
    """
    monkeypatch.chdir(tmp_path)
    out = {"path": "data/augmented", "md5": "ab.dir", "hash": "md5"}
    entries = {name: {"cmd": "true", "outs": [out | {"path": name}]} for name in ("data/augmented", "models")}
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": entries}))
    told = Mock(returncode=0, stdout=json.dumps({"not_in_cache": ["data/augmented/"]}))
    monkeypatch.setattr(repair, "run_dvc", lambda *_, **__: told)
    repair.drop_unknown_results()
    assert list(yaml.safe_load(Path("dvc.lock").read_text())["stages"]) == ["models"]


def test_git_index_lock(project):
    """The error names git's lock file and says to remove it."""
    (project / ".git/index.lock").touch()
    assert re.search(r"index\.lock': File exists\. .* remove the file manually to continue", refused(project))


def test_back_with_truncated_rwlock(project):
    """`back` works even if DVC's list of readers and writers was cut short."""
    weights = (project / WEIGHTS).read_bytes()
    set_params(project, {"train_toy_cnn": {"seed": 1}})
    dvc(project, "repro")
    (project / ".dvc/tmp/rwlock").write_text("")
    assert_back_without_training(project, weights)


@pytest.mark.parametrize("ref", ["refs/stash", "refs/exps/exec/EXEC_MERGE"])
def test_changes_kept_by_killed_experiment(project, ref):
    """`back` names changes of code that a killed experiment kept in git, and the command to restore them."""
    name, notes = branch(project), project / "my notes.txt"
    for text in ("one", "two"):
        notes.write_text(text)
        git(project, "add", notes.name)
        git(project, "commit", "--quiet", "--message", text)
    notes.write_text("not committed")
    set_params(project, {"train_toy_cnn": {"seed": 1}})
    kept = git(project, "stash", "create").strip()
    git(project, "update-ref", ref, kept)
    git(project, "update-ref", "refs/exps/stash", kept)  # DVC would run it before the next experiment
    git(project, "reset", "--quiet", "--hard")
    git(project, "checkout", "--quiet", git(project, "rev-parse", "HEAD").strip())
    (project / ".dvc/tmp/repro.dat").touch()
    git(project, "add", "--force", ".dvc/tmp/repro.dat")

    told = tool(project, "back")
    assert (branch(project), changes(project)) == (name, "")
    assert not (project / ".git/refs/exps/stash").exists()
    command = f"git restore --source={ref} -- 'my notes.txt'"
    assert told.splitlines()[-1] == f"git has changes that your files lack; to restore them: {command}"
    git(project, *shlex.split(command)[1:])
    assert notes.read_text() == "not committed"
    assert "git has changes" not in tool(project, "back")
    git(project, "commit", "--quiet", "--all", "--message", "three")
    assert "git has changes" not in tool(project, "back")


def test_back_keeps_detached_head(project):
    """`back` stays at a commit that the user has checked out."""
    git(project, "commit", "--quiet", "--allow-empty", "--message", "later")
    git(project, "checkout", "--quiet", "HEAD~1")
    tool(project, "back")
    assert branch(project) == ""


def of_another_machine(project: Path) -> None:
    """Commit a dvc.lock and metrics of weights that this machine has never seen."""
    lock = (project / "dvc.lock").read_text()
    md5 = yaml.safe_load(lock)["stages"]["train_toy_cnn"]["outs"]
    [weights] = [out["md5"] for out in md5 if out["path"] == str(WEIGHTS)]
    (project / "dvc.lock").write_text(lock.replace(weights, "ab" * 16))
    git(project, "commit", "--quiet", "--all", "--message", "results of another machine")


def test_back_to_foreign_lock(project):
    """`back` to a dvc.lock of another machine trains nothing and deletes nothing."""
    weights = (project / WEIGHTS).read_bytes()
    of_another_machine(project)
    set_params(project, {"train_toy_cnn": {"seed": 1}})
    dvc(project, "repro")
    told = tool(project, "back")
    assert "not in DVC's cache, so made on another machine: models/toy_cnn.safetensors" in told
    assert ran(told) == []
    assert (project / WEIGHTS).read_bytes() == weights
    assert changes(project) == " M dvc.lock\n"  # it now names this machine's own weights


def test_back_in_empty_clone(project, tmp_path):
    """`back` makes the missing results in an empty clone."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(project), str(clone)], check=True)
    assert ran(tool(clone, "back")) == ["build_toy_tensors", "train_toy_cnn"]
    assert (clone / WEIGHTS).read_bytes() == (project / WEIGHTS).read_bytes()
    assert changes(clone) == ""


def summary_of(project: Path) -> str:
    with chdir(project), redirect_stdout(io.StringIO()) as said:
        summary.main()
    return said.getvalue()


def test_summary_distinguishes_results(project):
    """The summary distinguishes the same results, those of other params and those with other bytes."""
    assert "The results are the committed ones, byte for byte." in summary_of(project)
    set_params(project, {"train_toy_cnn": {"seed": 1}})
    dvc(project, "repro")
    assert "those of your params and code, which differ from the committed ones" in summary_of(project)
    tool(project, "back")
    of_another_machine(project)
    lock = (project / "dvc.lock").read_text()
    (project / "dvc.lock").write_text(lock.replace("ab" * 16, "cd" * 16))
    told = summary_of(project)
    assert "1 of 5 outputs differ from the committed ones, the first of them models/toy_cnn.safe" in told
    assert re.search("that is (not )?expected.*\n`fashion-cnn baseline` commits these results", told)
    for command in ("fashion-cnn ui", "fashion-cnn back", "make repro"):
        assert command in told


def test_baseline(project):
    """`baseline` commits the results that later ones are compared with."""
    of_another_machine(project)
    tool(project, "back")
    assert "1 of 5 outputs differ" in summary_of(project)
    identity = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    tool(project, "baseline", **identity)
    assert "byte for byte" in summary_of(project)
    assert changes(project) == ""
    assert json.loads(dvc(project, "status", "--json").stdout) == {}
