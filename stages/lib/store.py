"""The MLflow store: where it is, reaching it, and what it says when it cannot be reached."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from lib.errors import StageError
from lib.files import replace_atomically
from lib.lineage import repository_root

EXPERIMENT = "fashion-cnn"
TRAINING_VIEW = {"mlflow.experimentKind": "custom_model_development"}  # else the UI guesses at GenAI


class StoreError(StageError):
    """The MLflow store cannot be reached or used."""


def connect():
    """Return (MlflowClient, experiment id), creating store and experiment where there are none.

    The store is MLFLOW_TRACKING_URI, or SQLite in the repository root. Raises StoreError within
    seconds where it cannot be reached.
    """
    # A run id in the environment would make every start_run resume that one run.
    os.environ.pop("MLFLOW_RUN_ID", None)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the default goes on for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    root = repository_root()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    # Without the lock, stages that meet a new store at once crash while they create its tables.
    with FileLock(root / "mlflow.db.lock"), told_in_one_line():
        _create_whole(uri)
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment:
            return client, experiment.experiment_id
        # Left out, it would be the folder that the process happens to stand in; a server knows its own.
        location = (root / "mlruns").as_uri() if uri.startswith("sqlite:") else None
        return client, client.create_experiment(EXPERIMENT, location, TRAINING_VIEW)


def _create_whole(uri: str) -> None:
    """Create a new store of SQLite under another name, and rename it.

    MLflow makes its tables in dozens of steps: a kill between two would leave a store that nothing opens.
    """
    import mlflow
    from sqlalchemy.engine import make_url

    path = Path(make_url(uri).database or "") if uri.startswith("sqlite:") else Path()
    if path.exists() or not path.parent.exists():
        return
    with replace_atomically(path) as partial:
        partial.unlink(missing_ok=True)  # what an earlier kill left
        mlflow.MlflowClient(str(make_url(uri).set(database=str(partial)))).search_experiments()


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Raise StoreError for a fault of the store in the block."""
    try:
        yield
    except store_faults() as error:
        import mlflow

        uri = mlflow.get_tracking_uri()
        raise StoreError(f"MLflow store {uri}: {reason(error)}; expected a store that answers") from None


def store_faults() -> tuple[type[Exception], ...]:
    """What MLflow raises when its store, or the folder of its artifacts, cannot be used."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # ImportError: SQLAlchemy wants the driver of the database that the store's address names.
    return (MlflowException, requests.RequestException, SQLAlchemyError, OSError, ImportError)


def reason(error: Exception) -> str:
    """The fault in one line."""
    return " ".join(str(error).split())[:200]
