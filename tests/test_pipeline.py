"""The real pipeline on real data with small params: run, run again, change one param, break one."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from mlflow import MlflowClient
from torchvision import datasets

from crash import STAGE_START, Started, Strike, kill, stage_processes, wait_until_gone
from fashion_cnn.data.fashion_mnist import TRAIN_IMAGES, TRAIN_LABELS, read_idx
from fashion_cnn.project.catalog import CNNS
from fashion_cnn.project.files import numbers
from fashion_cnn.tracking.models import CODE, ready_models
from pipeline import (
    SMALL,
    dvc,
    environment,
    outputs,
    ran,
    run_queued,
    set_params,
    tool,
    tracked_runs,
    try_tool,
)
from project import ROOT, copy_of_project, git, stage_definitions
from recovery import contents, forget, kill_stage, lock_entries
from servers import lose_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # warnings of MLflow and torchvision
]

ITEMS = {name: ["@original", "@augmented"] for name in ("train_cnn", "evaluate_cnn")}
TRAININGS = ["train_toy_cnn", "train_cnn@original", "train_cnn@augmented"]


def opened_dir(project: Path) -> Path:
    """The folder next to the project that lists the files opened by each stage."""
    folder = project.parent / "opened"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project, in a folder with a space in its name, after one `dvc repro`."""
    folder = tmp_path_factory.mktemp("a project")
    copy_of_project(folder)
    set_params(folder, SMALL)
    git(folder, "commit", "--quiet", "--all", "--message", "small params")
    audit = {"PYTHONPATH": str(ROOT / "tests/audit"), "AUDIT_LOG": str(opened_dir(folder))}
    done = dvc(folder, "repro", "--force", check=False, PYTHONDONTWRITEBYTECODE="1", **audit)
    assert done.returncode == 0, done.stdout
    assert len(ran(done.stdout)) == 11
    return folder


def runs(project: Path, store: str | None = None) -> dict:
    found = tracked_runs(project, store=store)
    assert {run.info.status for run in found} == {"FINISHED"}
    return {run.info.run_name: run for run in found}


def test_data_matches_torchvision(project):
    """The data is Fashion-MNIST as torchvision reads it."""
    dataset = datasets.FashionMNIST(project / "data")
    assert (dataset.data.numpy() == read_idx(TRAIN_IMAGES, project / "data/FashionMNIST/raw")).all()
    assert (dataset.targets.numpy() == read_idx(TRAIN_LABELS, project / "data/FashionMNIST/raw")).all()


def test_augmented_copies(project):
    """Copies are made of every train image."""
    copy = np.load(project / "data/augmented/copy_01.npy", mmap_mode="r")
    assert (copy.shape, copy.dtype) == ((60_000, 28, 28), np.uint8)


def test_metrics_and_curves(project):
    """The pipeline writes its metrics, curves and figures, with plausible values."""
    test = json.loads((project / "metrics/evaluate_cnn/original.json").read_text())
    assert 0.5 < test["test_accuracy"] < 0.95
    verified = json.loads((project / "metrics/verify_manual_conv.json").read_text())
    assert (verified["parameters_toy_cnn"], verified["parameters_cnn"]) == (12, 896_522)
    assert all(value < 1e-4 for name, value in verified.items() if name.startswith("max_abs_error_"))
    with (project / "metrics/train_cnn/augmented.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert [row["epoch"] for row in curve] == ["1", "2"]
    assert float(curve[1]["train_loss"]) < float(curve[0]["train_loss"])
    figures = {path.stem for path in (project / "metrics/figures").iterdir()}
    assert figures == {"toy_loss", "training_curves", "robustness", "confusion", "mistakes", "augmentation"}


CURVES = ["metrics/train_cnn/original.csv", "metrics/train_cnn/augmented.csv"]
TABLES = {
    f"metrics/evaluate_cnn/{images}_{table}.csv": axes
    for images in ("original", "augmented")
    for table, axes in (("confusion", ("predicted", "actual")), ("per_class", ("recall", "class")))
}
MOVED = {  # title: list in metrics/evaluate_cnn/*.json, and its columns
    "Test accuracy when shifted left and right": ("shifts", "pixels", "shift_x"),
    "Test accuracy when shifted up and down": ("shifts", "pixels", "shift_y"),
    "Test accuracy when rotated": ("rotations", "degrees", "rotation"),
}


@pytest.fixture(scope="module")
def plots(project, tmp_path_factory) -> dict[str, dict]:
    """What `dvc plots show` draws: each plot as a Vega-Lite specification, an image as {}."""
    out = str(tmp_path_factory.mktemp("plots"))
    shown = json.loads(dvc(project, "plots", "show", "--json", "--out", out).stdout)
    assert shown.keys() == {"data"}  # no errors
    return {name: plot.get("content", {}) for name, [plot] in shown["data"].items()}


def test_dvc_plots(project, plots):
    """DVC draws the curves, tables, robustness and figures, but no pixels."""
    figures = {f"metrics/figures/{path.name}" for path in (project / "metrics/figures").iterdir()}
    assert {name for name, spec in plots.items() if not spec} == figures
    assert set(plots) - figures == {"metrics/train_toy_cnn.csv", *CURVES, *TABLES, *MOVED}
    for name in set(plots) - figures:
        assert plots[name]["title"]["text"].startswith(
            name if name in MOVED else ("Toy CNN: ", "CNN trained")
        )
        values = [value for row in plots[name]["data"]["values"] for value in row.values()]
        assert max(len(str(value)) for value in values) < 40  # an image is 1,568 digits


def test_dvc_plots_every_row(project, plots):
    """DVC draws every row, and it draws train beside val."""
    for path in ("metrics/train_toy_cnn.csv", *CURVES, *TABLES):
        with (project / path).open() as file:
            rows = list(csv.DictReader(file))
        assert [{key: row[key] for key in rows[0]} for row in plots[path]["data"]["values"]] == rows
        if path in CURVES:
            assert {"epoch", *plots[path]["transform"][0]["fold"]} == set(rows[0])
            assert plots[path]["spec"]["encoding"]["x"]["field"] == "epoch"
    for path, axes in TABLES.items():
        encoding = plots[path].get("spec", plots[path])["encoding"]
        assert (encoding["x"]["field"], encoding["y"]["field"]) == axes


@pytest.mark.parametrize("title", MOVED)
def test_dvc_plots_both_cnns(project, plots, title):
    """DVC draws the robustness of both CNNs on one pair of axes."""
    table, amount, accuracy = MOVED[title]
    encoding = plots[title]["encoding"]
    assert (encoding["x"]["field"], encoding["y"]["field"]) == (amount, accuracy)
    assert encoding["strokeDash"]["field"] == "filename"
    for images in ("original", "augmented"):
        measured = json.loads((project / f"metrics/evaluate_cnn/{images}.json").read_text())[table]
        rows = [row for row in plots[title]["data"]["values"] if row["filename"] == f"{images}.json"]
        # The file's other table may be longer; its extra rows lack these columns.
        drawn = [(row[amount], row[accuracy]) for row in rows if amount in row]
        assert drawn == [(row[amount], row[accuracy]) for row in measured]


def test_one_run_per_training(project):
    """Each training is one run with all its results."""
    found = runs(project)
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    assert sorted(found) == sorted(TRAININGS)
    commit = git(project, "rev-parse", "HEAD").strip()
    for name, run in found.items():
        assert run.data.tags["git_commit"] == commit
        assert run.data.tags["git_dirty"] == "false"
        assert run.data.tags["dvc_stage"] == name
        assert ready_models(client, run)
    original = found["train_cnn@original"]
    assert original.data.params["train_cnn.epochs"] == "2"
    assert original.data.params["split.train_size"] == "1000"
    test = json.loads((project / "metrics/evaluate_cnn/original.json").read_text())
    assert original.data.metrics["test_accuracy"] == pytest.approx(test["test_accuracy"], rel=1e-5)
    history = client.get_metric_history(original.info.run_id, "val_accuracy")
    assert [metric.step for metric in history] == [1, 2]
    figures = client.list_artifacts(original.info.run_id, "plot_results")
    assert "plot_results/robustness.png" in {file.path for file in figures}
    assert "max_abs_error_toy_forward" in found["train_toy_cnn"].data.metrics


# What a stage may open in addition to its deps and outs: the repository's own state, the schema of
# params.yaml, which only accepts or rejects values, and the files that mark a folder as a package.
NO_DEPS = (".git/", ".dvc/", ".checkpoints/", ".records/", "fashion_cnn/schema.py")


@pytest.mark.parametrize(
    "stage", [f"{name}{item}" for name in stage_definitions() for item in ITEMS.get(name, [""])]
)
def test_stage_opens_declared_files(project, stage):
    """A stage opens exactly the files that it declares.

    It may read its outs, because it has just written them.
    """
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"][stage]
    deps = {dep["path"] for dep in lock["deps"]} | ({"params.yaml"} if "params" in lock else set())
    outs = {out["path"] for out in lock["outs"]}
    read, written = set(), set()
    for line in (opened_dir(project) / stage).read_text().splitlines():
        mode, path = line.split(" ", 1)
        if path.startswith(NO_DEPS) or path.endswith("/__init__.py") or "/__pycache__/" in path:
            continue
        folder, _, name = path.rpartition("/")
        if name.endswith(".part"):  # renamed when complete
            path = f"{folder}/{name.removeprefix('.').removesuffix('.part')}"
        if not (project / path).is_file():  # git's and MLflow's own code tries to open absent files
            continue
        known = next((item for item in deps | outs if path == item or path.startswith(f"{item}/")), path)
        (written if mode == "w" else read).add(known)
    assert written == outs
    assert read - outs == deps


def test_sync_refuses_changed_files(project):
    """The command sync refuses results that differ from dvc.lock, and a damaged dvc.lock."""
    figures, metrics = project / "metrics/figures/robustness.png", project / "metrics/train_toy_cnn.json"
    for path in (figures, metrics, project / "dvc.lock"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        done = try_tool(project, "sync")
        path.write_bytes(whole)
        assert done.returncode == 1
        assert re.fullmatch(
            r"error: (metrics/figures|metrics/train_toy_cnn.json|dvc.lock): .*\n", done.stderr
        )


def test_sync_twice(project):
    """The tracked runs agree with dvc.lock, and a second sync changes nothing."""
    first = tool(project, "sync")
    assert all(word in first for word in TRAININGS)
    second = tool(project, "sync")
    assert second.count("up to date") == 3
    assert_runs_match(project)


def assert_runs_match(project: Path, store: str | None = None) -> None:
    """The run of each training has every number of its metrics and curve, and every param."""
    found = runs(project, store)
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    client = MlflowClient(store or f"sqlite:///{project / 'mlflow.db'}")
    for training in TRAININGS:
        files = [training.replace("@", "/")]
        files.append(
            "verify_manual_conv" if "toy" in training else training.replace("train_cnn@", "evaluate_cnn/")
        )
        metrics = {}
        for file in files:
            metrics |= json.loads((project / f"metrics/{file}.json").read_text())
        run = found[training]
        assert [run.data.tags["weights_sha256"]] == metrics.pop("weights_sha256")
        for name, value in numbers(metrics).items():
            if training != "train_toy_cnn" or name != "train_loss":
                assert run.data.metrics[name] == value, (training, name)
        with (project / f"metrics/{files[0]}.csv").open() as file:
            curve = list(csv.DictReader(file))
        for name in set(curve[0]) - {"epoch"}:
            history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}
            assert history == {int(row["epoch"]): float(row[name]) for row in curve}, (training, name)
        params = lock[training]["params"]["params.yaml"]
        if training == "train_cnn@augmented":
            params |= lock["augment_images"]["params"]["params.yaml"]
        leaves = {
            f"{name}.{leaf}": value if isinstance(value, str) else json.dumps(value)  # false, not False
            for name in params
            for leaf, value in params[name].items()
        }
        if "split" in params:
            leaves["train_images"] = leaves["split.train_size"]
        assert run.data.params == leaves


def test_sync_fills_new_store(project):
    """A new store is filled from dvc.lock."""
    # Under another name, because MLflow in this process keeps its connections to a file that is replaced.
    store = f"sqlite:///{project.parent / 'new.db'}"
    told = tool(project, "sync", MLFLOW_TRACKING_URI=store)
    assert told.count("made, commit, params, curve, ") == 3
    assert_runs_match(project, store)
    assert tool(project, "sync", MLFLOW_TRACKING_URI=store).count("up to date") == 3


def test_sync_after_run_cache(project):
    """After a sync, the tracked run has the results that were restored from the run cache."""
    before = runs(project)["train_cnn@original"]
    set_params(project, {"evaluate_cnn": {"robustness_images": 50}})
    assert "MLflow: sent to" in dvc(project, "repro", "evaluate_cnn@original").stdout
    changed = runs(project)["train_cnn@original"]
    assert changed.data.metrics != before.data.metrics
    set_params(project, {"evaluate_cnn": {"robustness_images": 100}})
    assert ran(dvc(project, "repro", "evaluate_cnn@original").stdout) == []
    assert "train_cnn@original" in tool(project, "sync")
    assert_runs_match(project)
    after = runs(project)["train_cnn@original"]
    assert (after.info.status, after.info.end_time) == (before.info.status, before.info.end_time)


def test_trace(project):
    """The command trace answers for a digest, a commit and a file."""
    tool(project, "sync")  # gives the run its dvc.lock
    run = runs(project)["train_cnn@original"]
    weights_sha256 = run.data.tags["weights_sha256"]
    [trace] = json.loads(tool(project, "trace", weights_sha256, "--json"))
    assert trace["run_id"] == run.info.run_id
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    assert trace["dvc_lock"]["train_cnn@original"] == lock["train_cnn@original"]
    assert trace["restore"][-1].startswith("dvc exp run -S split.seed=0")
    traces = json.loads(tool(project, "trace", run.data.tags["git_commit"][:10], "--json"))
    assert {trace["dvc_stage"] for trace in traces} == set(TRAININGS)
    told = tool(project, "trace", "models/cnn_original.safetensors")
    assert f"weights     {weights_sha256}" in told
    assert "train_cnn@original: data/FashionMNIST/raw/train-images-idx3-ubyte" in told
    unknown = try_tool(project, "trace", "ab" * 32)
    assert unknown.returncode == 1
    assert "no run found" in unknown.stderr


def test_no_pickles(project):
    """Neither the outputs nor the artifacts include a pickle."""
    files = [
        path for folder in ("data", "models", "metrics", "mlruns") for path in (project / folder).rglob("*")
    ]
    archives = [path for path in files if path.name == CODE]
    assert archives
    for path in set(files) - set(archives):
        if path.is_file():
            start = path.read_bytes()[:128]
            # First a pickle or torch.save's archive, then .npy of Python objects.
            assert not re.match(rb"\x80[\x02-\x05]|PK\x03\x04", start), path
            assert b"'descr': '|O'" not in start, path


def test_mlflow_loads_models(project, tmp_path):
    """MLflow loads every model with the code that is stored in it."""
    models = [path.parent for path in (project / "mlruns").rglob(CODE)]
    code = (
        "import mlflow, sys; [mlflow.pyfunc.load_model(path) for path in sys.argv[1:]]; import fashion_cnn; "
        "print(fashion_cnn.__file__)"
    )
    allowed = environment(MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false")
    done = subprocess.run(
        [sys.executable, "-c", code, *models], cwd=tmp_path, check=True, env=allowed, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert done.stdout.strip().endswith(f"{CODE}/fashion_cnn/__init__.py")


def test_nothing_reruns(project):
    """Nothing reruns when nothing has changed."""
    again = dvc(project, "repro")
    assert ran(again.stdout) == []
    assert "Data and pipelines are up to date" in again.stdout
    assert len(runs(project)) == 3


def test_queued_experiments(project):
    """Each experiment of two queue workers is a run with its lineage."""
    assert run_queued(project, 2, "train_toy_cnn", ["train_toy_cnn.seed=1", "train_toy_cnn.seed=2"]) == []
    found = tracked_runs(project, "tags.dvc_exp_name LIKE 'queued-%'")
    assert sorted(run.data.params["train_toy_cnn.seed"] for run in found) == ["1", "2"]
    assert sorted(run.data.tags["dvc_exp_name"] for run in found) == ["queued-0", "queued-1"]
    assert {run.info.status for run in found} == {"FINISHED"}
    assert "dvc.lock.json of experiment queued-1" in tool(project, "sync")
    assert "experiment" not in tool(project, "sync")
    run = found[0]
    [trace] = json.loads(tool(project, "trace", run.info.run_id, "--json"))
    locked = trace["dvc_lock"]["train_toy_cnn"]["params"]["params.yaml"]["train_toy_cnn"]
    assert str(locked["seed"]) == run.data.params["train_toy_cnn.seed"]
    # The command that trace prints restores the weights from the cache.
    restored = dvc(project, *shlex.split(trace["restore"][-1])[1:])
    assert "train_toy_cnn" not in ran(restored.stdout)
    [again] = json.loads(tool(project, "trace", "models/toy_cnn.safetensors", "--json"))
    assert again["run_id"] == run.info.run_id
    set_params(project, {"train_toy_cnn": {"seed": 0}})
    assert "train_toy_cnn" not in ran(dvc(project, "repro").stdout)


def test_training_alone(project):
    """A training that runs alone gets no report on the weights before it.

    After `dvc repro STAGE` or `dvc exp run STAGE`, dvc.lock keeps the earlier entries of later stages.
    """

    def of_seed_5():
        [run] = [one for one in tracked_runs(project) if one.data.params.get("train_cnn.seed") == "5"]
        return run

    set_params(project, {"train_cnn": {"seed": 5}})
    assert ran(dvc(project, "repro", "train_cnn@original").stdout) == ["train_cnn@original"]
    tool(project, "sync")
    metrics = of_seed_5().data.metrics
    assert "val_accuracy" in metrics
    assert "test_accuracy" not in metrics
    [trace] = json.loads(tool(project, "trace", of_seed_5().info.run_id, "--json"))
    assert list(trace["dvc_lock"]) == ["train_cnn@original"]
    other = runs(project)["train_cnn@augmented"].info.run_id  # all its reports still match its weights
    [trace] = json.loads(tool(project, "trace", other, "--json"))
    assert list(trace["dvc_lock"])[1:] == ["evaluate_cnn@augmented", "plot_results", "build_page"]
    dvc(project, "repro", "evaluate_cnn@original")
    tool(project, "sync")
    evaluation = json.loads((project / "metrics/evaluate_cnn/original.json").read_text())
    assert of_seed_5().data.metrics["test_accuracy"] == evaluation["test_accuracy"]
    set_params(project, {"train_cnn": {"seed": 0}})
    dvc(project, "repro")


def test_changed_param(project):
    """One changed param reruns the stages that depend on it and no others."""
    set_params(project, {"train_toy_cnn": {"seed": 10}})
    changed = dvc(project, "repro")
    assert ran(changed.stdout) == ["train_toy_cnn", "verify_manual_conv", "plot_results", "build_page"]
    assert "dead ReLU" in changed.stdout
    assert json.loads((project / "metrics/train_toy_cnn.json").read_text())["dead_relu"] == 1


def test_wrong_param(project):
    """A wrong param gives a line that says what was expected, and no results are lost."""
    before = {path: path.read_bytes() for path in (project / "metrics").rglob("*") if path.is_file()}
    weights = (project / "models/toy_cnn.safetensors").read_bytes()
    right = yaml.safe_load((project / "params.yaml").read_text())["train_toy_cnn"]["epochs"]
    set_params(project, {"train_toy_cnn": {"epochs": "many"}})
    spoiled = dvc(project, "repro", check=False)
    assert spoiled.returncode != 0
    assert (
        "params.yaml: train_toy_cnn.epochs is 'many', expected an integer from 1 to 100000" in spoiled.stdout
    )
    assert "Traceback" not in spoiled.stdout
    # With the old value, the run cache restores what DVC had deleted: the training does not run again.
    set_params(project, {"train_toy_cnn": {"epochs": right}})
    restored = dvc(project, "repro")
    assert "train_toy_cnn" not in ran(restored.stdout)
    assert (project / "models/toy_cnn.safetensors").read_bytes() == weights
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("stage", "strike", "epochs"),
    [
        ("train_cnn@original", Strike("stage", "epoch 1/"), 1),
        ("train_cnn@original", Strike("dvc", "epoch 1/"), 1),
        ("augment_images", Strike("both", STAGE_START, 1), 0),
    ],
    ids=["stage", "dvc", "both"],
)
def test_killed_first_run(project, stage, strike, epochs):
    """A first run that is killed is recovered and loses nothing."""
    trial = kill_stage(project, stage, strike)
    assert trial, "the kill came too late: nothing had to be recovered"
    assert trial.fault == ""
    assert trial.saved >= epochs
    tool(project, "sync")
    assert {run.info.status for run in tracked_runs(project)} <= {"FINISHED", "KILLED"}


def test_lost_mlflow_server(project):
    """An MLflow server that dies does not stop the training, and it gets all results later."""
    assert lose_server(project, epoch=1) == ""


def runs_with(project: Path, epochs: int, stage: str = "train_cnn@original") -> list:
    query = f"tags.dvc_stage = '{stage}' and params.`train_cnn.epochs` = '{epochs}'"
    return tracked_runs(project, query)


def stop_training(project: Path, epoch: int, sent: signal.Signals) -> None:
    """Send a signal to DVC and the training after `epoch`; both end within seconds."""
    command = [sys.executable, "-m", "dvc", "repro", "train_cnn@original"]
    started = subprocess.Popen(
        command, cwd=project, env=environment(PYTHONUNBUFFERED="1"), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A background shell ignores Ctrl-C, and so would everything it starts, including these tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    with started.stdout:
        assert any(line.startswith(f"epoch {epoch}/") for line in started.stdout)
        os.killpg(started.pid, sent)
        began = time.monotonic()
        started.stdout.read()
    started.wait()
    assert time.monotonic() - began < 20  # includes DVC's own end and the follower's, on a busy machine


def test_stopped_training_resumes(project):
    """A stopped training continues in its own run and gives the same bytes."""
    epochs = 9  # a new value, so that nothing comes from the cache
    set_params(project, {"train_cnn": {"epochs": epochs}})
    for epoch, sent in ((2, signal.SIGINT), (4, signal.SIGKILL)):
        stop_training(project, epoch, sent)
        deadline = time.monotonic() + 10  # for the follower
        while runs_with(project, epochs)[0].info.status != "KILLED" and time.monotonic() < deadline:
            time.sleep(0.1)
        [run] = runs_with(project, epochs)
        assert run.info.status == "KILLED"
    again = dvc(project, "repro", "train_cnn@original")
    assert "resuming after epoch" in again.stdout
    [run] = runs_with(project, epochs)
    assert run.info.status == "FINISHED"
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [metric.step for metric in history] == list(range(1, epochs + 1))
    resumed = outputs(project)
    dvc(project, "repro", "--force", "--single-item", "train_cnn@original")
    assert outputs(project) == resumed


AT_ONCE = ("train_cnn@original", "train_cnn@augmented")
CNN_OUTPUTS = [str(path) for training in CNNS.values() for path in training.outputs]


def start_both(project: Path) -> Started:
    """Start `make repro` with both trainings to do, and wait until each has finished an epoch."""
    log = project.parent / "logs" / f"both-{time.time_ns()}.log"
    started = Started(project, log, "-m", "fashion_cnn", "repro", FASHION_CNN_THREADS="2")
    while not all(f"{images}: epoch " in started.printed() for images in ("original", "augmented")):
        assert not started.ended(), started.printed()
        time.sleep(0.05)
    return started


@pytest.fixture(scope="module")
def both(project) -> dict[str, bytes]:
    """The CNNs' outputs, with more epochs than other tests use, made one after the other."""
    set_params(project, {"train_cnn": {"epochs": 5}})
    dvc(project, "repro", *AT_ONCE)
    return cnn_outputs(project)


def cnn_outputs(project: Path) -> dict[str, bytes]:
    return {path: (project / path).read_bytes() for path in CNN_OUTPUTS}


def forget_both(project: Path) -> None:
    for stage in (*AT_ONCE, "evaluate_cnn@original", "evaluate_cnn@augmented"):
        if stage in lock_entries(project):  # an earlier test may have stopped before it
            forget(project, stage)
    shutil.rmtree(project / ".checkpoints", ignore_errors=True)


def test_both_at_once(project):
    """Training both CNNs at once gives the same bytes and completes DVC's record and MLflow's runs."""
    set_params(project, SMALL)
    dvc(project, "repro")
    made, entries = contents(project), lock_entries(project)
    epochs = SMALL["train_cnn"]["epochs"]

    def statuses() -> dict[str, str]:
        found = [run for stage in AT_ONCE for run in runs_with(project, epochs, stage)]
        return {run.info.run_id: run.info.status for run in found}

    before = statuses()
    forget_both(project)
    printed = tool(project, "repro", FASHION_CNN_THREADS="2")
    assert contents(project) == made
    assert lock_entries(project) == entries
    assert statuses() == before == dict.fromkeys(before, "FINISHED")  # each in its own run
    for images in ("original", "augmented"):
        assert f"{images}: epoch {epochs}/{epochs}: " in printed


def ends(printed: str) -> dict[str, str]:
    """The one line in which each training says that it was stopped, or DVC, if it was between stages."""
    lines = [line for line in printed.splitlines() if "stopped on request" in line or "ERROR" in line]
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert len(found) == len([line for line in lines if ": " in line]), printed
    return found


def assert_both_resume(project: Path, both: dict[str, bytes]) -> None:
    """Both trainings resume and give the same bytes; the stages after them are not run."""
    assert "resuming after epoch" in dvc(project, "repro", *AT_ONCE).stdout
    assert cnn_outputs(project) == both


def test_one_stop_stops_both(project, both):
    """A training that stops also stops the other one."""
    forget_both(project)
    started = start_both(project)
    running = stage_processes(project)
    [augmented] = [process for process in running if process.cmdline()[-1] == "augmented"]
    augmented.terminate()
    assert started.process.wait(timeout=30) != 0
    assert wait_until_gone(running, timeout=2)
    found = ends(started.printed())
    assert found["augmented"] == "stopped on request"
    assert "original" in found
    assert_both_resume(project, both)


def test_ctrl_c_stops_both(project, both):
    """Ctrl-C stops both trainings."""
    forget_both(project)
    started = start_both(project)
    running = stage_processes(project)
    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(timeout=30) == 130
    assert wait_until_gone(running, timeout=2)
    assert {"original", "augmented"} <= ends(started.printed()).keys()


def test_kill_while_both_train(project, both):
    """A kill while both CNNs train leaves no process at work and costs no finished epoch.

    The kill hits the process that was started; it has two DVC children, each with a stage.
    """
    forget_both(project)
    started = start_both(project)
    running, dvcs = stage_processes(project), psutil.Process(started.process.pid).children()
    assert kill(started, "dvc")
    assert wait_until_gone(running, timeout=2)
    assert not psutil.wait_procs(dvcs, timeout=30)[1]  # DVC considers them alive until init has reaped them
    assert_both_resume(project, both)
