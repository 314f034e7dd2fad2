"""MLflow: one training is one run, whatever is killed or unreachable; later stages only add to it."""

import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import mlflow
import numpy as np
import psutil
import pytest
import torch
from filelock import FileLock

from fashion_cnn.models.cnns import TOY_SHAPE, build_toy_cnn, fresh, save_weights
from fashion_cnn.project import stage_records
from fashion_cnn.project.catalog import CNNS, TOY
from fashion_cnn.project.files import sha256_of
from fashion_cnn.project.record import Record, read_record, records_folder
from fashion_cnn.project.stage_records import StageRecords, open_run
from fashion_cnn.tracking import models, runs
from fashion_cnn.tracking.follower import send_left_over
from fashion_cnn.tracking.store import connect
from project import SCRIPTS, STAGES, commit_all, imported_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # warnings of MLflow and torch
]

SHA, KEY = "ab" * 32, "12" * 32
CNN, WEIGHTS = CNNS["original"], Path("toy.safetensors")
PARAMS = {"split.val_size": 5000, "split.train_size": None}
IN_MLFLOW = {"split.val_size": "5000", "split.train_size": "null", "train_images": "55000"}


@pytest.fixture
def unsent(workspace, new_store, monkeypatch) -> None:
    """Records without followers, so that a test can send them itself."""
    shutil.copy(new_store, "mlflow.db")
    monkeypatch.setattr(StageRecords, "_follow", lambda _: Mock(communicate=lambda timeout: ("", None)))


def train(key: str = KEY, first: int = 1) -> None:
    """Record what a toy training of two epochs records, from epoch `first` on."""
    save_weights(fresh(build_toy_cnn, 0), WEIGHTS)
    with open_run(TOY, PARAMS, key) as run:
        run.log_dataset("toy", "cd" * 16, "data/toy.safetensors", {"train_images": 2})
        for epoch in range(first, 3):
            run.log_epoch({"epoch": epoch, "train_loss": 1 / 2**epoch}, images_per_second=10)
        run.log_metrics({"dead_relu": 0})
        run.log_model(WEIGHTS, sha256_of(WEIGHTS), "layers")


def stop_training(fault: type[BaseException]) -> None:
    """Record the same training, but end it after its first epoch."""
    with suppress(fault), open_run(TOY, PARAMS, KEY) as run:
        run.log_epoch({"epoch": 1, "train_loss": 0.5}, images_per_second=10)
        raise fault


def report(metrics: dict, weights_sha256: str = SHA, trainings=(TOY,)) -> None:
    """Record what a later stage says about weights."""
    records = StageRecords()
    for training in trainings:
        records.report("plot_results", training, weights_sha256, metrics, [])
    records.close()


def send() -> list[str]:
    return send_left_over(connect())


def sent_run():
    """The only run, after all records were sent."""
    assert send() == []
    [run] = all_runs()
    return run


def folders() -> list[Path]:
    return sorted(records_folder().glob("[!.]*"))


def all_runs():
    store = connect()
    return store.client.search_runs(store.experiments)


def curve(run) -> list[tuple[int, float]]:
    history = connect().client.get_metric_history(run.info.run_id, "train_loss")
    return [(metric.step, metric.value) for metric in history]


def text_of(run, file: str) -> str:
    return Path(connect().client.download_artifacts(run.info.run_id, file)).read_text()


def assert_whole(run) -> None:
    """A run has all that `train` records, and no records are left."""
    assert run.info.status == "FINISHED"
    assert run.info.run_name == run.data.tags["dvc_stage"] == "train_toy_cnn"
    assert connect().client.get_experiment(run.info.experiment_id).name == "fashion-cnn-toy"
    assert f"fashion-cnn trace {run.info.run_id}" in run.data.tags["mlflow.note.content"]
    assert run.data.params == IN_MLFLOW
    assert curve(run) == [(1, 0.5), (2, 0.25)]
    assert run.data.metrics["dead_relu"] == 0
    assert run.data.tags["weights_sha256"] == sha256_of(WEIGHTS)
    assert {"python", "torch", "cpu_capability", "gpu"} <= run.data.tags.keys()
    [data] = run.inputs.dataset_inputs
    assert data.dataset.profile == f'{{"train_images": 2, "digest": "{"cd" * 16}"}}'
    assert text_of(run, "layers.txt") == "layers"
    client = connect().client
    assert len(models.models_of(client, run)) == len(models.ready_models(client, run)) == 1
    assert folders() == []


class Dying:
    """An MLflow client whose process ends after `calls` calls."""

    def __init__(self, client, calls: int):
        self.client, self.calls = client, calls

    def __getattr__(self, name: str):
        if self.calls == 0:
            raise SystemExit
        self.calls -= 1
        return getattr(self.client, name)


@pytest.mark.parametrize("named_by", ["key", "dvc_lock"], ids=["of a stage", "of sync"])
def test_death_after_any_call(unsent, named_by):
    """If a process dies after any of its calls, the next one does the rest."""
    for calls in count():
        own = Record(
            **{"training": TOY.stage, "weights_sha256": f"{calls:064}", named_by: f"{calls:064}"},
            tags={"git_commit": "ab" * 20}, params=PARAMS, metrics={"dead_relu": 0},
            dataset={"name": "toy", "digest": "cd" * 16, "source": "data", "sizes": {}},
            rows=[{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25}],
            files={"params.yaml": Path("params.yaml"), "folder/dvc.yaml": Path("dvc.yaml")},
            diff=Path("dvc.yaml"),
        )  # fmt: skip
        store = connect()
        store.client = Dying(store.client, calls)
        try:
            runs.bring_in_line(store, own)
            break
        except SystemExit:
            runs.bring_in_line(connect(), own)
        [run] = runs.find_runs(connect(), weights_sha256=own.weights_sha256)
        assert (run.info.status, run.data.tags["git_commit"]) == ("FINISHED", "ab" * 20)
        paths = {file.path for file in connect().client.list_artifacts(run.info.run_id)}
        assert paths == {"params.yaml", "folder", "dvc.yaml"}
        assert runs.bring_in_line(connect(), own) == {run.info.run_id: []}
    assert calls > 10


def test_run_of_equal_weights(unsent):
    """A record of dvc.lock goes to the run with these entries, though a newer run has the same weights."""

    def bring(**more: str) -> str:
        [run] = runs.bring_in_line(connect(), Record(training=TOY.stage, weights_sha256=SHA, **more))
        return run

    first = bring(key="1" * 64)
    assert bring(dvc_lock="3" * 64) == first
    second = bring(key="2" * 64)
    assert bring(dvc_lock="4" * 64) == second != first
    assert [bring(dvc_lock="3" * 64), bring(dvc_lock="4" * 64)] == [first, second]


def test_runs_of_experiment():
    """An experiment's runs are its own, that of its commit first, then stand-ins without an origin."""

    def run(**tags: str) -> SimpleNamespace:
        return SimpleNamespace(data=SimpleNamespace(tags=tags))

    elsewhere, own = (run(dvc_exp_name="mine", git_commit=commit) for commit in ("1", "2"))
    stand_in, trained = run(stand_in="true"), run()
    others = [run(stand_in="true", git_commit="3"), run(stand_in="true", dvc_exp_name="other")]
    found = [elsewhere, trained, stand_in, *others, own]
    assert runs.of_experiment(found, "mine", "2") == [own, elsewhere, stand_in]


def test_killed_model_upload(unsent, monkeypatch):
    """A model whose upload was killed does not stay beside the whole one."""
    train()
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.log_model_artifacts", Mock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            send()
    [model] = models.models_of(connect().client, all_runs()[0])
    connect().client.finalize_logged_model(model.model_id, "PENDING")  # as SIGKILL leaves it
    assert_whole(sent_run())


def test_toy_model(unsent):
    """The toy's model gives the probability of label 1."""
    train()
    [model] = models.ready_models(connect().client, sent_run())
    images = np.arange(32, dtype=np.float32).reshape(2, *TOY_SHAPE) / 32
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    found = loaded.predict({"images": images})
    assert loaded.metadata.signature.outputs.input_names() == ["label 1"]
    with torch.inference_mode():
        expected = fresh(build_toy_cnn, 0)(torch.from_numpy(images))
    assert found["label 1"].tolist() == expected.flatten().tolist()


@pytest.fixture
def half_sent(unsent) -> None:
    """A training that was sent, except for its files."""
    train()
    Path("mlruns").write_text("no folder")
    [line] = send()
    assert line.endswith(f"to drop it, delete {folders()[0]}")
    Path("mlruns").unlink()


def test_unsent_files(half_sent):
    """Files that could not be sent are sent later."""
    assert_whole(sent_run())


def test_deleted_run(half_sent):
    """A run that was deleted meanwhile is made again."""
    connect().client.delete_run(all_runs()[0].info.run_id)
    assert_whole(sent_run())


def test_other_store(half_sent, monkeypatch):
    """Records that were begun in another store wait for that store."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/other.db")
        [line] = send()
        assert line.startswith(
            "MLflow: begun in another store, mlflow.db; `fashion-cnn sync` there sends the records"
        )
        assert all_runs() == []
    assert_whole(sent_run())


def delete_experiment() -> None:
    store = connect()
    store.client.delete_experiment(store.experiment("fashion-cnn-toy"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda record: record.write_text("{"), "Invalid JSON"),
        (lambda record: record.write_text('{"training": "train_toy_cnn", "new": 1}'), "new Extra inputs"),
        (lambda record: record.with_name("link").symlink_to("/etc/passwd"), "link is a link"),
        (lambda record: (record.parents[1] / "follower.lock").mkdir(), "Is a directory"),
        (lambda record: delete_experiment(), "restore it with `mlflow experiments restore --experiment-id "),
    ],
)
def test_unsendable_record(unsent, spoil, words):
    """A record that cannot be sent is named and does not stop the others."""
    report({"value": 1}, trainings=[TOY, CNN])
    [folder] = folders()
    spoil(folder / TOY.stage / "record.json")
    [line] = send()
    assert words in line
    assert line.endswith(f"to drop it, delete {folder}")
    report({"value": 2}, trainings=[CNN])
    assert send() == send() == [line]  # the earlier value does not come back
    assert [(run.info.run_name, run.data.metrics["value"]) for run in all_runs()] == [(CNN.stage, 2)]


def test_record_cannot_name_files(workspace):
    """A record that is read from its file cannot name other files."""
    path = workspace / "record.json"
    named = '"files": {"a": "/etc/passwd"}, "weights": "/etc/passwd", "diff": "/etc/passwd"'
    path.write_text(f'{{"training": "train_toy_cnn", {named}}}')
    record = read_record(path)
    assert (record.files, record.weights, record.diff) == ({}, None, None)


@pytest.mark.parametrize(
    ("fault", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (KeyboardInterrupt, None)]
)
def test_stopped_training(unsent, fault, status):
    """A training that stops is marked as stopped and continues in the same run."""
    stop_training(fault)
    if status:  # otherwise both parts are sent late
        assert sent_run().info.status == status
    train(first=2)
    assert_whole(sent_run())


def test_repeated_training(unsent):
    """A repeated training adds only what its run lacks."""
    train()
    before = sent_run()
    connect().client.delete_logged_model(before.outputs.model_outputs[0].model_id)
    train()
    stop_training(KeyboardInterrupt)
    after = sent_run()
    assert_whole(after)
    assert dict(after.info) == dict(before.info)


ENDLESS = """
import time
from fashion_cnn.project.stage_records import open_run
from fashion_cnn.project.catalog import TOY
with open_run(TOY, {}, "12" * 32) as run:
    for epoch in range(1, 10000):
        run.log_epoch({"epoch": epoch, "train_loss": 0.5}, 10)
        time.sleep(0.05)
"""
SHORT = ENDLESS.replace("10000", "3")


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("follower_dies", [False, True])
def test_killed_training(workspace, new_store, follower_dies):
    """A killed training is marked by its follower or by the next one."""
    shutil.copy(new_store, "mlflow.db")
    with subprocess.Popen([sys.executable, "-c", ENDLESS]) as stage:
        wait_for(lambda: all_runs() and curve(all_runs()[0]), 60)  # the curve is live
        if follower_dies:
            psutil.Process(stage.pid).children()[0].kill()
            assert send() == []
        assert all_runs()[0].info.status == "RUNNING"  # because the stage is alive
        stage.kill()
    if follower_dies:
        assert send() == []
    wait_for(lambda: not folders(), 10)  # takes one; more on a busy machine
    assert all_runs()[0].info.status == "KILLED"


def run_stage(code: str, **more: str) -> subprocess.CompletedProcess:
    """Run it until its output ends: a follower must not hold the pipe open."""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | more, timeout=60, check=False,
        text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


AWAY = {"MLFLOW_TRACKING_URI": "http://me:pa55word@127.0.0.1:9"}  # nothing listens on the discard port
REQUIRED = {"REQUIRE_MLFLOW": "1"}


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (AWAY, "MLflow store http://127.0.0.1:9: .*; `fashion-cnn sync` writes the rest"),
        (AWAY | REQUIRED, ".*StageError: MLflow: no store, and REQUIRE_MLFLOW is set, so the stage stops"),
        (REQUIRED | {"MLFLOW_SQLALCHEMYSTORE_ECHO": "true"}, "MLflow: sent to /.*/hü/mlflow.db"),
        ({"PYTHONIOENCODING": "latin-1"}, "MLflow: sent to /.*/h\N{REPLACEMENT CHARACTER}/mlflow.db"),
    ],
    ids=["unreachable", "required", "SQL printed", "not in UTF-8"],
)
def test_line_about_runs(workspace, new_store, variables, line):
    """A stage ends with a line about its runs."""
    root = workspace / "hü"
    root.mkdir()
    shutil.copy(new_store, root / "mlflow.db")
    done = run_stage(SHORT, FASHION_CNN_ROOT=str(root), **variables)
    assert re.fullmatch(line, done.stdout.splitlines()[-1])
    assert bool(done.returncode) == ("StageError" in line)
    kept = [path.read_text() for path in root.glob(".records/**/*.*") if path.is_file()]
    assert "pa55word" not in "".join([done.stdout, *kept])


@pytest.mark.parametrize(("wait", "end"), [("WAIT", ""), ("STOPPED", "    raise KeyboardInterrupt\n")])
def test_hanging_follower(workspace, wait, end):
    """A follower that hangs delays a stage for a bounded time."""
    Path("hangs.py").write_text("import time; time.sleep(90)")  # longer than run_stage waits
    patch = f"from fashion_cnn.project import stage_records as s; s.FOLLOWER, s.{wait} = 'hangs', 0.5"
    done = run_stage(patch + SHORT + end, PYTHONPATH=str(workspace))
    line = "MLflow: not everything was written within 0.5 s; the follower continues; `fashion-cnn sync`"
    assert line in done.stdout
    assert sent_run().info.status == ("KILLED" if end else "FINISHED")


@pytest.mark.parametrize(("of", "name"), [(Path, "rename"), (stage_records, "replace_atomically")])
def test_full_disk(unsent, monkeypatch, capsys, of, name):
    """A full disk does not stop a training."""
    monkeypatch.setattr(of, name, Mock(side_effect=OSError(28, "Disk full")))
    train()
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"MLflow: {records_folder()}")
    assert line.endswith(": Disk full, so the record is incomplete; `fashion-cnn sync` writes the rest")


def test_unheld_records(unsent, monkeypatch):
    """A follower does not see records that nobody holds yet, and leaves none half deleted."""

    class Watched(FileLock):
        def acquire(self):
            assert send() == []
            return super().acquire()

    monkeypatch.setattr(stage_records, "FileLock", Watched)
    train()
    (records_folder() / "1-1/train_toy_cnn").mkdir(parents=True)
    assert_whole(sent_run())


def test_clock_set_back(unsent, monkeypatch):
    """A report goes to every run of its weights, even if the clock was set back.

    Two machines may train to the same bytes; the report's folder sorts first by name.
    """
    for key in ("34" * 32, "56" * 32):
        train(key)
    monkeypatch.setattr("time.time_ns", lambda: 1)
    report({"max_error": 0.5}, sha256_of(WEIGHTS))
    assert send() == []
    assert [run.data.metrics["max_error"] for run in all_runs()] == [0.5, 0.5]


def bring(**facts) -> tuple:
    """Bring the run of a record up to date; returns the run, and what was added."""
    record = Record(**{"training": CNN.stage, "weights_sha256": SHA} | facts)
    [(run_id, added)] = runs.bring_in_line(connect(), record).items()
    return connect().client.get_run(run_id), added


def test_nameless_user(unsent, monkeypatch):
    """A user without a name can make runs."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError))
    assert bring()[0].data.tags["mlflow.user"] == str(os.getuid())


def test_unknown_weights(unsent):
    """Weights that the store does not know get a run that says so."""
    bring(metrics={"test_accuracy": 0.9})
    run, _ = bring(metrics={"more": 1})
    assert (run.info.run_name, run.info.status) == ("train_cnn@original", "FINISHED")
    assert run.data.metrics == {"test_accuracy": 0.9, "more": 1}
    assert connect().client.get_experiment(run.info.experiment_id).name == "fashion-cnn"
    assert run.data.tags["stand_in"] == "true"
    assert "not recorded in this store" in run.data.tags["mlflow.note.content"]


def test_non_finite_metric(unsent):
    """A metric is logged once, even if it is not finite."""
    metrics = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5}
    bring(metrics=metrics)
    sent = Record.model_validate_json(Record(training=CNN.stage, metrics=metrics).model_dump_json())
    assert bring(metrics=sent.metrics)[1] == []
    assert bring(metrics=metrics | {"a": 0.0})[1] == ["metrics"]


def test_reports_only_add(unsent):
    """Reports add to a run and to its model and change nothing else."""
    train()
    before = sent_run()
    for loss in (0.3, 0.2):
        time.sleep(0.002)  # of two values of the same millisecond, the larger one counts as the later
        report({"test_loss": loss, "error": math.nan}, sha256_of(WEIGHTS))
    run = sent_run()
    assert dict(run.info) == dict(before.info)
    assert curve(run) == [(1, 0.5), (2, 0.25)]  # no epoch twice
    [model] = models.ready_models(connect().client, run)
    assert model.name == "toy_cnn"
    assert {metric.key: (metric.value, metric.step) for metric in model.metrics} == {
        "train_loss": (0.25, 2), "images_per_second": (10, 2), "dead_relu": (0, 0), "test_loss": (0.2, 0),
    }  # fmt: skip


def test_environment_ids(unsent, monkeypatch):
    """IDs in the environment do not hijack a training's run."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_ACTIVE_MODEL_ID"):
        monkeypatch.setenv(name, "12" * 16)
    train()
    assert_whole(sent_run())


def test_files_sent_later(unsent):
    """Files that are sent later are as they were when they were recorded."""
    commit_all(Path.cwd())
    code = Path("code.py")
    code.write_text("then")
    with open_run(TOY, {}, KEY) as run:
        run.records.keep(run.record, "files/code.py", code)
        code.write_text("later")
    found = sent_run()
    assert text_of(found, "code.py") == "then"
    assert "+then" in text_of(found, "uncommitted.diff")


def test_run_name(workspace):
    """A run's name says what is special about the run."""

    def name(seed: int, **tags: str) -> str:
        return runs.run_name(Record(training=TOY.stage, tags=tags, params={"train_toy_cnn.seed": seed}))

    Path("params.yaml").write_text("train_toy_cnn: {seed: 0}\n")
    commit_all(workspace)
    assert name(0, git_commit="HEAD") == "train_toy_cnn"
    assert name(1, git_commit="HEAD") == "train_toy_cnn seed=1"
    assert name(1, git_commit="HEAD", dvc_exp_name="slow") == "train_toy_cnn slow"
    assert name(1, git_commit="gone") == name(1) == "train_toy_cnn"


def test_no_stage_imports_mlflow():
    files = {path for stage in SCRIPTS for path in imported_files(STAGES / f"{stage}.py")}
    assert not [path for path in files if re.search("(import|from) mlflow", path.read_text())]
