"""MLflow: one training is one run, whatever is killed or unreachable; later stages add to it alone."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import mlflow
import numpy as np
import pytest
import torch
from filelock import FileLock
from mlflow.entities import LoggedModelStatus

from fashion_cnn.models.cnns import TOY_SHAPE, build_toy_cnn, fresh, save_weights
from fashion_cnn.project import stage_records
from fashion_cnn.project.catalog import CNNS, TOY, Training
from fashion_cnn.project.files import sha256_of
from fashion_cnn.project.record import Record, read_record, records_folder
from fashion_cnn.project.repository import code_state
from fashion_cnn.project.stage_records import StageRecords, open_run
from fashion_cnn.tracking import follower, runs
from fashion_cnn.tracking.follower import send_left_over
from fashion_cnn.tracking.store import connect
from project import SCRIPTS, STAGES, commit_all, imported_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow and torch warn about themselves
]

UNREACHABLE = "http://127.0.0.1:9"  # nothing listens on the discard port
SHA, KEY = "ab" * 32, "12" * 32


@pytest.fixture
def unsent(workspace, new_store, monkeypatch):
    """Records without followers, so that a test can send them itself."""
    process = Mock()
    process.communicate.return_value = ("MLflow: left\n", None)
    monkeypatch.setattr(StageRecords, "_follow", lambda _: process)
    monkeypatch.setattr(stage_records, "code_state", lambda: ({}, b""))
    shutil.copy(new_store, workspace / "mlflow.db")
    return workspace


def train(
    workspace: Path, *, status: str = "FINISHED", key: str = KEY, first: int = 1, has_model: bool = True
) -> None:
    """Record what a toy training of two epochs records, from epoch `first` on."""
    model, weights = fresh(build_toy_cnn, 0), workspace / "toy.safetensors"
    save_weights(model, weights)
    with open_run(TOY, {"train_toy_cnn.epochs": 2, "split.train_size": None}, key) as run:
        run.log_dataset("toy", "cd" * 16, "data/toy.safetensors", {"train_images": 2})
        for epoch in range(first, 3):
            run.log_epoch({"epoch": epoch, "train_loss": 1 / 2**epoch}, images_per_second=10)
            if status == "KILLED":
                raise KeyboardInterrupt
        run.log_metrics({"dead_relu": 0})
        run.log_model(weights, sha256_of(weights), "layers", np.ones((2, *TOY_SHAPE), np.float32))
    if not has_model:
        for path in records_folder().glob("*/*/weights.safetensors"):
            path.unlink()


def report(stage: str, training: Training, weights_sha256: str, metrics: dict, files: list[Path]) -> None:
    records = StageRecords()
    records.report(stage, training, weights_sha256, metrics, files)
    records.close()


def send() -> list[str]:
    return send_left_over(connect())


def folders() -> list[Path]:
    return sorted(path for path in records_folder().iterdir() if path.is_dir())


def all_runs():
    store = connect()
    return store.client.search_runs(store.experiments)


def curve(run) -> list[tuple[int, float]]:
    client = connect().client
    return [
        (metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train_loss")
    ]


def assert_whole(run, workspace: Path, *, has_model: bool = True) -> None:
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train_toy_cnn.epochs": "2", "split.train_size": "null"}
    assert curve(run) == [(1, 0.5), (2, 0.25)]
    assert run.data.metrics["dead_relu"] == 0
    assert run.data.tags["weights_sha256"] == sha256_of(workspace / "toy.safetensors")
    assert run.data.tags["dvc_stage"] == "train_toy_cnn"
    [dataset] = run.inputs.dataset_inputs
    assert dataset.dataset.digest == "cd" * 4
    assert json.loads(dataset.dataset.profile) == {"train_images": 2, "digest": "cd" * 16}
    client = connect().client
    assert "layers.txt" in {file.path for file in client.list_artifacts(run.info.run_id)}
    assert len(runs.models_of(client, run)) == len(runs.ready_models(client, run)) == has_model


def test_a_training_is_one_whole_run(workspace):
    train(workspace)
    [run] = all_runs()
    assert run.info.run_name == "train_toy_cnn"
    assert f"fashion-cnn trace {run.info.run_id}" in run.data.tags["mlflow.note.content"]
    assert_whole(run, workspace)
    assert run.info.start_time <= run.info.end_time
    assert run.info.artifact_uri.startswith((workspace / "mlruns").as_uri())
    assert folders() == []


def test_the_model_is_logged_without_pickle_and_takes_any_batch(unsent):
    train(unsent)
    assert send() == []
    [run] = all_runs()
    [model] = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    assert model.source_run_id == run.info.run_id
    names = {path.name for path in (unsent / "mlruns").rglob("*") if path.is_file()}
    assert "model.pt2" in names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pth", ".pt"))]
    loaded = mlflow.pyfunc.load_model(model.model_uri)
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, *TOY_SHAPE)
    images = np.random.default_rng(0).standard_normal((5, *TOY_SHAPE)).astype(np.float32)
    expected = fresh(build_toy_cnn, 0)(torch.from_numpy(images)).detach().numpy()
    assert loaded.predict(images) == pytest.approx(expected, abs=1e-6)


class Dying:
    """A client of MLflow whose process ends after so many calls."""

    def __init__(self, client, calls: int):
        self.client, self.calls = client, calls

    def __getattr__(self, name: str):
        def call(*arguments, **more):
            answer = getattr(self.client, name)(*arguments, **more)
            self.calls -= 1
            if self.calls == 0:
                raise SystemExit
            return answer

        return call


def test_a_follower_that_dies_after_any_call_leaves_the_rest_to_the_next(unsent):
    calls = 0
    while True:
        calls += 1
        key = f"{calls:064}"
        train(unsent, key=key, has_model=False)
        store = connect()
        store.client = Dying(store.client, calls)
        try:
            send_left_over(store)
        except SystemExit:
            assert send() == []
        else:
            break
        [run] = runs.find_runs(connect(), training=key)
        assert_whole(run, unsent, has_model=False)
        assert folders() == []
    assert calls > 10


def test_a_sync_that_dies_after_any_call_is_completed_by_the_next(unsent):
    Path("dvc.lock.json").write_text("{}")
    Path("table.csv").write_text("a,b")
    Path("diff").write_text("+code")
    calls = 0
    while True:
        calls += 1
        facts = {
            "training": TOY.stage,
            "weights_sha256": f"{calls:064}",
            "dvc_lock": "1",
            "begun": 1,
            "ended": 2,
        }
        own = Record(
            **facts,
            tags={"git_commit": "ab" * 20},
            params={"train_toy_cnn.epochs": 2},
            rows=[{"epoch": 1, "train_loss": 0.5}],
            metrics={"dead_relu": 0},
            files={name: Path(Path(name).name) for name in ("dvc.lock.json", "verify_manual_conv/table.csv")},
            diff=Path("diff"),
        )
        store = connect()
        store.client = Dying(store.client, calls)
        try:
            runs.bring_in_line(store, own)
        except SystemExit:
            runs.bring_in_line(connect(), own)
        else:
            break
        [run] = runs.find_runs(connect(), weights_sha256=own.weights_sha256)
        assert run.info.status == "FINISHED"
        assert run.data.tags["git_commit"] == "ab" * 20
        assert run.data.metrics == {"train_loss": 0.5, "dead_relu": 0}
        client = connect().client
        paths = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert paths == {"dvc.lock.json", "verify_manual_conv", "diff"}
        assert runs.bring_in_line(connect(), own) == {run.info.run_id: []}
    assert calls > 10


def test_a_model_whose_upload_was_killed_is_not_left_beside_the_whole_one(unsent, monkeypatch):
    train(unsent)
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.log_model_artifacts", Mock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            send()
    [run] = all_runs()
    [model] = runs.models_of(connect().client, run)
    connect().client.finalize_logged_model(model.model_id, LoggedModelStatus.PENDING)  # as SIGKILL leaves it
    assert send() == []
    assert_whole(all_runs()[0], unsent)


def test_files_that_cannot_be_sent_are_sent_later(unsent):
    train(unsent)
    (unsent / "mlruns").write_text("no folder")
    [line] = send()
    assert line.endswith(f"to drop it, delete {folders()[0]}")
    (unsent / "mlruns").unlink()
    assert send() == []
    assert_whole(all_runs()[0], unsent)


DAMAGED = {
    "cut": "{",
    "of another version": '{"training": "train_toy_cnn", "begun": 1, "new": 1}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_named_and_stops_nothing_else(unsent, content):
    damaged = records_folder() / "0-damaged"
    (damaged / "train_toy_cnn").mkdir(parents=True)
    (damaged / "train_toy_cnn/record.json").write_text(content)
    train(unsent)
    assert ["to drop it, delete " in line and line.endswith("0-damaged") for line in send()] == [True]
    [run] = all_runs()
    assert_whole(run, unsent)
    assert folders() == [damaged]


def test_a_record_names_no_files(unsent):
    path = records_folder() / "0-0/train_toy_cnn/record.json"
    path.parent.mkdir(parents=True)
    named = '"files": {"a": "/etc/passwd"}, "weights": "/etc/passwd", "diff": "/etc/passwd"'
    path.write_text(f'{{"training": "train_toy_cnn", "begun": 1, {named}}}')
    record = read_record(path)
    assert (record.files, record.weights, record.diff) == ({}, None, None)


def test_what_another_user_left_stops_nothing_else(unsent, monkeypatch):
    train(unsent, has_model=False)
    (records_folder() / "0-0").mkdir()
    whole = follower.has_ended

    def has_ended(folder: Path) -> bool:
        if folder.name == "0-0":
            raise PermissionError(13, "Permission denied", folder / "stage.lock")
        return whole(folder)

    monkeypatch.setattr(follower, "has_ended", has_ended)
    [line] = send()
    assert "Permission denied" in line
    assert_whole(all_runs()[0], unsent, has_model=False)


def test_what_could_not_be_sent_is_tried_again_while_the_stage_works(unsent, monkeypatch):
    report("evaluate_cnn", TOY, SHA, {"test_loss": 0.5}, [])
    [folder], seen, store = folders(), {}, connect()
    with monkeypatch.context() as patch:
        patch.setattr(runs, "bring_in_line", Mock(side_effect=OSError(5, "Input/output error")))
        assert "Input/output error" in follower.send(store, folder, False, seen)
    assert follower.send(store, folder, False, seen) is None
    assert all_runs()[0].data.metrics == {"test_loss": 0.5}


def test_a_link_in_a_record_is_not_followed(unsent):
    report("evaluate_cnn", TOY, SHA, {}, [])
    [folder] = folders()
    (folder / "train_toy_cnn/files").mkdir()
    (folder / "train_toy_cnn/files/x").symlink_to("/etc/passwd")
    [line] = send()
    assert "is a link" in line
    assert all_runs() == []


def test_a_resumed_training_goes_on_in_its_run(unsent):
    with pytest.raises(KeyboardInterrupt):
        train(unsent, status="KILLED")
    assert send() == []
    [run] = all_runs()
    assert (run.info.status, curve(run)) == ("KILLED", [(1, 0.5)])
    began = run.info.start_time
    train(unsent, first=2)
    assert send() == []
    [run] = all_runs()
    assert_whole(run, unsent)
    assert run.info.start_time == began


def test_both_parts_of_a_resumed_training_may_be_sent_late(unsent):
    with pytest.raises(KeyboardInterrupt):
        train(unsent, status="KILLED")
    train(unsent, first=2)
    assert send() == []
    [run] = all_runs()
    assert_whole(run, unsent)


def test_the_same_training_again_is_the_same_run_even_if_it_is_stopped(unsent):
    train(unsent)
    send()
    [before] = all_runs()
    train(unsent)
    send()
    with pytest.raises(KeyboardInterrupt):
        train(unsent, status="KILLED")
    send()
    [run] = all_runs()
    assert_whole(run, unsent)
    assert run.info.end_time == before.info.end_time


@pytest.mark.parametrize(("fault", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_training_that_stops_is_marked_as_such(unsent, fault, status):
    with pytest.raises(fault), open_run(TOY, {}, KEY):
        raise fault
    send()
    [run] = all_runs()
    assert run.info.status == status


def test_a_clock_that_was_set_back_makes_no_second_run(unsent, monkeypatch):
    """What a later stage says about the training is sent after it, though its folder's name is earlier."""
    train(unsent)
    monkeypatch.setattr("time.time_ns", lambda: 1)
    report("verify_manual_conv", TOY, sha256_of(unsent / "toy.safetensors"), {"max_error": 0.5}, [])
    assert send() == []
    [run] = all_runs()
    assert_whole(run, unsent)
    assert run.data.metrics["max_error"] == 0.5


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


def stage(code: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | more, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(condition, seconds: float) -> float:
    """Wait until `condition` holds; returns the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
    return time.monotonic() - began


def test_a_killed_training_is_marked_within_a_second_or_two_and_its_curve_is_live(workspace):
    connect()
    started = stage(ENDLESS)
    wait_for(lambda: all_runs() and curve(all_runs()[0]), 60)
    [running] = all_runs()
    assert running.info.status == "RUNNING"
    started.kill()
    started.communicate()
    seconds = wait_for(lambda: all_runs()[0].info.status == "KILLED", 20)
    assert seconds < 10  # one, and time for a busy machine
    wait_for(lambda: not folders(), 20)
    steps = [step for step, _ in curve(all_runs()[0])]
    assert steps == list(range(1, len(steps) + 1))


def test_a_training_whose_follower_dies_too_is_marked_by_the_next(workspace):
    connect()
    started = stage(ENDLESS)
    wait_for(lambda: all_runs() and curve(all_runs()[0]), 60)
    [process] = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"tracking.follower" in path.read_bytes() and str(workspace).encode() in path.read_bytes()
    ]
    os.kill(process, signal.SIGKILL)
    assert send() == []
    assert all_runs()[0].info.status == "RUNNING"  # the stage is alive
    started.kill()
    started.communicate()
    assert send() == []
    assert all_runs()[0].info.status == "KILLED"


def test_an_unreachable_store_costs_no_training_and_a_line_says_so(workspace):
    started = stage(SHORT, MLFLOW_TRACKING_URI=UNREACHABLE.replace("//", "//me:secret@"))
    printed, _ = started.communicate(timeout=60)
    assert started.returncode == 0
    *_, line = printed.splitlines()
    assert line.startswith("MLflow store http://127.0.0.1:9: ")
    assert line.endswith("`fashion-cnn sync` writes the rest")
    assert "secret" not in printed
    assert b"secret" not in b"".join(
        path.read_bytes() for path in records_folder().rglob("*") if path.is_file()
    )
    assert send() == []
    [run] = all_runs()
    assert (run.info.status, [step for step, _ in curve(run)]) == ("FINISHED", [1, 2])


@pytest.mark.parametrize("echo", ["false", "true"])
def test_whoever_requires_a_store_is_stopped_without_one(workspace, echo):
    """SQL that MLflow prints is not an answer."""
    more = {"REQUIRE_MLFLOW": "1", "MLFLOW_SQLALCHEMYSTORE_ECHO": echo}
    done = stage(SHORT, MLFLOW_TRACKING_URI=UNREACHABLE, **more)
    printed = done.communicate(timeout=60)[0]
    assert "error: MLflow store http://127.0.0.1:9: " in printed
    assert printed.endswith("StageError: MLflow: no store, and REQUIRE_MLFLOW is set, so the stage stops\n")
    assert not records_folder().exists()
    done = stage(SHORT, **more)
    assert done.communicate(timeout=60)[0].endswith(f"\nMLflow: sent to {workspace}/mlflow.db\n")


HANGS = """
from pathlib import Path
from fashion_cnn.project import stage_records
stage_records.WAIT, stage_records.FOLLOWER = 0.5, "hangs"
"""


def test_a_follower_that_hangs_costs_a_stage_a_bounded_time(workspace):
    Path("hangs.py").write_text("import time; time.sleep(30)")
    began = time.monotonic()
    started = stage(HANGS + SHORT, PYTHONPATH=str(workspace))
    printed, _ = started.communicate(timeout=60)  # to the end: the follower holds no pipe of the stage's open
    assert (
        "MLflow: not everything was written within 0.5 s; that goes on; `fashion-cnn sync` writes" in printed
    )
    assert time.monotonic() - began < 25
    assert started.returncode == 0
    assert send() == []
    assert [run.info.status for run in all_runs()] == ["FINISHED"]


def test_a_folder_with_umlauts_and_an_output_in_latin_1_cost_no_training(workspace, monkeypatch):
    (workspace / "hü").mkdir()
    started = stage(SHORT, FASHION_CNN_ROOT=str(workspace / "hü"), PYTHONIOENCODING="latin-1")
    assert "/h\N{REPLACEMENT CHARACTER}/mlflow.db" in started.communicate(timeout=60)[0]
    assert started.returncode == 0


@pytest.mark.parametrize("where", [".records", ".records/0-0/train_toy_cnn"])
def test_records_that_cannot_be_written_cost_no_training(unsent, monkeypatch, capsys, where):
    monkeypatch.setattr("time.time_ns", lambda: 0)
    monkeypatch.setattr("secrets.token_hex", lambda _: "0")
    if where == ".records":
        Path(where).write_text("no folder")
    else:
        monkeypatch.setattr(
            stage_records, "replace_atomically", Mock(side_effect=OSError(28, "No space left", where))
        )
    train(unsent)
    told = capsys.readouterr().out
    assert f"{where}" in told
    assert told.endswith("so not all is recorded; `fashion-cnn sync` writes the rest\n")


def test_a_user_without_a_name_has_runs(unsent, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError))
    train(unsent, has_model=False)
    assert send() == []
    assert all_runs()[0].data.tags["mlflow.user"] == str(os.getuid())


def test_no_follower_sees_records_that_nobody_holds_yet_or_leaves_any_half_deleted(unsent, monkeypatch):
    def acquire(lock) -> None:
        assert send() == []
        whole(lock)

    whole = FileLock.acquire
    connect()
    with monkeypatch.context() as patch:
        watched = Mock(side_effect=lambda path: Mock(acquire=lambda: acquire(FileLock(path))))
        patch.setattr(stage_records, "FileLock", watched)
        train(unsent)
    (records_folder() / "1-1/train_toy_cnn").mkdir(parents=True)
    assert send() == []
    assert_whole(all_runs()[0], unsent)
    assert list(records_folder().iterdir()) == []


def test_records_that_were_begun_in_another_store_stay_for_it(unsent, monkeypatch):
    train(unsent)
    (unsent / "mlruns").write_text("no folder")
    assert len(send()) == 1
    (unsent / "mlruns").unlink()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{unsent}/other.db")
        [line] = send()
        assert line.startswith("MLflow: begun in another store, mlflow.db, where `fashion-cnn sync` ends it")
        assert all_runs() == []
    assert send() == []
    assert_whole(all_runs()[0], unsent)


def test_a_run_that_was_deleted_meanwhile_is_made_again(unsent):
    train(unsent)
    (unsent / "mlruns").write_text("no folder")
    send()
    (unsent / "mlruns").unlink()
    connect().client.delete_run(all_runs()[0].info.run_id)
    assert send() == []
    [run] = all_runs()
    assert_whole(run, unsent)


def test_reports_leave_status_and_times_alone(unsent):
    train(unsent)
    send()
    [before] = all_runs()
    table = unsent / "table.csv"
    table.write_text("then")
    report("evaluate_cnn", TOY, before.data.tags["weights_sha256"], {"test_loss": 0.3}, [table])
    table.write_text("later")
    assert send() == []
    [after] = all_runs()
    assert after.data.metrics["test_loss"] == 0.3
    assert (after.info.status, after.info.start_time, after.info.end_time) == (
        before.info.status,
        before.info.start_time,
        before.info.end_time,
    )
    kept = connect().client.download_artifacts(after.info.run_id, "evaluate_cnn/table.csv")
    assert Path(kept).read_text() == "then"  # as it was when it was reported


def test_a_report_goes_to_every_run_of_its_weights(unsent):
    """Two machines may train to the same bytes; each has its own run."""
    for key in ("34" * 32, "56" * 32):
        train(unsent, key=key, has_model=False)
    report("verify_manual_conv", TOY, sha256_of(unsent / "toy.safetensors"), {"max_error": 0.5}, [])
    assert send() == []
    found = all_runs()
    assert {run.data.tags["training"] for run in found} == {"34" * 32, "56" * 32}
    assert [run.data.metrics["max_error"] for run in found] == [0.5, 0.5]


def test_a_part_that_waits_does_not_take_the_place_of_later_reports(unsent):
    """The toy's experiment is deleted; what the stage said about the CNN is written, once."""
    store = connect()
    toys = store.experiment("fashion-cnn-toy")
    store.client.delete_experiment(toys)
    records = StageRecords()
    for training in (TOY, CNNS["original"]):
        records.report("plot_results", training, SHA, {"value": 1}, [])
    records.close()
    [line] = send()
    assert f"restore it with `mlflow experiments restore --experiment-id {toys}`" in line
    report("plot_results", CNNS["original"], SHA, {"value": 2}, [])
    assert len(send()) == 1
    assert [(run.info.run_name, run.data.metrics["value"]) for run in all_runs()] == [
        ("train_cnn@original", 2)
    ]
    store.client.restore_experiment(toys)
    assert send() == []
    assert {run.info.run_name for run in all_runs()} == {"train_cnn@original", "train_toy_cnn"}


def record(**facts) -> Record:
    return Record(training="train_cnn@original", weights_sha256=SHA, begun=1, ended=2, **facts)


def test_a_metric_is_logged_once_even_if_it_is_no_number(unsent):
    store, metrics = connect(), {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5}
    runs.bring_in_line(store, record(metrics=metrics))
    sent = Record.model_validate_json(record(metrics=metrics).model_dump_json())
    assert list(runs.bring_in_line(store, sent).values()) == [[]]
    assert list(runs.bring_in_line(store, record(metrics=metrics | {"a": 0.0})).values()) == [["metrics"]]


def test_weights_unknown_to_the_store_get_a_run_that_says_so(unsent):
    report("evaluate_cnn", CNNS["original"], SHA, {"test_accuracy": 0.9}, [])
    report("plot_results", CNNS["original"], SHA, {"more": 1.0}, [])
    assert send() == []
    [run] = all_runs()
    assert run.info.run_name == "train_cnn@original"
    assert run.data.tags["stand_in"] == "true"
    assert "not trained into this store" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics == {"test_accuracy": 0.9, "more": 1.0}
    assert run.info.status == "FINISHED"


def test_the_toy_and_the_cnns_have_an_experiment_each_and_runs_in_turn_another_colour(unsent):
    store = connect()
    names = [TOY.stage, *(training.stage for training in CNNS.values())]

    def make(name: str, number: int):
        [run_id] = runs.bring_in_line(
            store, Record(training=name, weights_sha256=f"{number:064}", begun=number)
        )
        return store.client.get_run(run_id)

    found = [make(name, number) for number, name in enumerate(names * 4)]
    named = {store.client.get_experiment(one).name: one for one in store.experiments}
    cnns, toys = named["fashion-cnn"], named["fashion-cnn-toy"]
    assert [run.info.experiment_id for run in found] == [toys, cnns, cnns] * 4
    colors = [run.data.tags["mlflow.runColor"] for run in found if run.info.experiment_id == cnns]
    assert colors[:2] == ["#0072b2", "#d55e00"]  # as in the figures
    assert colors[:1] == colors[7:]
    assert len(set(colors[:7])) == 7
    store.client.set_tag(found[-1].info.run_id, "mlflow.runColor", "#123456")  # chosen in the UI
    assert make(names[1], 99).data.tags["mlflow.runColor"] == "#0072b2"


def test_a_metric_that_is_no_number_is_not_given_to_the_model_as_0(unsent):
    train(unsent)
    report("evaluate_cnn", TOY, sha256_of(unsent / "toy.safetensors"), {"test_loss": float("nan")}, [])
    assert send() == []
    [run] = all_runs()
    [model] = runs.ready_models(connect().client, run)
    assert "test_loss" not in {metric.key for metric in model.metrics}


@pytest.mark.parametrize(("size", "images"), [(None, "55000"), (6000, "6000")])
def test_a_run_says_how_many_images_it_trains_on(unsent, size, images):
    store = connect()
    own = record(params={"split.train_size": size, "split.val_size": 5000})
    [(run_id, added)] = runs.bring_in_line(store, own).items()
    assert added == ["made", "params"]
    assert runs.bring_in_line(store, own) == {run_id: []}
    assert store.client.get_run(run_id).data.params == {
        "split.train_size": str(size or "null"), "split.val_size": "5000", "train_images": images,
    }  # fmt: skip


def test_the_model_has_its_name_and_the_last_value_of_every_metric_of_its_run(unsent):
    train(unsent)
    for loss in (0.3, 0.2):
        time.sleep(0.002)  # of two values of the same millisecond, the larger one counts as the later
        report("evaluate_cnn", TOY, sha256_of(unsent / "toy.safetensors"), {"test_loss": loss}, [])
    assert send() == []
    [run] = all_runs()
    [model] = runs.ready_models(connect().client, run)
    assert model.name == "toy_cnn"
    last = {metric.key: (metric.value, metric.step) for metric in model.metrics}
    assert last["train_loss"] == (0.25, 2)
    assert last["test_loss"] == (0.2, 0)
    assert set(last) == {"train_loss", "images_per_second", "dead_relu", "test_loss"}
    assert curve(run) == [(1, 0.5), (2, 0.25)]  # none twice


def test_a_model_that_was_deleted_is_logged_again(unsent):
    train(unsent)
    send()
    client, [run] = connect().client, all_runs()
    client.delete_logged_model(run.outputs.model_outputs[0].model_id)
    assert not runs.ready_models(client, run)
    train(unsent)
    send()
    assert_whole(all_runs()[0], unsent)


def test_ids_in_the_environment_hijack_nothing(unsent, monkeypatch):
    train(unsent)
    send()
    [first] = all_runs()
    monkeypatch.setenv("MLFLOW_RUN_ID", first.info.run_id)
    monkeypatch.setenv("MLFLOW_ACTIVE_MODEL_ID", first.outputs.model_outputs[0].model_id)
    train(unsent, key="34" * 32)
    send()
    assert len(all_runs()) == 2
    client = connect().client
    model = client.get_logged_model(first.outputs.model_outputs[0].model_id)
    assert {metric.run_id for metric in model.metrics or []} <= {first.info.run_id}


def test_a_diff_that_is_sent_later_is_the_one_of_the_training(unsent, monkeypatch):
    monkeypatch.setattr(stage_records, "code_state", code_state)
    commit_all(unsent)
    (unsent / "code.py").write_text("of the training")
    with open_run(TOY, {}, KEY):
        (unsent / "code.py").write_text("of later")
    send()
    [run] = all_runs()
    diff = Path(connect().client.download_artifacts(run.info.run_id, "uncommitted.diff")).read_text()
    assert "+of the training" in diff
    assert "of later" not in diff


def test_a_runs_name_says_what_is_special_about_it(workspace):
    (workspace / "params.yaml").write_text("train_toy_cnn: {seed: 0, epochs: 40}\n")
    commit_all(workspace)
    tags, _ = code_state()

    def name(tags: dict, **params) -> str:
        named = {f"train_toy_cnn.{leaf}": value for leaf, value in params.items()}
        return runs.run_name(Record(training=TOY.stage, tags=tags, params=named, begun=1))

    assert name(tags, seed=0, epochs=40) == "train_toy_cnn"
    assert name(tags, seed=1, epochs=40) == "train_toy_cnn seed=1"
    assert name(tags | {"dvc_exp_name": "slow"}, seed=1) == "train_toy_cnn slow"
    assert name({}, seed=1) == "train_toy_cnn"
    assert name({"git_commit": "ab" * 20}, seed=1) == "train_toy_cnn"


def test_no_stage_imports_mlflow():
    for stage in SCRIPTS:
        for path in imported_files(STAGES / f"{stage}.py"):
            assert not re.search("(import|from) mlflow", path.read_text()), path
