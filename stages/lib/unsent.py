"""What a training could not send to the MLflow store, kept until the next command."""

import json
from pathlib import Path

from filelock import FileLock

from lib.files import read_json, write_text
from lib.lineage import repository_root
from lib.mlflow_log import SEND, has_run

# As a training sends it, but from another process, where the run is not the active one.
RESEND = {**SEND, "end": lambda client, run_id, status: client.set_terminated(run_id, status)}


def unsent_dir() -> Path:
    """Where runs that the store has only in part are written down, one file each."""
    return repository_root() / ".unsent"


def write_unsent(run_id: str, missed: dict[str, list]) -> None:
    """Write down what a run in the present store lacks, but for its model, which `make sync` logs."""
    missed = {what: arguments for what, arguments in missed.items() if what != "model"}
    record = json.dumps({"store": _store(), "missed": missed}, indent=2)  # unrounded: params are in it
    write_text(unsent_dir() / f"{run_id}.json", record + "\n")


def send_unsent(client, experiment_id: str) -> int:
    """Complete the runs that are written down for the present store; returns how many.

    A run that the store has lost is given up: `make sync` makes another, from dvc.lock.
    """
    if not any(unsent_dir().glob("*.json")):
        return 0
    sent = 0
    with FileLock(unsent_dir() / "lock"):  # stages that run at once would send them twice
        for path in sorted(unsent_dir().glob("*.json")):
            record = read_json(path)
            if record["store"] != _store():
                continue
            if has_run(client, experiment_id, path.stem):
                for what, arguments in record["missed"].items():
                    RESEND[what](client, path.stem, *arguments)
                sent += 1
            path.unlink()
    return sent


def _store() -> str:
    import mlflow

    return mlflow.get_tracking_uri()
