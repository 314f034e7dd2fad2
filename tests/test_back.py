"""The way back from experiments, and what `make repro` says at its end, in a project of two stages."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import copy_of_project, git
from pipeline import SMALL, dvc, environment, ran, set_params, tool

WEIGHTS = Path("models/toy_cnn.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The project after its first run, with the results committed."""
    folder = copy_of_project(tmp_path_factory.mktemp("back") / "project")
    definition = yaml.safe_load((folder / "dvc.yaml").read_text())
    kept = {name: definition["stages"][name] for name in ("build_toy_tensors", "train_toy_cnn")}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": kept}))
    (folder / "dvc.lock").unlink()
    shutil.rmtree(folder / "metrics")
    set_params(folder, SMALL)
    dvc(folder, "repro")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "results")
    return folder


@pytest.fixture
def project(finished, tmp_path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


def changes(project: Path) -> str:
    command = ["git", "status", "--porcelain"]
    return subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout


def assert_back_without_training(project: Path, weights: bytes) -> None:
    assert (project / WEIGHTS).exists() is False or (project / WEIGHTS).read_bytes() != weights
    assert ran(tool(project, "back")) == []
    assert changes(project) == ""
    assert (project / WEIGHTS).read_bytes() == weights


def test_back_from_an_edit(project):
    weights = (project / WEIGHTS).read_bytes()
    set_params(project, {"train_toy_cnn": {"seed": 1}})
    dvc(project, "repro")
    assert_back_without_training(project, weights)


def test_back_from_an_experiment_which_stays(project):
    weights = (project / WEIGHTS).read_bytes()
    dvc(project, "exp", "run", "--name", "other-seed", "-S", "train_toy_cnn.seed=1")
    other = (project / WEIGHTS).read_bytes()
    assert_back_without_training(project, weights)
    dvc(project, "exp", "apply", "other-seed")
    assert (project / WEIGHTS).read_bytes() == other


def test_back_from_an_experiment_that_was_killed(project):
    weights = (project / WEIGHTS).read_bytes()
    command = [sys.executable, "-m", "dvc", "exp", "run", "-S", "train_toy_cnn.epochs=99999"]
    killed = subprocess.Popen(
        command, cwd=project, env=environment(PYTHONUNBUFFERED="1"), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with killed.stdout:
        assert any(line.startswith("Running stage 'train_toy_cnn'") for line in killed.stdout)
        time.sleep(1)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.stdout.read()
    killed.wait()
    git(project, "add", "params.yaml")  # as DVC leaves it if killed later: `git restore .` would keep it
    assert_back_without_training(project, weights)
    assert ran(dvc(project, "exp", "run", "-S", "train_toy_cnn.epochs=101").stdout) == ["train_toy_cnn"]


def of_another_machine(project: Path) -> None:
    """Commit a dvc.lock and metrics whose weights have bytes that this machine has never seen."""
    lock = (project / "dvc.lock").read_text()
    md5 = yaml.safe_load(lock)["stages"]["train_toy_cnn"]["outs"]
    [weights] = [out["md5"] for out in md5 if out["path"] == str(WEIGHTS)]
    (project / "dvc.lock").write_text(lock.replace(weights, "ab" * 16))
    git(project, "commit", "--quiet", "--all", "--message", "results of another machine")


def test_back_to_a_lock_of_another_machine_trains_nothing_and_deletes_nothing(project):
    weights = (project / WEIGHTS).read_bytes()
    of_another_machine(project)
    set_params(project, {"train_toy_cnn": {"seed": 1}})
    dvc(project, "repro")
    told = tool(project, "back")
    assert "not in the cache, so not of this machine: models/toy_cnn.safetensors" in told
    assert ran(told) == []
    assert (project / WEIGHTS).read_bytes() == weights
    assert changes(project) == " M dvc.lock\n"  # names this machine's own weights


def test_back_in_an_empty_clone_makes_what_is_not_there(project, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(project), str(clone)], check=True)
    assert ran(tool(clone, "back")) == ["build_toy_tensors", "train_toy_cnn"]
    assert (clone / WEIGHTS).read_bytes() == (project / WEIGHTS).read_bytes()
    assert changes(clone) == ""


def test_the_summary_tells_the_same_other_params_and_other_bytes_apart(project):
    assert "The results are the committed ones, byte for byte." in tool(project, "summary")
    set_params(project, {"train_toy_cnn": {"seed": 1}})
    dvc(project, "repro")
    assert "those of your params and code, which differ from the committed ones" in tool(project, "summary")
    tool(project, "back")
    of_another_machine(project)
    lock = (project / "dvc.lock").read_text()
    (project / "dvc.lock").write_text(lock.replace("ab" * 16, "cd" * 16))
    told = tool(project, "summary")
    assert "1 of 4 outputs differ from the committed ones, the first of them models/toy_cnn.safe" in told
    assert re.search("that is (not )?expected.*\n`make baseline` commits these results", told)
    for command in ("make ui", "make back", "make repro"):
        assert command in told


def test_a_baseline_is_what_later_results_are_compared_with(project):
    of_another_machine(project)
    tool(project, "back")
    assert "1 of 4 outputs differ" in tool(project, "summary")
    shutil.copy(Path(__file__).resolve().parents[1] / "Makefile", project)
    identity = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["make", "baseline"], cwd=project, check=True, env=environment(**identity))
    assert "byte for byte" in tool(project, "summary")
    assert changes(project) == ""
    assert json.loads(dvc(project, "status", "--json").stdout) == {}
