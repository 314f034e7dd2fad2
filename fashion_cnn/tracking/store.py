"""The MLflow store: its address, connecting within seconds, and one-line errors if it cannot be used."""

import logging
import os
import re
import sqlite3
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from io import StringIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dotenv.parser import parse_stream
from filelock import FileLock, Timeout
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from fashion_cnn.project.catalog import TOY
from fashion_cnn.project.errors import StoreError
from fashion_cnn.project.files import replace_atomically
from fashion_cnn.project.process import run_stage
from fashion_cnn.project.record import records_folder
from fashion_cnn.project.repository import repository_root
from fashion_cnn.project.time_limit import at_most

# Separate experiments: the toy has different metrics and charts.
CNN_RUNS, TOY_RUNS = "fashion-cnn", "fashion-cnn-toy"
TEAM = Path("team.env")  # a team's addresses; it is in git, so it must not hold a secret
CONNECT = 30  # seconds in which a store must answer
LOCKED = 300  # seconds to wait for another process's lock
TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}  # otherwise the UI guesses GenAI
# Columns with paths of artifacts, which MLflow stores as absolute paths.
ARTIFACT_PATHS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


class Store:
    """A client of the store, and its experiments, each created when it is first needed."""

    def __init__(self, client):
        self.client = client
        self._ids: dict[str, str] = {}

    @property
    def experiments(self) -> list[str]:
        """The ids of the existing experiments; runs are searched in all of them."""
        return [found for name in (CNN_RUNS, TOY_RUNS) if (found := self._find(name))]

    def experiment_of(self, training: str) -> str:
        """The id of the experiment that has a training's runs. Raises StoreError if it is deleted."""
        return self.experiment(TOY_RUNS if training == TOY.stage else CNN_RUNS)

    def experiment(self, name: str) -> str:
        """The id of an experiment, which is created if it is missing. Raises StoreError if it is deleted."""
        from mlflow.exceptions import MlflowException

        if found := self._find(name):
            return found
        url = store_url()
        # MLflow's default is the current folder; a server has its own.
        location = (repository_root() / "mlruns").as_uri() if is_sqlite(url) else None
        try:
            self._ids[name] = self.client.create_experiment(name, location, TRAINING_VIEW)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            if not self._find(name):  # otherwise another process was faster
                deleted = self.client.get_experiment_by_name(name).experiment_id
                raise StoreError(
                    f"MLflow store {shown(url)}: the experiment {name} is deleted; restore it with "
                    f"`mlflow experiments restore --experiment-id {deleted}`"
                ) from None
        return self._ids[name]

    def _find(self, name: str) -> str | None:
        if name not in self._ids:
            found = self.client.get_experiment_by_name(name)
            if found is None or found.lifecycle_stage == "deleted":
                return None
            self._ids[name] = found.experiment_id
        return self._ids[name]


def prepare_mlflow() -> None:
    """Set the environment variables that MLflow reads; call this before anything imports mlflow."""
    # The first two would log to another run or model; the third would register models elsewhere.
    for name in ("MLFLOW_RUN_ID", "MLFLOW_ACTIVE_MODEL_ID", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # MLflow's default retries for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # a pickle from the store could run any code
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def address(name: str) -> str | None:
    """An address from the environment, or from team.env. Raises StoreError if team.env may hold a secret."""
    found = read_team().get(name)
    if found and not is_sqlite(found) and found != shown(found):
        raise StoreError(
            f"{TEAM}: {name} has a user, a password or a query, expected only an address, because the "
            "file is in git; MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return os.environ.get(name) or found


def read_team() -> dict[str, str | None]:
    """The values in team.env as written, without expanding environment variables."""
    try:
        text = TEAM.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise StoreError(f"{TEAM}: byte {error.start} is not UTF-8, expected UTF-8 text") from None
    lines = list(parse_stream(StringIO(text)))
    if wrong := next((line for line in lines if line.error), None):
        raise StoreError(f"{TEAM}: line {wrong.original.line}: expected NAME=value")
    return {line.key: line.value for line in lines if line.key}


def store_url() -> str:
    """MLFLOW_TRACKING_URI, or SQLite in the repository root; a relative SQLite path is below the root.

    The root is used because DVC deletes its temporary copies when their experiment ends.
    """
    named = address("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if not is_sqlite(named):
        return named
    try:
        url = make_url(named)
    except ArgumentError as error:
        raise StoreError(
            f"MLFLOW_TRACKING_URI: {error}; expected sqlite:///file or a server's address"
        ) from None
    path = repository_root() / (url.database or "mlflow.db")
    # Name the driver: for a plain "sqlite:", MLflow creates the folder from the quoted address, which is
    # wrong for % and the like.
    return URL.create("sqlite+pysqlite", database=str(path), query=url.query).render_as_string()


def is_sqlite(url: str) -> bool:
    """Whether a store is an SQLite file."""
    return url.startswith(("sqlite:", "sqlite+"))


def shown(url: str) -> str:
    """A store's address without user and password; for SQLite, the path of the file."""
    if is_sqlite(url):
        return make_url(url).database or url
    return re.sub("^([^/]+://)[^/]*@", r"\1", url).partition("?")[0]  # a query may hold a token


def store_name() -> str:
    """The store's address in records; relative if it is below the root, because it moves with the project."""
    root, name = f"{repository_root()}/", shown(store_url())
    return name.removeprefix(root) if is_sqlite(store_url()) else name


def connect() -> Store:
    """The store, created with the experiment of the CNNs if it is missing.

    Raises StoreError within seconds if the store cannot be reached.
    """
    prepare_mlflow()
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    url = store_url()
    mlflow.set_tracking_uri(url)
    with as_store_error():
        if is_sqlite(url):
            _make(url)  # not timed: on a slow machine it takes longer than CONNECT
        with at_most(CONNECT, TimeoutError(f"no answer within {CONNECT} s")):
            if is_sqlite(url):
                _prepare_sqlite(Path(shown(url)))
            store = Store(mlflow.MlflowClient())
            store.experiment(CNN_RUNS)
            return store


def _make(url: str) -> None:
    """Create the SQLite file if it is missing, or empty, as another program may leave it."""
    import mlflow

    def is_missing() -> bool:
        return path.parent.exists() and not (path.exists() and path.stat().st_size)

    path = Path(shown(url))
    if not is_missing():
        return
    with locked():
        if is_missing():  # otherwise another process was faster
            # MLflow creates its tables in dozens of steps: a kill between two would leave a store that
            # nothing can open.
            with replace_atomically(path) as partial:
                partial.unlink(missing_ok=True)  # what an earlier kill left
                mlflow.MlflowClient(str(make_url(url).set(database=str(partial)))).search_experiments()


@contextmanager
def locked(what: str = "store") -> Iterator[None]:
    """Let one process of a project at a time create the store and its runs, or the model of run `what`."""
    lock = records_folder() / f".{what}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=LOCKED):
            yield
            lock.unlink()
    except Timeout:
        raise StoreError(
            f"MLflow: {lock} is locked by another process; if there is none, delete it"
        ) from None


def _prepare_sqlite(path: Path) -> None:
    """Check that the file is writable; in the project's own, make artifact paths those of this folder."""
    # MLflow tries for two minutes to open a file that SQLite refuses at once.
    with closing(sqlite3.connect(path.as_uri() + "?mode=rw", uri=True, timeout=10)) as database:
        database.execute("BEGIN IMMEDIATE")  # refused if nothing can be written
        if path == repository_root() / "mlflow.db":
            _follow_the_folder(database)
        database.commit()


def _follow_the_folder(database: sqlite3.Connection) -> None:
    """Point the paths of artifacts to this folder: the project may have been moved or copied."""
    here = repository_root() / "mlruns"
    query = "SELECT DISTINCT artifact_location FROM experiments WHERE name IN (?, ?)"
    for (location,) in database.execute(query, [CNN_RUNS, TOY_RUNS]).fetchall():
        there = Path(unquote(urlsplit(location).path))
        if there == here or there.name != "mlruns":  # another name is the user's choice
            continue
        # Some are stored as URLs, and some, such as that of the experiment Default, as paths.
        for old, new in ((there.as_uri(), here.as_uri()), (str(there), str(here))):
            for table, column in ARTIFACT_PATHS.items():
                database.execute(
                    f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                    f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                    {"old": old, "new": new},
                )


@contextmanager
def as_store_error() -> Iterator[None]:
    """Raise StoreError, one line, if the store fails in the block."""
    try:
        yield
    except store_faults() as error:
        raise StoreError(f"MLflow store {shown(store_url())}: {reason(error)}") from None


def store_faults() -> tuple[type[Exception], ...]:
    """What MLflow raises when its store, or the folder of its artifacts, cannot be used."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # ImportError: SQLAlchemy needs the driver of the database that the store's address names.
    return (MlflowException, requests.RequestException, SQLAlchemyError, sqlite3.Error, OSError, ImportError)


def reason(error: Exception) -> str:
    """The fault in one line of at most 300 characters, cut between words."""
    text = " ".join(str(error).split()).replace(store_url(), shown(store_url()))
    return textwrap.shorten(text, 300, placeholder=" …")


def main() -> None:
    """Report why the store cannot be used, if it cannot."""
    connect()


if __name__ == "__main__":
    run_stage(main)
