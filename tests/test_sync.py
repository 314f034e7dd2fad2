"""`fashion-cnn sync` makes the runs of experiments in a new store from what git has of them."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML

from fashion_cnn.commands.sync import _params
from fashion_cnn.project.catalog import TOY
from pipeline import dvc, tool, tracked_runs, try_tool, two_stages
from project import git

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow warns about itself
]

METRICS, CODE = "metrics/train_toy_cnn.json", "fashion_cnn/lesson/toy.py"
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


def test_repro_ends_with_sync_if_there_is_something_new(project):
    path = project.parent / "store.db"
    told = [tool(project, "repro", MLFLOW_TRACKING_URI=f"sqlite:///{path}") for _ in range(2)]
    assert [": made, commit, params, curve, " in one for one in told] == [True, False]
    path.rename(path.with_suffix(".old"))
    told = tool(project, "repro", MLFLOW_TRACKING_URI=f"sqlite:///{path}")
    assert ": made, commit, params, curve, " in told
    shutil.rmtree(project / ".git/refs/exps")  # an experiment less
    told = tool(project, "repro", MLFLOW_TRACKING_URI="sqlite:////proc/no/store.db")
    assert "byte for byte" in told
    [line] = [line for line in told.splitlines() if line.startswith("MLflow: ")]
    assert line.endswith("; `fashion-cnn sync` tries again")


def test_a_new_store_gets_the_runs_of_all_experiments(project):
    store = f"sqlite:///{project.parent / 'new.db'}"
    told = tool(project, "sync", MLFLOW_TRACKING_URI=store)
    assert told.count(": made, commit, params, curve, ") == 3  # "same" has the weights of HEAD
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


OTHER = f'{{"weights_sha256": ["{"ab" * 32}"]}}'


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({METRICS: OTHER}, f"{METRICS}: differs from dvc.lock"),
        ({METRICS: "{"}, f"{METRICS} of refs/exps/"),
        ({METRICS: OTHER, "dvc.lock": "stages:\n- cut"}, "dvc.lock: damaged, expected it as DVC writes it"),
        ({METRICS: OTHER, "dvc.lock": "schema: '2.0'"}, "dvc.lock: damaged, expected it as DVC writes it"),
    ],
    ids=["other weights", "cut metrics", "cut lock", "empty lock"],
)
def test_an_experiment_that_is_damaged_is_named_and_the_others_are_made(project, files, what):
    for path, content in files.items():
        (project / path).write_text(content)
    git(project, "commit", "--quiet", "--all", "--message", "damage")
    made = git(project, "rev-parse", "HEAD").strip()
    git(project, "reset", "--quiet", "--hard", "HEAD~1")
    head = git(project, "rev-parse", "HEAD").strip()
    git(project, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/broken", made)
    store = f"sqlite:///{project.parent / 'new.db'}"
    done = try_tool(project, "sync", MLFLOW_TRACKING_URI=store)
    assert done.returncode == 0
    [line] = [line for line in done.stderr.splitlines() if "broken" in line]
    assert line.startswith(f"left out experiment broken: {what}")
    assert line.endswith("; `dvc exp remove broken` drops it")
    assert len(tracked_runs(project, store=store)) == 3


def test_an_experiment_that_only_names_committed_weights_gets_no_run(project):
    """The store is new, and the working tree has other weights since."""
    git(
        project, "checkout", "--quiet", reference(project, "seed"), "--", "params.yaml", "dvc.lock", "metrics"
    )
    git(project, "commit", "--quiet", "--all", "--message", "take the experiment")
    dvc(project, "checkout")
    store = f"sqlite:///{project.parent / 'new.db'}"
    tool(project, "sync", MLFLOW_TRACKING_URI=store)
    found = {run.info.run_name: run for run in tracked_runs(project, store=store)}
    assert set(found) == {"train_toy_cnn seed", "train_toy_cnn code"}
    seed = found["train_toy_cnn seed"]  # the experiment's, though the commit has its weights, too
    assert seed.data.tags["dvc_exp_name"] == "seed"
    assert seed.outputs.model_outputs  # from the weights that are here


def test_of_experiments_with_the_same_weights_the_newest_makes_the_run(project):
    """Here, it has also verified them."""
    dvc(project, "exp", "run", "--name", "again", "-S", "train_toy_cnn.seed=1")
    lock = project / "dvc.lock"
    entries = YAML(typ="safe").load(lock.read_text())
    extra = project / "metrics/verify_manual_conv.json"
    extra.write_text('{"max_error": 0.5}')
    digest = hashlib.md5(extra.read_bytes()).hexdigest()
    outs = [{"path": "metrics/verify_manual_conv.json", "md5": digest}]
    entries["stages"]["verify_manual_conv"] = {"cmd": "true", "deps": [], "outs": outs}
    with lock.open("w") as file:
        YAML().dump(entries, file)
    git(project, "add", "--force", str(extra))
    git(project, "commit", "--quiet", "--all", "--message", "verified")
    made = git(project, "rev-parse", "HEAD").strip()
    git(project, "reset", "--quiet", "--hard", "HEAD~1")
    git(project, "update-ref", reference(project, "again"), made)
    dvc(project, "checkout")
    store = f"sqlite:///{project.parent / 'new.db'}"
    tool(project, "sync", MLFLOW_TRACKING_URI=store)
    found = {run.info.run_name: run for run in tracked_runs(project, store=store)}
    assert set(found) == {"train_toy_cnn", "train_toy_cnn again", "train_toy_cnn code"}
    run_id = found["train_toy_cnn again"].info.run_id
    assert found["train_toy_cnn again"].data.metrics["max_error"] == 0.5
    # A stage that verifies them later is right.
    client = MlflowClient(store)
    client.log_metric(run_id, "max_error", 0.7)
    client.set_tag(run_id, "synced_verify_manual_conv", "of other files")
    for tag in ("dvc_lock", "synced_dvc.lock.json"):
        client.delete_tag(run_id, tag)
    told = tool(project, "sync", MLFLOW_TRACKING_URI=store)
    assert f"train_toy_cnn, run {run_id}: dvc.lock.json of experiment again" in told
    assert client.get_run(run_id).data.metrics["max_error"] == 0.7
    told = tool(project, "sync", MLFLOW_TRACKING_URI=store)
    assert told.count("sync:") == told.count("up to date") == 1


def test_of_several_runs_of_the_same_weights_the_newest_gets_what_the_training_made(project):
    """The older one may be of other code, and have its own dvc.lock."""
    store = f"sqlite:///{project.parent / 'new.db'}"
    tool(project, "sync", MLFLOW_TRACKING_URI=store)
    older = next(run for run in tracked_runs(project, store=store) if run.info.run_name == "train_toy_cnn")
    client = MlflowClient(store)
    client.log_text(older.info.run_id, "of other code", "dvc.lock.json")
    tags = {name: older.data.tags[name] for name in ("weights_sha256", "dvc_stage")}
    newer = client.create_run(older.info.experiment_id, tags=tags).info.run_id
    told = tool(project, "sync", MLFLOW_TRACKING_URI=store)
    assert f"train_toy_cnn, run {newer}: params, curve, metrics, model, dvc.lock.json" in told
    kept = client.download_artifacts(older.info.run_id, "dvc.lock.json")
    assert Path(kept).read_text() == "of other code"


def test_a_run_gets_nothing_of_another_training_to_the_same_weights(project):
    """A change of a comment: other code, the same bytes, and a run and an experiment of its own."""
    store = f"sqlite:///{project.parent / 'new.db'}"
    code = project / CODE
    for name in ("one", "two"):
        code.write_text(code.read_text() + f"# {name}\n")
        dvc(project, "exp", "run", "--name", name, "-S", "train_toy_cnn.seed=2", MLFLOW_TRACKING_URI=store)
    found = {run.data.tags["dvc_exp_name"]: run for run in tracked_runs(project, store=store)}
    assert len({run.data.tags["weights_sha256"] for run in found.values()}) == 1

    def held() -> dict[str, str]:
        locks = {}
        for name in ("one", "two"):
            kept = MlflowClient(store).download_artifacts(found[name].info.run_id, "dvc.lock.json")
            [locks[name]] = {
                dep["md5"]
                for dep in json.loads(Path(kept).read_text())["train_toy_cnn"]["deps"]
                if dep["path"] == CODE
            }
        return locks

    tool(project, "sync", MLFLOW_TRACKING_URI=store)
    shown = {name: git(project, "show", f"{reference(project, name)}:{CODE}") for name in ("one", "two")}
    expected = {name: hashlib.md5(text.encode()).hexdigest() for name, text in shown.items()}
    assert held() == expected
    dvc(project, "exp", "apply", "one")  # the tree is now as the older one
    told = tool(project, "sync", MLFLOW_TRACKING_URI=store)
    assert told.count("sync:") == told.count("up to date") == 1
    assert held() == expected


def test_params_of_an_old_dvc_lock_are_paths():
    stages = {TOY.stage: {"deps": [], "params": {"params.yaml": {"toy.seed": 3, "new": {"rate": 0.5}}}}}
    assert _params(TOY, stages) == {"toy.seed": 3, "new.rate": 0.5}
