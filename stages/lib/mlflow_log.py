"""What the project writes to MLflow, each a call with a client and a run: values, data, models."""

import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from lib.lineage import dvc_tags, git_diff, git_tags


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


def has_model(client, run) -> bool:
    """Whether the run has a model with its files: MLflow attaches one before it sends them."""
    ids = [output.model_id for output in run.outputs.model_outputs]
    return any(client.get_logged_model(model_id).status == "READY" for model_id in ids)


def stand_in(
    client, experiment_id: str, training_stage: str, weights_sha256: str, code_is_here: bool = True
) -> str:
    """Make a finished run for weights that the store does not know; it says so.

    Where `code_is_here`, the present tree holds the code that made them, and is named.
    """
    note = (
        "Made to hold results of weights that were not trained into this store: "
        "they came from the DVC cache, or the store is new or was away."
    )
    tags = {"mlflow.note.content": note, "weights_sha256": weights_sha256, "stand_in": "true"}
    tags |= (git_tags() if code_is_here else {}) | dvc_tags(training_stage)
    run_id = client.create_run(experiment_id, run_name=training_stage, tags=tags).info.run_id
    if tags.get("git_dirty") == "true" and (diff := git_diff()) is not None:
        log_diff(client, run_id, diff)
    client.set_terminated(run_id)
    return run_id


def log_params(client, run_id: str, params: dict[str, object]) -> None:
    """Log params under their path in params.yaml."""
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in params.items()])


def log_diff(client, run_id: str, diff: str) -> None:
    """Log what the tree holds beyond its commit, from git_diff."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "uncommitted.diff"
        path.write_bytes(diff.encode("latin-1"))
        client.log_artifact(run_id, path)


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


def log_dataset(client, run_id: str, name: str, digest: str, source: str, sizes: dict) -> None:
    """Log which data a run trains on: `digest` of at most 36 characters, and its sizes."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(name, digest, "local", json.dumps({"uri": source}), profile=json.dumps(sizes))
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


def end_run(_client, _run_id: str, status: str) -> None:
    """End the active run."""
    import mlflow

    mlflow.end_run(status)


# What a training sends to its run while it is the active one.
SEND = {
    "params": log_params,
    "diff": log_diff,
    "metrics": log_missing,
    "dataset": log_dataset,
    "weights": log_weights,
    "model": log_model,
    "end": end_run,
}


def synced_tag(stage: str) -> str:
    """The tag by which `make sync` knows that a run has what the stage wrote."""
    return f"synced_{stage}"
