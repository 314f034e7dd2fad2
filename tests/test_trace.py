"""trace: the commands that it prints for a result are run, and give the same bytes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline import dvc, environment, ran, tool, tracked_runs, two_stages
from project import git

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow's own warnings
]

WEIGHTS = "models/toy_cnn.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return two_stages(tmp_path_factory.mktemp("trace") / "project")


def run_commands(project, commands: list[str]) -> str:
    return "".join(
        subprocess.run(
            command, shell=True, cwd=project, env=environment(), check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        for command in commands
    )


def test_restore_dirty_tree(project):
    """The weights of a dirty tree come from the cache or are trained again."""
    code = project / "fashion_cnn/lesson/toy.py"
    code.write_text(code.read_text().replace("lr=learning_rate", "lr=2 * learning_rate"))
    (project / "new.txt").write_text("not committed\n")
    dvc(project, "repro")
    weights = (project / WEIGHTS).read_bytes()
    [trace] = json.loads(tool(project, "trace", WEIGHTS, "--json"))
    for reran in ([], ["build_toy_tensors", "train_toy_cnn"]):
        git(project, "stash", "--include-untracked")
        dvc(project, "checkout")
        assert (project / WEIGHTS).read_bytes() != weights
        if reran:
            shutil.rmtree(project / ".dvc/cache")
        assert ran(run_commands(project, trace["restore"])) == reran
        assert (project / WEIGHTS).read_bytes() == weights
        assert (project / "new.txt").read_text() == "not committed\n"


def test_kept_experiment(project):
    """The commit of a kept experiment leads to the experiment's run."""
    dvc(project, "exp", "run", "--name", "kept", "-S", "train_toy_cnn.seed=1")
    git(project, "commit", "--quiet", "--all", "--message", "keep the experiment")
    [run] = tracked_runs(project, "tags.dvc_exp_name = 'kept'")
    traces = json.loads(tool(project, "trace", "HEAD", "--json"))
    assert [trace["run_id"] for trace in traces] == [run.info.run_id]
    before = json.loads(tool(project, "trace", "HEAD~1", "--json"))
    assert len(before) == 2  # the run of the committed results, and the experiment's


def test_project_in_subfolder(project, tmp_path):
    """An experiment of a project in a folder of a bigger repository is recorded."""
    folder = tmp_path / "bigger/below"
    shutil.copytree(project, folder, symlinks=True)
    shutil.rmtree(folder / ".git")
    shutil.rmtree(folder / ".dvc/tmp")
    git(tmp_path / "bigger", "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "start")
    dvc(folder, "exp", "run", "--name", "below", "-S", "train_toy_cnn.seed=1")
    git(folder, "restore", ".")
    dvc(folder, "checkout")
    assert "dvc.lock.json of experiment below" in tool(folder, "sync")
    [run] = tracked_runs(folder, "tags.dvc_exp_name = 'below'")
    [trace] = json.loads(tool(folder, "trace", run.info.run_id, "--json"))
    assert trace["dvc_lock"]["train_toy_cnn"]["params"]["params.yaml"]["train_toy_cnn"]["seed"] == 1
