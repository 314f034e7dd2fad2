"""What the project writes to MLflow, each a call with a client and a run: values, data, models."""

import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock

from lib.files import read_json, write_json
from lib.lineage import dvc_tags, git_tags, repository_root


def find_run(client, experiment_id: str, training_stage: str, weights_sha256: str) -> str | None:
    """The newest run of `training_stage` that made these weights."""
    found = client.search_runs(
        [experiment_id],
        f"tags.weights_sha256 = '{weights_sha256}' and tags.dvc_stage = '{training_stage}'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return found[0].info.run_id if found else None


def has_run(client, experiment_id: str, run_id: str) -> bool:
    """Whether the store has the run, and it is not deleted."""
    return bool(client.search_runs([experiment_id], f"attributes.run_id = '{run_id}'"))


def stand_in(client, experiment_id: str, training_stage: str, weights_sha256: str) -> str:
    """Make a finished run for weights that the store does not know; it says so."""
    note = (
        "Made to hold results of weights that were not trained into this store: "
        "they came from the DVC cache, or the store is new or was away."
    )
    tags = {"mlflow.note.content": note, "weights_sha256": weights_sha256, "stand_in": "true"}
    run = client.create_run(
        experiment_id, run_name=training_stage, tags={**tags, **git_tags(), **dvc_tags(training_stage)}
    )
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def log_rows(client, run_id: str, rows: list[dict]) -> None:
    """Log rows of metrics, each at its epoch, in calls of at most 1,000, MLflow's limit."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(name, value, now, row["epoch"])
        for row in rows
        for name, value in row.items()
        if name != "epoch"
    ]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics[start : start + 1000])


def log_missing(client, run_id: str, rows: list[dict]) -> int:
    """Log those rows of a training's metrics whose epoch the run lacks; returns how many."""
    logged = {metric.step for metric in client.get_metric_history(run_id, "train_loss")}
    missing = [row for row in rows if row["epoch"] not in logged]
    log_rows(client, run_id, missing)
    return len(missing)


def log_dataset(client, run_id: str, name: str, digest: str, source: str | Path, sizes: dict) -> None:
    """Log which data a run trains on: `digest` of at most 36 characters, and its sizes."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": str(source)})
    dataset = Dataset(name, digest, "local", source, profile=json.dumps(sizes))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "train")])])


def log_weights(client, run_id: str, weights_sha256: str, summary: str) -> None:
    """Tag a run with its weights' digest, by which later stages find it, and log its layers."""
    client.set_tag(run_id, "weights_sha256", weights_sha256)
    client.log_text(run_id, summary, "layers.txt")


def log_model(_client, _run_id: str, model, example: np.ndarray) -> None:
    """Log `model` to the active run, as torch's exported program."""
    import mlflow
    import torch
    from mlflow.models import infer_signature

    model = model.cpu().to(memory_format=torch.contiguous_format).eval()
    with torch.inference_mode():
        outputs = model(torch.from_numpy(example)).numpy()
    mlflow.pytorch.log_model(
        model,
        name="model",
        serialization_format="pt2",
        input_example=example,
        signature=infer_signature(example, outputs),
        # Given, since inferring them takes 5 s; without the "+cpu" of a local build.
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in ("torch", "numpy")],
    )


def unsent_dir() -> Path:
    """Where runs that the store has only in part are written down, one file each."""
    return repository_root() / ".unsent"


def write_unsent(run_id: str, record: dict) -> None:
    """Write down a run that the present store has only in part."""
    write_json(unsent_dir() / f"{run_id}.json", record | {"store": _store()})


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
                log_missing(client, path.stem, record["rows"])
                if record["weights_sha256"]:
                    client.set_tag(path.stem, "weights_sha256", record["weights_sha256"])
                client.set_terminated(path.stem, record["status"])
                sent += 1
            path.unlink()
    return sent


def _store() -> str:
    import mlflow

    return mlflow.get_tracking_uri()
