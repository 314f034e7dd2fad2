"""MLflow: one training is one run, reports leave it alone, nothing is lost, and the store is in its place."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import mlflow
import numpy as np
import pytest
import torch
from filelock import FileLock

from fashion_cnn.models.cnns import TOY_SHAPE, build_toy_cnn, fresh, save_weights
from fashion_cnn.project import outbox
from fashion_cnn.project.catalog import CNNS, TOY, Training
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import sha256_of
from fashion_cnn.project.outbox import Outbox, open_run, outboxes
from fashion_cnn.project.provenance import dvc_tags, git_diff, git_tags
from fashion_cnn.tracking import runs
from fashion_cnn.tracking.sender import send, send_left_over
from fashion_cnn.tracking.store import StoreError, connect, reason, shown, store_url
from project import SCRIPTS, STAGES, git, imported_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow and torch warn about themselves
]

UNREACHABLE = "http://127.0.0.1:9"  # nothing listens on the discard port
SHA, KEY = "ab" * 32, "12" * 32


@pytest.fixture
def unsent(workspace, new_store, monkeypatch):
    """Outboxes whose senders do nothing, so that a test can send them itself."""
    sender = Mock()
    sender.return_value.communicate.return_value = ("MLflow: left\n", None)
    monkeypatch.setattr(outbox, "subprocess", Mock(Popen=sender, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(outbox, "git_tags", dict)
    shutil.copy(new_store, workspace / "mlflow.db")
    return workspace


def train(workspace: Path, *, status: str = "FINISHED", key: str = KEY, first: int = 1) -> None:
    """Write what a toy training of two epochs writes, from epoch `first` on."""
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


def folders() -> list[Path]:
    return sorted(path for path in outboxes().iterdir() if path.is_dir())


def all_runs():
    store = connect()
    return store.client.search_runs(store.experiments)


def curve(run) -> list[tuple[int, float]]:
    client = connect().client
    return [
        (metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train_loss")
    ]


def assert_whole(run, workspace: Path) -> None:
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
    assert runs.ready_models(client, run)


def test_a_training_is_one_whole_run(workspace):
    train(workspace)
    [run] = all_runs()
    assert run.info.run_name == "train_toy_cnn"
    assert f"fashion-cnn trace {run.info.run_id}" in run.data.tags["mlflow.note.content"]
    assert_whole(run, workspace)
    assert run.info.start_time <= run.info.end_time
    assert run.info.artifact_uri.startswith((workspace / "mlruns").as_uri())
    assert (workspace / "mlflow.db").exists()
    assert folders() == []


def test_the_model_is_logged_without_pickle_and_takes_any_batch(unsent):
    train(unsent)
    assert send_left_over(connect()) == []
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


@pytest.mark.parametrize("count", range(7))
def test_a_sender_that_is_killed_after_any_event_leaves_the_rest_to_the_next(unsent, monkeypatch, count):
    """The event itself is sent twice: the sender had not noted it."""
    train(unsent)
    store = connect()
    with monkeypatch.context() as patch:
        saved = Mock(side_effect=[None] * count + [SystemExit])
        whole = runs.log_rows, runs.log_model
        patch.setattr("fashion_cnn.tracking.sender.write_text", saved)
        with pytest.raises(SystemExit):
            send(store, folders()[0])
        assert (runs.log_rows, runs.log_model) == whole
    assert send_left_over(store) == []
    [run] = all_runs()
    assert_whole(run, unsent)
    assert len(run.outputs.model_outputs) == 1
    assert folders() == []


def test_a_model_whose_files_were_not_sent_counts_as_none(unsent):
    train(unsent)
    (unsent / "mlruns").write_text("no folder")
    [line] = send_left_over(connect())
    assert "delete" in line
    assert str(folders()[0]) in line
    (unsent / "mlruns").unlink()
    assert send_left_over(connect()) == []
    [run] = all_runs()
    assert_whole(run, unsent)


def test_what_cannot_be_sent_stops_nothing_else(unsent):
    (outboxes() / "0-damaged").mkdir(parents=True)
    (outboxes() / "0-damaged/events.jsonl").write_text("{\n")
    (outboxes() / "1-empty").mkdir()
    train(unsent)
    lines = send_left_over(connect())
    assert ["to drop it, delete " in line and line.endswith("0-damaged") for line in lines] == [True]
    [run] = all_runs()
    assert_whole(run, unsent)
    assert [folder.name for folder in folders()] == ["0-damaged"]


def test_a_resumed_training_goes_on_in_its_run(unsent):
    with pytest.raises(KeyboardInterrupt):
        train(unsent, status="KILLED")
    store = connect()
    assert send_left_over(store) == []
    [run] = all_runs()
    assert (run.info.status, curve(run)) == ("KILLED", [(1, 0.5)])
    began = run.info.start_time
    train(unsent, first=2)
    assert send_left_over(store) == []
    [run] = all_runs()
    assert_whole(run, unsent)
    assert run.info.start_time == began


def test_both_parts_of_a_resumed_training_may_be_sent_late(unsent):
    with pytest.raises(KeyboardInterrupt):
        train(unsent, status="KILLED")
    train(unsent, first=2)
    assert send_left_over(connect()) == []
    [run] = all_runs()
    assert_whole(run, unsent)


def test_the_same_training_again_is_the_same_run(unsent):
    train(unsent)
    send_left_over(connect())
    train(unsent)
    send_left_over(connect())
    [run] = all_runs()
    assert_whole(run, unsent)


@pytest.mark.parametrize(("fault", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_training_that_stops_is_marked_as_such(unsent, fault, status):
    with pytest.raises(fault), open_run(TOY, {}, KEY):
        raise fault
    send_left_over(connect())
    [run] = all_runs()
    assert run.info.status == status


ENDLESS = """
import time
from fashion_cnn.project.outbox import open_run
from fashion_cnn.project.catalog import TOY
with open_run(TOY, {}, "12" * 32) as run:
    for epoch in range(1, 10000):
        run.log_epoch({"epoch": epoch, "train_loss": 0.5}, 10)
        time.sleep(0.05)
"""


def stage(code: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | more, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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


def test_a_training_whose_sender_dies_too_is_marked_by_the_next(workspace):
    connect()
    started = stage(ENDLESS)
    wait_for(lambda: all_runs() and curve(all_runs()[0]), 60)
    [sender] = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"tracking.sender" in path.read_bytes() and str(workspace).encode() in path.read_bytes()
    ]
    os.kill(sender, signal.SIGKILL)
    assert send_left_over(connect()) == []
    assert all_runs()[0].info.status == "RUNNING"  # the stage is alive
    started.kill()
    started.communicate()
    assert send_left_over(connect()) == []
    assert all_runs()[0].info.status == "KILLED"


def test_an_unreachable_store_costs_no_training_and_a_line_says_so(workspace, monkeypatch):
    started = stage(
        ENDLESS.replace("10000", "3"), MLFLOW_TRACKING_URI=UNREACHABLE.replace("//", "//me:secret@")
    )
    printed, _ = started.communicate(timeout=60)
    assert started.returncode == 0
    *_, line = printed.splitlines()
    assert line.startswith("MLflow store http://127.0.0.1:9: ")
    assert line.endswith("`fashion-cnn sync` sends the rest")
    assert "secret" not in printed
    assert b"secret" not in b"".join(path.read_bytes() for path in outboxes().rglob("*") if path.is_file())
    assert send_left_over(connect()) == []
    [run] = all_runs()
    assert (run.info.status, [step for step, _ in curve(run)]) == ("FINISHED", [1, 2])


def test_whoever_requires_a_store_is_stopped_without_one(workspace):
    code = ENDLESS.replace("10000", "3")
    done = stage(code, MLFLOW_TRACKING_URI=UNREACHABLE, REQUIRE_MLFLOW="1")
    assert "StageError: MLflow store http://127.0.0.1:9: " in done.communicate(timeout=60)[0]
    done = stage(code, REQUIRE_MLFLOW="1")
    assert (
        done.communicate(timeout=60)[0].splitlines()[-1].startswith(f"MLflow: sent to {workspace}/mlflow.db")
    )


HANGS = """
from pathlib import Path
from fashion_cnn.project import outbox
outbox.WAIT, outbox.SENDER = 0.5, Path("hangs.py")
"""


@pytest.mark.parametrize(
    ("require", "line"),
    [
        ("", "MLflow: not everything was sent within 0.5 s; `fashion-cnn sync` sends the rest"),
        ("1", "MLflow: the store did not answer within 1.0 s; the stage stops since REQUIRE_MLFLOW is set"),
    ],
)
def test_a_sender_that_hangs_costs_a_stage_a_bounded_time(workspace, require, line):
    Path("hangs.py").write_text(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    )
    began = time.monotonic()
    done = stage(HANGS + ENDLESS.replace("10000", "3"), REQUIRE_MLFLOW=require)
    assert line in done.communicate(timeout=60)[0]
    assert time.monotonic() - began < 30
    assert bool(done.returncode) == bool(require)
    if not require:
        assert send_left_over(connect()) == []
        assert [run.info.status for run in all_runs()] == ["FINISHED"]


def test_senders_neither_see_an_outbox_that_nobody_holds_yet_nor_leave_one_that_is_half_deleted(
    unsent, monkeypatch
):
    def acquire(lock) -> None:
        assert send_left_over(connect()) == []
        whole(lock)

    whole = FileLock.acquire
    with monkeypatch.context() as patch:
        patch.setattr(
            outbox, "FileLock", Mock(side_effect=lambda path: Mock(acquire=lambda: acquire(FileLock(path))))
        )
        train(unsent)
    (outboxes() / ".gone-1").mkdir()
    assert send_left_over(connect()) == []
    assert_whole(all_runs()[0], unsent)
    assert list(outboxes().iterdir()) == []


def test_an_outbox_that_was_begun_in_another_store_stays_for_it(unsent, monkeypatch):
    train(unsent)
    (unsent / "mlruns").write_text("no folder")
    assert len(send_left_over(connect())) == 1
    (unsent / "mlruns").unlink()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{unsent}/other.db")
        [line] = send_left_over(connect())
        assert line.startswith(
            "MLflow: a run begun in another store, mlflow.db, where `fashion-cnn sync` ends it"
        )
        assert all_runs() == []
    assert send_left_over(connect()) == []
    assert_whole(all_runs()[0], unsent)


def test_a_run_that_was_deleted_meanwhile_is_made_again(unsent):
    train(unsent)
    (unsent / "mlruns").write_text("no folder")
    send_left_over(connect())
    (unsent / "mlruns").unlink()
    client = connect().client
    client.delete_run(all_runs()[0].info.run_id)
    assert send_left_over(connect()) == []
    [run] = all_runs()
    assert_whole(run, unsent)


def report(stage: str, training: Training, weights_sha256: str, metrics: dict, files: list[Path]) -> None:
    box = Outbox()
    box.report(stage, training, weights_sha256, metrics, files)
    box.close()
    assert send_left_over(connect()) == []


def test_reports_leave_status_and_times_alone(unsent):
    train(unsent)
    send_left_over(connect())
    [before] = all_runs()
    table = unsent / "table.csv"
    table.write_text("a,b\n1,2\n")
    report("evaluate_cnn", TOY, before.data.tags["weights_sha256"], {"test_loss": 0.3}, [table])
    [after] = all_runs()
    assert after.data.metrics["test_loss"] == 0.3
    assert (after.info.status, after.info.start_time, after.info.end_time) == (
        before.info.status,
        before.info.start_time,
        before.info.end_time,
    )
    client = connect().client
    files = client.list_artifacts(after.info.run_id, "evaluate_cnn")
    assert [file.path for file in files] == ["evaluate_cnn/table.csv"]


def test_a_file_is_sent_as_it_was_when_it_was_reported(unsent):
    table = unsent / "table.csv"
    table.write_text("then")
    box = Outbox()
    box.report("evaluate_cnn", TOY, SHA, {}, [table])
    table.write_text("later")
    box.close()
    send_left_over(connect())
    [run] = all_runs()
    client = connect().client
    sent = client.download_artifacts(run.info.run_id, "evaluate_cnn/table.csv")
    assert Path(sent).read_text() == "then"


def test_a_report_goes_to_every_run_of_its_weights(unsent):
    """Two machines may train to the same bytes; each has its own run."""
    for key in ("34" * 32, "56" * 32):
        train(unsent, key=key)
        send_left_over(connect())
    report("verify_manual_conv", TOY, sha256_of(unsent / "toy.safetensors"), {"max_error": 0.5}, [])
    found = all_runs()
    assert {run.data.tags["training"] for run in found} == {"34" * 32, "56" * 32}
    assert [run.data.metrics["max_error"] for run in found] == [0.5, 0.5]


def test_a_metric_is_logged_once_even_if_it_is_no_number(unsent):
    train(unsent, key="34" * 32)
    send_left_over(connect())
    client, metrics = connect().client, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5}
    [run] = all_runs()
    assert runs.log_new_metrics(client, run.info.run_id, metrics, 1)
    assert not runs.log_new_metrics(client, run.info.run_id, metrics, 2)
    assert runs.log_new_metrics(client, run.info.run_id, metrics | {"a": 0.0}, 3)


def test_weights_unknown_to_the_store_get_a_run_that_says_so(unsent):
    report("evaluate_cnn", CNNS["original"], SHA, {"test_accuracy": 0.9}, [])
    report("plot_results", CNNS["original"], SHA, {"more": 1.0}, [])
    [run] = all_runs()
    assert run.info.run_name == "train_cnn@original"
    assert run.data.tags["stand_in"] == "true"
    assert "not trained into this store" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics == {"test_accuracy": 0.9, "more": 1.0}
    assert run.info.status == "FINISHED"


def test_the_toy_and_the_cnns_have_an_experiment_each_and_runs_in_turn_another_colour(unsent):
    store = connect()
    names = [TOY.stage, *(training.stage for training in CNNS.values())]
    made = [runs.stand_in(store, name, f"{number}" * 64, {}, None) for number, name in enumerate(names * 4)]
    found = [store.client.get_run(run_id) for run_id in made]
    named = {store.client.get_experiment(one).name: one for one in store.experiments}
    cnns, toys = named["fashion-cnn"], named["fashion-cnn-toy"]
    assert [run.info.experiment_id for run in found] == [toys, cnns, cnns] * 4
    colors = [run.data.tags["mlflow.runColor"] for run in found if run.info.experiment_id == cnns]
    assert colors[:2] == ["#0072b2", "#d55e00"]  # as in the figures
    assert colors[:1] == colors[7:]
    assert len(set(colors[:7])) == 7
    store.client.set_tag(made[-1], "mlflow.runColor", "#123456")  # chosen in the UI
    last = store.client.get_run(runs.stand_in(store, names[1], "ab" * 32, {}, None))
    assert last.data.tags["mlflow.runColor"] == "#0072b2"


def test_without_the_toys_experiment_only_the_toys_runs_wait(unsent):
    store = connect()
    toys = store.experiment("fashion-cnn-toy")
    store.client.delete_experiment(toys)
    train(unsent)
    box = Outbox()
    box.report("evaluate_cnn", CNNS["original"], SHA, {"test_accuracy": 0.9}, [])
    box.close()
    [line] = send_left_over(connect())
    assert (
        f"fashion-cnn-toy is deleted; restore it with `mlflow experiments restore --experiment-id {toys}`"
        in line
    )
    assert [run.info.run_name for run in all_runs()] == ["train_cnn@original"]
    store.client.restore_experiment(toys)
    assert send_left_over(connect()) == []
    assert {run.info.run_name for run in all_runs()} == {"train_cnn@original", "train_toy_cnn"}


def test_a_metric_that_is_no_number_is_not_given_to_the_model_as_0(unsent):
    train(unsent)
    send_left_over(connect())
    [run] = all_runs()
    report("evaluate_cnn", TOY, run.data.tags["weights_sha256"], {"test_loss": float("nan")}, [])
    [model] = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    assert "test_loss" not in {metric.key for metric in model.metrics}


@pytest.mark.parametrize(("size", "images"), [(None, "55000"), (6000, "6000")])
def test_a_run_says_how_many_images_it_trains_on(unsent, size, images):
    store = connect()
    run_id = runs.stand_in(store, "train_cnn@original", SHA, {}, None)
    params = {"split.train_size": size, "split.val_size": 5000}
    assert runs.log_params(store.client, run_id, params) is True
    assert runs.log_params(store.client, run_id, params) is False
    assert store.client.get_run(run_id).data.params == {
        "split.train_size": str(size or "null"), "split.val_size": "5000", "train_images": images,
    }  # fmt: skip


def test_the_model_has_its_name_and_the_last_value_of_every_metric_of_its_run(unsent):
    train(unsent)
    send_left_over(connect())
    [run] = all_runs()
    report("evaluate_cnn", TOY, run.data.tags["weights_sha256"], {"test_loss": 0.3}, [])
    report("evaluate_cnn", TOY, run.data.tags["weights_sha256"], {"test_loss": 0.2}, [])
    [model] = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    assert model.name == "toy_cnn"
    last = {metric.key: (metric.value, metric.step) for metric in model.metrics}
    assert last["train_loss"] == (0.25, 2)
    assert last["test_loss"] == (0.2, 0)
    assert set(last) == {"train_loss", "images_per_second", "dead_relu", "test_loss"}
    assert curve(run) == [(1, 0.5), (2, 0.25)]  # none twice


def test_a_run_id_or_a_model_id_in_the_environment_hijacks_nothing(unsent, monkeypatch):
    train(unsent)
    send_left_over(connect())
    [first] = all_runs()
    monkeypatch.setenv("MLFLOW_RUN_ID", first.info.run_id)
    monkeypatch.setenv("MLFLOW_ACTIVE_MODEL_ID", first.outputs.model_outputs[0].model_id)
    train(unsent, key="34" * 32)
    send_left_over(connect())
    assert len(all_runs()) == 2
    client = connect().client
    model = client.get_logged_model(first.outputs.model_outputs[0].model_id)
    assert {metric.run_id for metric in model.metrics or []} <= {first.info.run_id}


def commit_all(folder: Path) -> None:
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "t")


def test_a_diff_that_is_sent_later_is_the_one_of_the_training(unsent, monkeypatch):
    monkeypatch.setattr(outbox, "git_tags", git_tags)
    commit_all(unsent)
    (unsent / "code.py").write_text("of the training")
    with open_run(TOY, {}, KEY):
        (unsent / "code.py").write_text("of later")
    client = connect().client
    send_left_over(connect())
    [run] = all_runs()
    diff = Path(client.download_artifacts(run.info.run_id, "uncommitted.diff")).read_text()
    assert "+of the training" in diff
    assert "of later" not in diff


def test_stages_that_meet_a_new_store_at_once_all_get_it(workspace):
    code = "from fashion_cnn.tracking.store import TOYS, connect; print(connect().experiment(TOYS))"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(printed)) == 1


def test_a_runs_name_says_what_is_special_about_it(workspace):
    (workspace / "params.yaml").write_text("train_toy_cnn: {seed: 0, epochs: 40}\n")
    commit_all(workspace)
    tags = git_tags()
    same = {"train_toy_cnn.seed": 0, "train_toy_cnn.epochs": 40}
    other = {"train_toy_cnn.seed": 1, "train_toy_cnn.epochs": 40}
    assert runs.run_name("train_toy_cnn", tags, same) == "train_toy_cnn"
    assert runs.run_name("train_toy_cnn", tags, other) == "train_toy_cnn seed=1"
    assert runs.run_name("train_toy_cnn", tags | {"dvc_exp_name": "slow"}, other) == "train_toy_cnn slow"
    assert runs.run_name("train_toy_cnn", {}, other) == "train_toy_cnn"
    assert runs.run_name("train_toy_cnn", {"git_commit": "ab" * 20}, other) == "train_toy_cnn"


def test_git_and_dvc_tags(workspace, monkeypatch):
    assert git_tags() == {}
    commit_all(workspace)
    assert git_tags()["git_dirty"] == "false"
    (workspace / "params.yaml").write_text("changed by -S")
    assert git_tags()["git_dirty"] == "false"
    (workspace / "code.py").write_text("new")
    assert git_tags()["git_dirty"] == "true"
    monkeypatch.setenv("DVC_EXP_NAME", "puffy-owl")
    assert dvc_tags("train_cnn@original") == {"dvc_stage": "train_cnn@original", "dvc_exp_name": "puffy-owl"}


def test_the_diff_of_a_dirty_tree_gives_it_back(workspace):
    (workspace / "code.py").write_text("one\n\n")
    commit_all(workspace)
    (workspace / "code.py").write_text("two\n\n")
    (workspace / "new.bin").write_bytes(b"\x00\xff")
    (workspace / "latin.txt").write_bytes("é\r\n".encode("latin-1"))
    (workspace / "params.yaml").write_text("changed by -S")
    (workspace / "saved").write_bytes(git_diff().encode("latin-1"))
    subprocess.run(["git", "checkout", "-q", "code.py"], check=True)
    (workspace / "new.bin").unlink()
    (workspace / "latin.txt").unlink()
    subprocess.run(["git", "apply", "saved"], check=True)
    assert (workspace / "code.py").read_text() == "two\n\n"
    assert (workspace / "new.bin").read_bytes() == b"\x00\xff"
    assert (workspace / "latin.txt").read_bytes() == "é\r\n".encode("latin-1")
    assert b"changed by -S" not in (workspace / "saved").read_bytes()


def damaged(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(255 - byte for byte in content[4096:]))


def read_only(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = DELETE")
    path.write_bytes(path.read_bytes()[:100])  # root may write to any file


def without_experiment(path: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{path}")
    client.delete_experiment(client.create_experiment("fashion-cnn"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damaged, "malformed"),
        (read_only, ""),
        (without_experiment, "the experiment fashion-cnn is deleted; .* `mlflow experiments restore"),
        (lambda path: path.write_bytes(b"no database, but long enough for one" * 100), "not a database"),
    ],
)
def test_a_store_that_cannot_be_used_says_so_within_seconds(workspace, new_store, spoil, words):
    shutil.copy(new_store, workspace / "mlflow.db")
    spoil(workspace / "mlflow.db")
    began = time.monotonic()
    with pytest.raises(StoreError, match=f"^MLflow store {workspace}/mlflow.db: .*{words}"):
        connect()
    assert time.monotonic() - began < 10


def test_a_folder_that_is_not_there_is_told_within_seconds(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace}/nowhere/mlflow.db")
    began = time.monotonic()
    with pytest.raises(StoreError, match="unable to open database file"):
        connect()
    assert time.monotonic() - began < 10


def test_a_project_that_was_moved_or_copied_keeps_its_artifacts(unsent, monkeypatch, tmp_path):
    train(unsent)
    send_left_over(connect())
    copy = tmp_path / "copy"
    shutil.copytree(unsent, copy)
    before = {path: path.stat().st_mtime_ns for path in (unsent / "mlruns").rglob("*")}
    code = """
import mlflow
from fashion_cnn.tracking.store import connect
store = connect()
client = store.client
[run] = client.search_runs(store.experiments)
model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
mlflow.pytorch.load_model(model.model_uri)
client.log_text(run.info.run_id, "new", "new.txt")
print(run.info.artifact_uri, model.artifact_location)
"""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow puts it there
    printed, _ = stage(code, DVC_ROOT=str(copy)).communicate()
    places = printed.splitlines()[-1].split()
    assert [place.startswith(f"{copy.as_uri()}/mlruns/") for place in places] == [True, True], printed
    assert list((copy / "mlruns").rglob("new.txt"))
    assert before == {path: path.stat().st_mtime_ns for path in (unsent / "mlruns").rglob("*")}


def test_a_folder_may_have_any_name(workspace, monkeypatch):
    root = workspace / "50%20 # of ?all&"
    root.mkdir()
    before = set(workspace.iterdir())
    monkeypatch.setenv("DVC_ROOT", str(root))
    connect()
    assert (root / "mlflow.db").exists()
    assert set(workspace.iterdir()) == before


def test_a_relative_address_of_sqlite_is_below_the_root(workspace, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    (tmp_path / "copy").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "copy")
    connect()
    assert (workspace / "runs.db").exists()
    assert shown(store_url()) == f"{workspace}/runs.db"


def test_a_teams_file_names_the_store_unless_the_environment_does(workspace, monkeypatch):
    Path("team.env").write_text("# of all of us\nMLFLOW_TRACKING_URI=https://runs.example\nRAY_ADDRESS=\n")
    assert store_url() == "https://runs.example"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    assert shown(store_url()) == f"{workspace}/mine.db"
    Path("team.env").write_text("MLFLOW_TRACKING_URI=https://me:secret@runs.example\n")
    with pytest.raises(StoreError, match=r"^team\.env: MLFLOW_TRACKING_URI has a user") as fault:
        store_url()
    assert "secret" not in str(fault.value)


def test_addresses_are_shown_without_passwords():
    assert shown("http://me:s%40e@cret@host:5000/a@b") == "http://host:5000/a@b"
    assert shown("postgresql://me:secret@host/runs") == "postgresql://host/runs"
    assert shown("sqlite:////home/a@b/mlflow.db") == "/home/a@b/mlflow.db"


def test_a_long_reason_ends_between_words():
    told = reason(ValueError("many words\n" * 100))
    assert len(told) <= 300
    assert told.endswith(("words …", "many …"))


def schema(store: Path) -> set[tuple]:
    """MLflow's version of the store, all tables with their columns, and all indexes.

    Not the SQL itself: MLflow writes a set of values into it, in another order each time.
    """
    query = """SELECT version_num, 0, 0, 0 FROM alembic_version UNION ALL
        SELECT master.type, master.name, info.name, info.type FROM sqlite_master AS master
        LEFT JOIN pragma_table_info(master.name) AS info"""
    with closing(sqlite3.connect(store)) as database:
        return set(database.execute(query).fetchall())


def test_a_new_store_appears_whole_so_that_a_kill_leaves_none_that_nothing_opens(workspace, new_store):
    (workspace / ".mlflow.db.part").write_text("what an earlier kill left")
    code = "from fashion_cnn.tracking.store import connect; connect()"
    started = subprocess.Popen([sys.executable, "-c", code])
    while not (workspace / "mlflow.db").exists() and started.poll() is None:
        time.sleep(0.001)
    started.kill()
    assert started.wait() == -signal.SIGKILL
    assert schema(workspace / "mlflow.db") == schema(new_store)


def test_no_stage_imports_mlflow():
    for stage in SCRIPTS:
        for path in imported_files(STAGES / f"{stage}.py"):
            assert not re.search("(import|from) mlflow", path.read_text()), path
    assert StageError.__module__ == "fashion_cnn.project.errors"


@pytest.mark.parametrize(
    ("file", "content", "whole"),
    [
        ("sent.json", "", True),  # all is sent, perhaps once more
        ("sent.json", '{"sent": 99}', True),
        ("events.jsonl", '{"event": "dataset", "time": 1}\n', False),
        ("events.jsonl", '{"event": "of another version", "time": 1}\n', False),
    ],
)
def test_a_damaged_outbox_is_sent_or_named_and_stays(unsent, file, content, whole):
    train(unsent)
    [folder] = folders()
    (folder / file).write_text(content)
    later = Outbox()
    later.report("evaluate_cnn", TOY, SHA, {"test_loss": 0.3}, [])
    later.close()
    lines = send_left_over(connect())
    assert [line.endswith(f"to drop it, delete {folder}") for line in lines] == ([] if whole else [True])
    assert folders() == ([] if whole else [folder])
    assert "test_loss" in all_runs()[0].data.metrics


def test_a_finished_run_stays_so_when_its_training_is_repeated_and_killed(unsent):
    train(unsent)
    assert send_left_over(connect()) == []
    [before] = all_runs()
    with pytest.raises(KeyboardInterrupt), open_run(TOY, {}, before.data.tags["training"]):
        raise KeyboardInterrupt
    assert send_left_over(connect()) == []
    [after] = all_runs()
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)


def test_a_model_that_was_deleted_is_logged_again(unsent):
    train(unsent)
    client = connect().client
    send_left_over(connect())
    [run] = all_runs()
    client.delete_logged_model(run.outputs.model_outputs[0].model_id)
    assert not runs.ready_models(client, run)
    assert runs.log_model(client, run.info.run_id, TOY.stage, unsent / "toy.safetensors") is None
    assert runs.ready_models(client, client.get_run(run.info.run_id))


def test_a_server_that_drips_its_answer_is_given_up(workspace, monkeypatch):
    monkeypatch.setattr("fashion_cnn.tracking.store.CONNECT", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    for byte in b"HTTP/1.1 200 OK\r\n" + b"x" * 1000:
                        connection.send(bytes([byte]))
                        time.sleep(0.2)

        threading.Thread(target=drip, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StoreError):  # in words of urllib3, which catches the error
            connect()
        assert time.monotonic() - began < 10
