"""`make sync` makes the runs of experiments in a new store from what git has of them."""

import json
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import dvc, tool, tracked_runs, two_stages
from project import git

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow warns about itself
]

METRICS, CODE = "metrics/train_toy_cnn.json", "stages/lib/toy.py"
LINE = "lr=learning_rate"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project with an experiment of another seed, one of other code, and one that changes nothing."""
    project = two_stages(tmp_path_factory.mktemp("sync") / "project")
    dvc(project, "exp", "run", "--name", "seed", "-S", "train_toy_cnn.seed=1")
    git(project, "restore", ".")
    code = project / CODE
    code.write_text(code.read_text().replace(LINE, f"lr=2 * {LINE.partition('=')[2]}"))
    dvc(project, "exp", "run", "--name", "code")
    git(project, "restore", ".")
    dvc(project, "exp", "run", "--force", "--name", "same")
    git(project, "restore", ".")
    dvc(project, "checkout")
    return project


def reference(project: Path, name: str) -> str:
    [found] = git(project, "for-each-ref", "--format=%(refname)", f"refs/exps/??/*/{name}").split()
    return found


def test_a_new_store_gets_the_runs_of_all_experiments(project):
    store = f"sqlite:///{project.parent / 'new.db'}"
    told = tool(project, "sync", MLFLOW_TRACKING_URI=store)
    assert told.count("made, params, curve, metrics") == 3  # "same" has the weights of HEAD
    found = {run.info.run_name: run for run in tracked_runs(project, store=store)}
    assert set(found) == {"train_toy_cnn", "train_toy_cnn seed", "train_toy_cnn code"}
    head = git(project, "rev-parse", "HEAD").strip()
    for name in ("seed", "code"):
        run = found[f"train_toy_cnn {name}"]
        metrics = json.loads(git(project, "show", f"{reference(project, name)}:{METRICS}"))
        assert run.data.tags["weights_sha256"] == metrics["weights_sha256"][0]
        assert run.data.metrics["output_image_1"] == metrics["output_image_1"]
        assert run.data.params["train_toy_cnn.seed"] == ("1" if name == "seed" else "0")
        assert run.data.tags["git_commit"] == head
        assert run.data.tags["dvc_exp_name"] == name
    assert found["train_toy_cnn seed"].data.tags["git_dirty"] == "false"
    assert found["train_toy_cnn code"].data.tags["git_dirty"] == "true"
    client = MlflowClient(store)
    diff = client.download_artifacts(found["train_toy_cnn code"].info.run_id, "uncommitted.diff")
    git(project, "apply", diff)
    assert (project / CODE).read_bytes() == subprocess.run(
        ["git", "show", f"{reference(project, 'code')}:{CODE}"], cwd=project, check=True, capture_output=True
    ).stdout
    git(project, "restore", ".")
    again = tool(project, "sync", MLFLOW_TRACKING_URI=store)
    assert again.count("sync:") == again.count("up to date") == 1


def test_an_experiment_that_is_not_whole_is_named_and_the_others_are_made(project):
    metrics = json.loads(git(project, "show", f"{reference(project, 'seed')}:{METRICS}"))
    (project / METRICS).write_text(json.dumps(metrics | {"weights_sha256": ["ab" * 32]}))
    git(project, "commit", "--quiet", "--all", "--message", "metrics that dvc.lock does not name")
    made = git(project, "rev-parse", "HEAD").strip()
    git(project, "reset", "--quiet", "--hard", "HEAD~1")
    head = git(project, "rev-parse", "HEAD").strip()
    git(project, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/broken", made)
    store = f"sqlite:///{project.parent / 'new.db'}"
    told = tool(project, "sync", MLFLOW_TRACKING_URI=store)
    assert f"sync: left out experiment broken: {METRICS}: differs from dvc.lock" in told
    assert len(tracked_runs(project, store=store)) == 3


def test_an_experiment_of_committed_weights_is_not_what_made_them(project):
    """The store is new, and only an experiment of an earlier commit still names them."""
    git(
        project, "checkout", "--quiet", reference(project, "seed"), "--", "params.yaml", "dvc.lock", "metrics"
    )
    git(project, "commit", "--quiet", "--all", "--message", "take the experiment")
    dvc(project, "checkout")
    store = f"sqlite:///{project.parent / 'new.db'}"
    tool(project, "sync", MLFLOW_TRACKING_URI=store)
    [committed] = json.loads(git(project, "show", f"HEAD~1:{METRICS}"))["weights_sha256"]
    [first] = tracked_runs(project, f"tags.weights_sha256 = '{committed}'", store)
    assert first.info.run_name == "train_toy_cnn"  # and not "train_toy_cnn same"
    assert "dvc_exp_name" not in first.data.tags
