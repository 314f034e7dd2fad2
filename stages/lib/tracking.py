"""What joins the stages to MLflow: one training is one run, and later stages attach to it."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock
from torch import nn

from lib.errors import StageError
from lib.files import sha256_of
from lib.lineage import dvc_tags, git_tags, machine_tags, repository_root

EXPERIMENT = "fashion-cnn"


class TrainingRun:
    """The MLflow run of a training in progress."""

    def __init__(self, client, run_id: str):
        self.client, self.run_id = client, run_id

    def log_epoch(self, row: dict, images_per_second: float) -> None:
        """Log one epoch in one call; `row` has the epoch's number and metrics."""
        self.log_epochs([{**row, "images_per_second": images_per_second}])

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Log final metrics, those without an epoch."""
        self.log_epochs([{"epoch": 0, **metrics}])

    def log_epochs(self, rows: list[dict]) -> None:
        """Log the metrics of many epochs in calls of at most 1,000, MLflow's limit."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, row["epoch"])
            for row in rows
            for name, value in row.items()
            if name != "epoch"
        ]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics[start : start + 1000])

    def log_dataset(self, name: str, digest: str, source: Path, sizes: dict[str, int]) -> None:
        """Log which data the run trains on: `digest` of at most 36 characters, and its sizes."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest, "local", json.dumps({"uri": str(source)}), profile=json.dumps(sizes))
        self.client.log_inputs(
            self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "train")])]
        )

    def log_model(self, model: nn.Module, weights: Path, summary: str, example: np.ndarray) -> None:
        """Log the trained model without pickle, its layer summary and its weights' SHA-256.

        `example` (2 or more, C, H, W) float32 becomes the input example; a batch of one would be
        exported as a fixed batch size.
        """
        import mlflow
        import torch
        from mlflow.models import infer_signature

        model = model.cpu().to(memory_format=torch.contiguous_format).eval()
        with torch.inference_mode():
            outputs = model(torch.from_numpy(example)).numpy()
        self.client.log_text(self.run_id, summary, "layers.txt")
        mlflow.pytorch.log_model(
            model,
            name="model",
            serialization_format="pt2",
            input_example=example,
            signature=infer_signature(example, outputs),
            # Given, since inferring them takes 5 s; without the "+cpu" of a local build.
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in ("torch", "numpy")],
        )
        self.client.set_tag(self.run_id, "weights_sha256", sha256_of(weights))


@contextmanager
def training_run(stage: str, params: dict[str, object]) -> Iterator[TrainingRun]:
    """Open the run of one training; it ends FINISHED, or FAILED, or KILLED by Ctrl-C."""
    client, experiment_id = connect()
    import mlflow

    tags = {**git_tags(), **dvc_tags(stage), **machine_tags()}
    run = mlflow.start_run(experiment_id=experiment_id, run_name=stage, tags=tags)
    status = "FAILED"
    try:
        mlflow.log_params(params)
        yield TrainingRun(client, run.info.run_id)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        mlflow.end_run(status)


def attach(
    stage: str,
    training_stage: str,
    weights_sha256: str,
    metrics: dict[str, float] | None = None,
    artifacts: list[Path] = (),
) -> None:
    """Add metrics and files to the newest run of the training that made these weights.

    Goes through the client alone, which leaves the run's status and times as they are. Where the
    store has no such run, one is made that says so.
    """
    client, experiment_id = connect()
    from mlflow.entities import Metric

    found = client.search_runs(
        [experiment_id],
        f"tags.weights_sha256 = '{weights_sha256}' and tags.dvc_stage = '{training_stage}'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    run_id = (
        found[0].info.run_id if found else _stand_in(client, experiment_id, training_stage, weights_sha256)
    )
    now = int(time.time() * 1000)
    client.log_batch(run_id, [Metric(name, value, now, 0) for name, value in (metrics or {}).items()])
    for path in artifacts:
        client.log_artifact(run_id, path, artifact_path=stage)


def connect():
    """Return (MlflowClient, experiment id), creating store and experiment where there are none.

    The store is MLFLOW_TRACKING_URI, or SQLite in the repository root. Raises StageError where it
    cannot be reached.
    """
    # A run id in the environment would make every start_run resume that one run.
    os.environ.pop("MLFLOW_RUN_ID", None)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default waits for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    root = repository_root()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    # Without the lock, stages that meet a new store at once crash while they create its tables.
    with FileLock(root / "mlflow.db.lock"):
        try:
            client = mlflow.MlflowClient()
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment:
                return client, experiment.experiment_id
            # Left out, it would be the folder that the process happens to stand in; a server knows its own.
            location = (root / "mlruns").as_uri() if uri.startswith("sqlite:") else None
            return client, client.create_experiment(EXPERIMENT, artifact_location=location)
        except mlflow.MlflowException as error:
            reason = " ".join(error.message.split())[:300]
            raise StageError(f"MLflow store {uri}: {reason}; see MLFLOW_TRACKING_URI") from None


def _stand_in(client, experiment_id: str, training_stage: str, weights_sha256: str) -> str:
    note = (
        "Made to hold results of weights that were not trained into this store: "
        "they came from the DVC cache, or the store is new."
    )
    tags = {"mlflow.note.content": note, "weights_sha256": weights_sha256, "stand_in": "true"}
    run = client.create_run(
        experiment_id, run_name=training_stage, tags={**tags, **git_tags(), **dvc_tags(training_stage)}
    )
    client.set_terminated(run.info.run_id)
    return run.info.run_id
