"""The MLflow store: where it is, made once and whole, and told in seconds if it cannot be used."""

import contextlib
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

import mlflow
import pytest
from filelock import FileLock

from fashion_cnn.project.catalog import TOY
from fashion_cnn.project.errors import StoreError
from fashion_cnn.project.record import Record
from fashion_cnn.project.repository import repository_root
from fashion_cnn.tracking import runs
from fashion_cnn.tracking.store import connect, reason, shown, store_url

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow warns about itself
]


def test_stages_that_meet_a_new_store_at_once_all_get_it(workspace):
    code = "from fashion_cnn.tracking.store import TOY_RUNS, connect; print(connect().experiment(TOY_RUNS))"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(printed)) == 1


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


def test_a_project_that_was_moved_or_copied_keeps_its_artifacts(workspace, new_store, monkeypatch, tmp_path):
    shutil.copy(new_store, workspace / "mlflow.db")
    [run_id] = runs.bring_in_line(connect(), Record(training=TOY.stage, weights_sha256="ab" * 32, begun=1))
    with closing(sqlite3.connect("mlflow.db")) as database:  # the experiment Default has a path
        database.execute(
            "UPDATE experiments SET artifact_location = ? WHERE name = 'Default'", [f"{workspace}/mlruns/0"]
        )
        database.commit()
    copy = tmp_path / "copy of it"
    shutil.copytree(workspace, copy)
    monkeypatch.setenv("FASHION_CNN_ROOT", str(copy))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow puts it there
    client = connect().client
    assert client.get_run(run_id).info.artifact_uri == f"{copy.as_uri()}/mlruns/{run_id}/artifacts"
    assert client.get_experiment("0").artifact_location == f"{copy}/mlruns/0"
    client.log_text(run_id, "new", "new.txt")
    assert [path.is_relative_to(copy) for path in tmp_path.rglob("new.txt")] == [True]


def test_a_folder_may_have_any_name(workspace, monkeypatch):
    root = workspace / "50%20 # of ?all&"
    root.mkdir()
    before = set(workspace.iterdir())
    monkeypatch.setenv("FASHION_CNN_ROOT", str(root))
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# \xe4\n", "byte 2 is not UTF-8"),
        (b"# of all\nMLFLOW_TRACKING_URI='https://runs.example\n", "line 2: expected NAME=value"),
    ],
)
def test_a_damaged_file_of_a_team_is_named(workspace, content, words):
    Path("team.env").write_bytes(content)
    with pytest.raises(StoreError, match=rf"^team\.env: {words}"):
        store_url()


def test_no_variable_of_this_machine_gets_into_an_address(workspace, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    Path("team.env").write_text("MLFLOW_TRACKING_URI=https://${SECRET}.example\n")
    assert store_url() == "https://${SECRET}.example"


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


def test_an_empty_file_becomes_a_store(workspace):
    """As `sqlite3 mlflow.db .tables` makes it, or a full disk."""
    Path("mlflow.db").touch()
    assert connect().experiments


def test_a_new_store_may_take_longer_than_an_answer(workspace, monkeypatch):
    monkeypatch.setattr("fashion_cnn.tracking.store.CONNECT", 2)
    made = mlflow.MlflowClient.search_experiments
    monkeypatch.setattr("mlflow.MlflowClient.search_experiments", lambda self: (time.sleep(3), made(self)))
    assert connect().experiments


def test_a_lock_that_is_held_is_named(workspace, monkeypatch):
    monkeypatch.setattr("fashion_cnn.tracking.store.LOCKED", 0.2)
    Path(".records").mkdir()
    with FileLock(".records/.store.lock"), pytest.raises(StoreError, match=r"\.store\.lock is locked"):
        connect()


@pytest.mark.parametrize(
    ("project", "here", "root"),
    [
        (".", ".dvc/tmp/exps/abc", "."),  # a temporary copy of DVC's
        (".", ".dvc/tmp/exps/abc/below", "."),
        ("inner", "inner", "inner"),  # a stage of an outer project
        ("inner", ".dvc/tmp/exps/abc/inner", ".dvc/tmp/exps/abc/inner"),
    ],
)
def test_runs_belong_to_this_project_and_to_no_outer_one(tmp_path, monkeypatch, project, here, root):
    (tmp_path / project / "fashion_cnn").mkdir(parents=True)
    (tmp_path / here).mkdir(parents=True, exist_ok=True)
    monkeypatch.delenv("FASHION_CNN_ROOT", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path / here)
    assert repository_root() == tmp_path / root
