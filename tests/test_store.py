"""The MLflow store: where it is, its atomic creation, and an error within seconds if it is unusable."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import mlflow
import pytest
from filelock import FileLock

from fashion_cnn.project.errors import StoreError
from fashion_cnn.project.record import Record
from fashion_cnn.project.repository import repository_root
from fashion_cnn.tracking import runs, store
from fashion_cnn.tracking.store import connect, shown, store_url

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow's own warnings
]

MAKE_RUN = """
from fashion_cnn.project.record import Record
from fashion_cnn.tracking import runs, store
print(*runs.bring_in_line(store.connect(), Record(training="train_toy_cnn", key="ab" * 32)))
"""


def test_concurrent_creation(workspace):
    """Processes that create a new store at once make one run."""
    command = [sys.executable, "-c", MAKE_RUN]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(printed) == 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "malformed"),
        (lambda path: path.write_bytes(b"no database, but long enough for one" * 100), "not a database"),
        (lambda path: shutil.rmtree(path.parent), "unable to open database file"),
    ],
)
def test_unusable_store(workspace, new_store, monkeypatch, spoil, words):
    """A store that cannot be used raises an error within seconds."""
    path = workspace / "folder/mlflow.db"
    path.parent.mkdir()
    shutil.copy(new_store, path)
    spoil(path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    began = time.monotonic()
    with pytest.raises(StoreError, match=f"^MLflow store {path}: .*{words}"):
        connect()
    assert time.monotonic() - began < 10


def test_dripping_server(workspace, monkeypatch):
    """Connecting gives up a server that drips its answer."""

    def drip(*_):
        with suppress(TimeoutError):  # like urllib3, which then retries
            time.sleep(60)
        time.sleep(60)

    monkeypatch.setattr(store, "CONNECT", 2)
    monkeypatch.setattr("mlflow.MlflowClient.get_experiment_by_name", drip)
    began = time.monotonic()
    with pytest.raises(StoreError, match="no answer within 2 s"):
        connect()
    assert time.monotonic() - began < 20


def test_held_lock(workspace, monkeypatch):
    """The error for a lock that is held names the lock."""
    monkeypatch.setattr(store, "LOCKED", 0.2)
    Path(".records").mkdir()
    with FileLock(".records/.store.lock"), pytest.raises(StoreError, match=r"\.store\.lock is locked"):
        connect()


def test_atomic_creation(workspace):
    """A new store appears whole, so a kill cannot leave one that does not open."""
    Path(".mlflow.db.part").write_text("what an earlier kill left")
    started = subprocess.Popen([sys.executable, "-c", MAKE_RUN])
    while not Path("mlflow.db").exists() and started.poll() is None:
        time.sleep(0.001)
    started.kill()
    assert started.wait() == -signal.SIGKILL
    with closing(sqlite3.connect("mlflow.db")) as database:  # MLflow writes its tables' version last
        assert database.execute("SELECT version_num FROM alembic_version").fetchall()


def test_empty_file(workspace, monkeypatch):
    """An empty file becomes a store, however long that takes.

    `sqlite3 mlflow.db .tables` leaves such a file, and so does a full disk.
    """
    Path("mlflow.db").touch()
    monkeypatch.setattr(store, "CONNECT", 2)
    make = mlflow.MlflowClient.search_experiments
    monkeypatch.setattr("mlflow.MlflowClient.search_experiments", lambda self: (time.sleep(3), make(self)))
    assert connect().experiments


def test_moved_project(workspace, monkeypatch, tmp_path):
    """A project that was moved or copied keeps its artifacts."""
    [run_id] = runs.bring_in_line(connect(), Record(training="train_toy_cnn", weights_sha256="ab" * 32))
    copy = tmp_path / "copy of it"
    shutil.copytree(workspace, copy)
    monkeypatch.setenv("FASHION_CNN_ROOT", str(copy))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow sets it
    client = connect().client
    assert client.get_run(run_id).info.artifact_uri == f"{copy.as_uri()}/mlruns/{run_id}/artifacts"
    assert client.get_experiment("0").artifact_location == f"{copy}/mlruns/0"  # kept as a path


def test_relative_sqlite_address(workspace, monkeypatch):
    """A relative address of SQLite is below the root, whatever the root's name."""
    root = workspace / "50%20 # of ?all&"
    root.mkdir()
    monkeypatch.setenv("FASHION_CNN_ROOT", str(root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    connect()
    assert list(workspace.rglob("*.db")) == [root / "runs.db"]


def test_team_env(workspace, monkeypatch):
    """The file team.env names the store unless the environment does."""
    Path("team.env").write_text("# of all of us\nMLFLOW_TRACKING_URI=https://runs.example\nRAY_ADDRESS=\n")
    assert store_url() == "https://runs.example"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    assert shown(store_url()) == f"{workspace}/mine.db"


def test_team_env_secret(workspace):
    """A team.env with a secret is refused, and the error does not show the secret."""
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
def test_damaged_team_env(workspace, content, words):
    """The error for a damaged team.env names the file and the place."""
    Path("team.env").write_bytes(content)
    with pytest.raises(StoreError, match=rf"^team\.env: {words}"):
        store_url()


def test_team_env_without_expansion(workspace, monkeypatch):
    """An address in team.env is read without expanding variables of this machine."""
    monkeypatch.setenv("SECRET", "s3cret")
    Path("team.env").write_text("MLFLOW_TRACKING_URI=https://${SECRET}.example\n")
    assert store_url() == "https://${SECRET}.example"


def test_shown_without_passwords():
    """Addresses are shown without passwords."""
    assert shown("http://me:s%40e@cret@host:5000/a@b") == "http://host:5000/a@b"
    assert shown("postgresql://me:secret@host/runs") == "postgresql://host/runs"
    assert shown("sqlite:////home/a@b/mlflow.db") == "/home/a@b/mlflow.db"


COPY = ".dvc/tmp/exps/abc"


@pytest.mark.parametrize(
    ("project", "here", "root"),
    [(".", f"{COPY}/below", "."), ("inner", "inner", "inner"), ("inner", f"{COPY}/inner", f"{COPY}/inner")],
    ids=["DVC's copy", "project in a project", "DVC's copy of that"],
)
def test_repository_root(tmp_path, monkeypatch, project, here, root):
    """Runs belong to this project and not to an outer one."""
    (tmp_path / project / "fashion_cnn").mkdir(parents=True)
    (tmp_path / here).mkdir(parents=True, exist_ok=True)
    monkeypatch.delenv("FASHION_CNN_ROOT", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path / here)
    assert repository_root() == tmp_path / root
