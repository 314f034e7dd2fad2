"""MLflow: one training one run, attaching leaves it alone, and the store is where it should be."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import ROOT, git

from lib.files import sha256_of
from lib.lineage import digest, dvc_tags, git_diff, git_tags
from lib.mlflow_log import find_run, has_model, stand_in
from lib.models import TOY_SHAPE, build_toy_cnn, fresh, save_weights, summarize
from lib.store import StoreError, connect
from lib.tracking import attach, require_store, training_run
from lib.unsent import send_unsent

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and torch warn about themselves


def commit_all(folder: Path) -> None:
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "t")


def all_runs():
    client, experiment_id = connect()
    return client.search_runs([experiment_id])


@pytest.fixture
def trained(workspace):
    """The run of a finished toy training and its weights' digest."""
    model, weights = fresh(build_toy_cnn, 0), workspace / "toy.safetensors"
    save_weights(model, weights)
    with training_run("train_toy_cnn", {"train_toy_cnn.epochs": 2, "split.train_size": None}) as run:
        run.log_dataset("toy", digest(np.zeros(3)), "data/toy.safetensors", {"train_images": 2})
        run.log_epoch({"epoch": 1, "train_loss": 0.5}, images_per_second=10)
        run.log_epoch({"epoch": 2, "train_loss": 0.25}, images_per_second=11)
        run.log_metrics({"dead_relu": 0})
        run.log_model(model, weights, summarize(model, TOY_SHAPE), np.zeros((2, *TOY_SHAPE), np.float32))
    return run.run_id, sha256_of(weights)


def test_a_training_is_one_whole_run(trained, workspace):
    run_id, weights_sha256 = trained
    [run] = all_runs()
    assert run.info.run_id == run_id
    assert run.info.run_name == "train_toy_cnn"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train_toy_cnn.epochs": "2", "split.train_size": "None"}
    client, _ = connect()
    history = client.get_metric_history(run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.25)]
    assert run.data.tags["weights_sha256"] == weights_sha256
    assert run.data.tags["dvc_stage"] == "train_toy_cnn"
    [dataset] = run.inputs.dataset_inputs
    assert dataset.dataset.digest == digest(np.zeros(3))
    assert run.info.artifact_uri.startswith((workspace / "mlruns").as_uri())
    assert (workspace / "mlflow.db").exists()


def test_the_model_is_logged_without_pickle_and_takes_any_batch(trained, workspace):
    [run] = all_runs()
    [model] = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    assert model.source_run_id == run.info.run_id
    names = {path.name for path in (workspace / "mlruns").rglob("*") if path.is_file()}
    assert "model.pt2" in names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pth", ".pt"))]
    loaded = mlflow.pyfunc.load_model(model.model_uri)
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, *TOY_SHAPE)
    images = np.random.default_rng(0).standard_normal((5, *TOY_SHAPE)).astype(np.float32)
    expected = fresh(build_toy_cnn, 0)(torch.from_numpy(images)).detach().numpy()
    assert loaded.predict(images) == pytest.approx(expected, abs=1e-6)


def test_a_model_whose_files_were_not_sent_counts_as_none(trained, workspace, capsys):
    client, _ = connect()
    [whole] = all_runs()
    assert has_model(client, whole)
    (workspace / "mlruns").rename(workspace / "away")
    (workspace / "mlruns").write_text("no folder")
    model = fresh(build_toy_cnn, 0)
    with training_run("train_toy_cnn", {}) as run:
        run.log_model(model, workspace / "toy.safetensors", "", np.zeros((2, *TOY_SHAPE), np.float32))
    assert "model not sent" in capsys.readouterr().out
    cut = client.get_run(run.run_id)
    assert cut.outputs.model_outputs
    assert not has_model(client, cut)


def test_a_diff_that_is_sent_later_is_the_one_of_the_training(workspace):
    commit_all(workspace)
    client, experiment_id = connect()
    (workspace / "mlruns").write_text("no folder")
    (workspace / "code.py").write_text("of the training")
    with training_run("train_toy_cnn", {}) as run:
        (workspace / "code.py").write_text("of later")
    (workspace / "mlruns").unlink()
    assert send_unsent(client, experiment_id) == 1
    diff = Path(client.download_artifacts(run.run_id, "uncommitted.diff")).read_text()
    assert "+of the training" in diff
    assert "of later" not in diff


def test_attaching_leaves_status_and_times_alone(trained, workspace):
    run_id, weights_sha256 = trained
    [before] = all_runs()
    table = workspace / "table.csv"
    table.write_text("a,b\n1,2\n")
    attach("evaluate_cnn", "train_toy_cnn", weights_sha256, {"test_loss": 0.3}, [table])
    [after] = all_runs()
    assert after.data.metrics["test_loss"] == 0.3
    assert (after.info.status, after.info.start_time, after.info.end_time) == (
        before.info.status,
        before.info.start_time,
        before.info.end_time,
    )
    client, _ = connect()
    assert [file.path for file in client.list_artifacts(run_id, "evaluate_cnn")] == ["evaluate_cnn/table.csv"]


def test_a_fault_while_attaching_does_not_touch_the_training(trained, workspace, capsys):
    attach("evaluate_cnn", "train_toy_cnn", trained[1], {"test_loss": 0.3}, [workspace / "absent.csv"])
    assert "absent.csv" in capsys.readouterr().out
    [run] = all_runs()
    assert run.info.status == "FINISHED"


def test_weights_unknown_to_the_store_get_a_run_that_says_so(workspace):
    attach("evaluate_cnn", "train_cnn@original", "ab" * 32, {"test_accuracy": 0.9})
    attach("plot_results", "train_cnn@original", "ab" * 32, {"more": 1.0})
    [run] = all_runs()
    assert run.info.run_name == "train_cnn@original"
    assert run.data.tags["stand_in"] == "true"
    assert "not trained into this store" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics == {"test_accuracy": 0.9, "more": 1.0}
    assert run.info.status == "FINISHED"


def test_a_stand_in_names_the_present_code_only_where_it_made_the_weights(workspace):
    commit_all(workspace)
    client, experiment_id = connect()
    for code_is_here in (True, False):
        run_id = stand_in(client, experiment_id, "train_cnn@original", "ab" * 32, code_is_here)
        assert ("git_commit" in client.get_run(run_id).data.tags) == code_is_here


@pytest.mark.parametrize(("fault", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_training_that_stops_is_marked_as_such(workspace, fault, status):
    with pytest.raises(fault), training_run("train_toy_cnn", {}):
        raise fault
    [run] = all_runs()
    assert run.info.status == status


def test_a_run_id_in_the_environment_hijacks_nothing(trained, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", trained[0])
    with training_run("train_toy_cnn", {}):
        pass
    assert len(all_runs()) == 2


def test_stages_that_meet_a_new_store_at_once_all_get_it(workspace):
    code = "import sys; sys.path.insert(0, sys.argv[1]); from lib.store import connect; print(connect()[1])"
    command = [sys.executable, "-c", code, str(ROOT / "stages")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(printed)) == 1


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


AWAY = "http://127.0.0.1:9"  # nothing listens on the discard port


def test_a_store_away_at_the_start_stops_within_seconds_or_is_done_without(workspace, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"store http://127\.0\.0\.1:9: .*expected a store that answers"):
        training_run("train_toy_cnn", {}).__enter__()
    assert time.monotonic() - began < 20
    with training_run("train_toy_cnn", {}, "continue") as run:
        run.log_epoch({"epoch": 1, "train_loss": 0.5}, 10)
    assert not require_store("continue")
    attach("evaluate_cnn", "train_toy_cnn", "ab" * 32, {"test_loss": 1.0})
    told = capsys.readouterr().out
    assert told.count("the stage goes on without it") == 2
    assert "`make sync` sends the results later" in told


def test_a_store_that_goes_away_for_an_epoch_gets_it_with_the_next(workspace, monkeypatch, capsys):
    with training_run("train_toy_cnn", {}) as run:
        with monkeypatch.context() as away:
            away.setattr(mlflow.MlflowClient, "log_batch", _refuse)
            run.log_epoch({"epoch": 1, "train_loss": 0.5}, 10)
        run.log_epoch({"epoch": 2, "train_loss": 0.25}, 10)
    assert "metrics not sent: Connection refused" in capsys.readouterr().out
    client, _ = connect()
    history = client.get_metric_history(run.run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.25)]


def _refuse(*args, **kwargs):
    raise mlflow.MlflowException("Connection refused")


def test_what_is_missed_until_the_end_is_sent_with_the_next_command(workspace, monkeypatch):
    model, weights = fresh(build_toy_cnn, 0), workspace / "toy.safetensors"
    save_weights(model, weights)
    with monkeypatch.context() as away, training_run("train_toy_cnn", {"train_toy_cnn.seed": 0}) as run:
        for name in ("log_batch", "log_inputs", "set_tag", "set_terminated"):
            away.setattr(mlflow.MlflowClient, name, _refuse)
        run.log_dataset("toy", "ab" * 16, "data/toy.safetensors", {"train_images": 2})
        run.log_epoch({"epoch": 1, "train_loss": 0.5}, 10)
        run.log_metrics({"dead_relu": 0})
        run.log_model(model, weights, "layers", np.zeros((2, *TOY_SHAPE), np.float32))
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace}/other.db")
        assert send_unsent(*connect()) == 0
    assert require_store("stop")  # what each stage that logs asks first
    client, experiment_id = connect()
    assert send_unsent(client, experiment_id) == 0
    run_id = find_run(client, experiment_id, "train_toy_cnn", sha256_of(weights))
    assert run_id == run.run_id
    sent = client.get_run(run_id)
    assert (sent.data.metrics["train_loss"], sent.data.metrics["dead_relu"]) == (0.5, 0)
    assert sent.inputs.dataset_inputs[0].dataset.digest == "ab" * 16
    assert [file.path for file in client.list_artifacts(run_id)] == ["layers.txt"]
    assert sent.info.status == "FINISHED"


def test_a_training_that_fails_to_log_its_params_still_trains(workspace, monkeypatch):
    with monkeypatch.context() as away:
        away.setattr(mlflow.MlflowClient, "log_batch", _refuse)
        with training_run("train_toy_cnn", {"train_toy_cnn.seed": 0}):
            pass
    assert require_store("stop")
    [run] = all_runs()
    assert run.data.params == {"train_toy_cnn.seed": "0"}


def schema(store: Path) -> set[tuple]:
    """MLflow's version of the store, all tables with their columns, and all indexes.

    Not the SQL itself: MLflow writes a set of values into it, in another order each time.
    """
    query = """SELECT version_num, 0, 0, 0 FROM alembic_version UNION ALL
        SELECT master.type, master.name, info.name, info.type FROM sqlite_master AS master
        LEFT JOIN pragma_table_info(master.name) AS info"""
    with closing(sqlite3.connect(store)) as database:
        return set(database.execute(query).fetchall())


def test_a_new_store_appears_whole_so_that_a_kill_leaves_none_that_nothing_opens(workspace):
    (workspace / ".mlflow.db.part").write_text("what an earlier kill left")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "stages")}
    code = "from lib.store import connect; connect()"
    started = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while not (workspace / "mlflow.db").exists() and started.poll() is None:
        time.sleep(0.001)
    started.kill()
    assert started.wait() == -signal.SIGKILL
    found = schema(workspace / "mlflow.db")
    mlflow.MlflowClient(f"sqlite:///{workspace}/other.db").search_experiments()
    assert found == schema(workspace / "other.db")
    assert all_runs() == []
