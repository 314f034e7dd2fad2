"""`fashion-cnn sync` makes the runs of experiments in a new store from what git has of them."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fashion_cnn.commands.sync import _params
from fashion_cnn.project.catalog import TOY
from pipeline import dvc, tool, tracked_runs, try_tool, two_stages
from project import git

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow's own warnings
]

RESULTS = ("params.yaml", "dvc.lock", "metrics")
METRICS, CODE = "metrics/train_toy_cnn.json", "fashion_cnn/lesson/toy.py"
VERIFIED = b'{"max_error": 0.5}'
VERIFICATION = f"""  verify_manual_conv:
    cmd: 'true'
    outs:
    - path: metrics/verify_manual_conv.json
      md5: {hashlib.md5(VERIFIED).hexdigest()}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project with experiments, whose runs `fashion-cnn sync` has made in a new store."""
    project = two_stages(tmp_path_factory.mktemp("sync") / "project")
    dvc(project, "exp", "run", "--name", "seed", "-S", "train_toy_cnn.seed=1")
    git(project, "restore", ".")
    code = project / CODE
    code.write_text(code.read_text().replace("lr=learning_rate", "lr=2 * learning_rate"))
    dvc(project, "exp", "run", "--name", "code")
    git(project, "restore", ".")
    dvc(project, "exp", "run", "--force", "--name", "same")  # the same as its commit
    git(project, "checkout", "--quiet", reference(project, "seed"), "--", *RESULTS)
    (project / "metrics/verify_manual_conv.json").write_bytes(VERIFIED)
    with (project / "dvc.lock").open("a") as lock:
        lock.write(VERIFICATION)
    make_experiment(project, "verified")  # the same weights as in "seed"
    dvc(project, "checkout")
    forget_runs(project)
    tool(project, "sync")
    return project


def make_experiment(project: Path, name: str) -> None:
    """Store the files as DVC stores an experiment, and restore those of HEAD."""
    head = git(project, "rev-parse", "HEAD").strip()
    git(project, "add", "--force", "metrics")
    git(project, "commit", "--quiet", "--all", "--message", name)
    git(project, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", "HEAD")
    git(project, "reset", "--quiet", "--hard", head)


def reference(project: Path, name: str) -> str:
    [found] = git(project, "for-each-ref", "--format=%(refname)", f"refs/exps/??/*/{name}").split()
    return found


def forget_runs(project: Path) -> None:
    for path in project.glob("mlflow.db*"):
        path.unlink()
    shutil.rmtree(project / "mlruns")


def store_of(project: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{project}/mlflow.db")


def runs_by_name(project: Path) -> dict:
    return {run.info.run_name: run for run in tracked_runs(project)}


def test_repro_syncs(project):
    """A repro ends with a sync if there is something new."""
    told = [tool(project, "repro") for _ in range(2)]
    forget_runs(project)
    told.append(tool(project, "repro"))
    assert [": made, commit, params, curve, " in one for one in told] == [False, False, True]


def test_repro_without_store(project):
    """A repro without a store ends with the results and a line about the store."""
    told = tool(project, "repro", MLFLOW_TRACKING_URI="sqlite:////proc/no/store.db")
    assert "byte for byte" in told
    [line] = [line for line in told.splitlines() if line.startswith("MLflow: ")]
    assert line.endswith("; `fashion-cnn sync` tries again")


def test_newest_experiment(project):
    """Of the experiments with the same weights, the newest has a run.

    The experiment that changes nothing has the weights of its commit, so it has no run.
    """
    assert set(runs_by_name(project)) == {"train_toy_cnn", "train_toy_cnn verified", "train_toy_cnn code"}


@pytest.mark.parametrize(("name", "seed", "is_dirty"), [("verified", "1", "false"), ("code", "0", "true")])
def test_experiment_run(project, name, seed, is_dirty):
    """The run of an experiment has its results and origin."""
    data = runs_by_name(project)[f"train_toy_cnn {name}"].data
    metrics = json.loads(git(project, "show", f"{reference(project, name)}:{METRICS}"))
    assert [data.tags["weights_sha256"]] == metrics["weights_sha256"]
    assert data.metrics["output_image_1"] == metrics["output_image_1"]
    assert data.metrics.get("max_error") == (0.5 if name == "verified" else None)
    assert data.params["train_toy_cnn.seed"] == seed
    assert data.tags["git_commit"] == git(project, "rev-parse", "HEAD").strip()
    assert data.tags["git_dirty"] == is_dirty


def test_experiment_diff(project):
    """The diff of an experiment restores its code."""
    run_id = runs_by_name(project)["train_toy_cnn code"].info.run_id
    git(project, "apply", store_of(project).download_artifacts(run_id, "uncommitted.diff"))
    assert (project / CODE).read_text() == git(project, "show", f"{reference(project, 'code')}:{CODE}")


ONE, TWO = (json.dumps({"weights_sha256": [digits * 32]}) for digits in ("ab", "cd"))
DAMAGED = {
    "other-weights": ({METRICS: ONE}, f"{METRICS}: differs from dvc.lock"),
    "cut-metrics": ({METRICS: "{"}, f"{METRICS} of refs/exps/"),
    "cut-lock": (
        {METRICS: TWO, "dvc.lock": "stages: ["},
        "dvc.lock: damaged, expected it as DVC writes it",
    ),
}


def test_damaged_experiments(project):
    """Sync names damaged experiments and makes the runs of the others."""
    for name, (files, _) in DAMAGED.items():
        for path, content in files.items():
            (project / path).write_text(content)
        make_experiment(project, name)
    forget_runs(project)
    told = try_tool(project, "sync").stderr.splitlines()
    assert len(told) == len(runs_by_name(project)) == 3
    for name, (_, what) in DAMAGED.items():
        [line] = [line for line in told if line.startswith(f"left out experiment {name}: {what}")]
        assert line.endswith(f"; `dvc exp remove -- {name}` drops it")


def test_committed_weights(project):
    """An experiment that only names committed weights gets no run.

    The store is new, and the working tree has other weights by now.
    """
    git(project, "checkout", "--quiet", reference(project, "seed"), "--", *RESULTS)
    git(project, "commit", "--quiet", "--all", "--message", "take the experiment")
    dvc(project, "checkout")
    forget_runs(project)
    tool(project, "sync")
    found = runs_by_name(project)
    assert set(found) == {"train_toy_cnn verified", "train_toy_cnn code"}
    assert found["train_toy_cnn verified"].outputs.model_outputs  # from the weights that are here


def test_keeps_run_values(project):
    """An experiment replaces nothing that its run already has.

    A stage that verified the weights later takes precedence.
    """
    client, run_id = store_of(project), runs_by_name(project)["train_toy_cnn verified"].info.run_id
    client.log_metric(run_id, "max_error", 0.7)
    client.set_tag(run_id, "synced_verify_manual_conv", "of other files")
    for tag in ("dvc_lock", "synced_dvc.lock.json"):  # as if a stage had made the run
        client.delete_tag(run_id, tag)
    told = tool(project, "sync")
    assert f"train_toy_cnn, run {run_id}: dvc.lock.json of experiment verified\n" in told
    assert client.get_run(run_id).data.metrics["max_error"] == 0.7


def test_completes_newest_run(project):
    """Of several runs with the same weights, the newest gets what the training made.

    The older one may be from other code and have its own dvc.lock.
    """
    older = runs_by_name(project)["train_toy_cnn"]
    tags = {name: older.data.tags[name] for name in ("weights_sha256", "dvc_stage")}
    newer = store_of(project).create_run(older.info.experiment_id, tags=tags).info.run_id
    said = f"sync: train_toy_cnn, run {newer}: params, curve, metrics, model, dvc.lock.json\n"
    assert tool(project, "sync") == said


def test_separates_equal_weights(project):
    """A run gets nothing from another training that ended in the same weights.

    A changed comment is other code with the same bytes; it has its own run and experiment.
    """
    code, expected = project / CODE, {}
    for name in ("one", "two"):
        code.write_text(code.read_text() + f"# {name}\n")
        expected[name] = hashlib.md5(code.read_bytes()).hexdigest()
        dvc(project, "exp", "run", "--name", name, "-S", "train_toy_cnn.seed=2")
    found = {name: runs_by_name(project)[f"train_toy_cnn {name}"] for name in expected}
    assert len({run.data.tags["weights_sha256"] for run in found.values()}) == 1
    tool(project, "sync")
    dvc(project, "exp", "apply", "one")  # the tree now matches the older one
    told = tool(project, "sync")
    assert told.count("sync:") == told.count("up to date") == 1
    for name, run in found.items():
        lock = store_of(project).download_artifacts(run.info.run_id, "dvc.lock.json")
        deps = json.loads(Path(lock).read_text())["train_toy_cnn"]["deps"]
        assert [dep["md5"] for dep in deps if dep["path"] == CODE] == [expected[name]]


def test_old_dvc_lock():
    """The params of an old dvc.lock become full paths."""
    stages = {TOY.stage: {"deps": [], "params": {"params.yaml": {"toy.seed": 3, "new": {"rate": 0.5}}}}}
    assert _params(TOY, stages) == {"toy.seed": 3, "new.rate": 0.5}
