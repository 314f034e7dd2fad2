"""What joins the stages to MLflow: one training is one run, and later stages attach to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lib import mlflow_log
from lib.files import sha256_of
from lib.lineage import dvc_tags, git_diff, git_tags, machine_tags, process_tag
from lib.store import StoreError, connect, reason, store_faults, told_in_one_line

AWAY = "training goes on without it, and `make sync` sends later what it missed"


class TrainingRun:
    """The MLflow run of a training; where the store goes away, the training goes on.

    `client` is None when the store was away from the start. What could not be sent is sent with the
    next epoch; what is left at the end is written down for `make sync`.
    """

    def __init__(self, client, run_id: str | None, rows: list[dict] = ()):
        self.client, self.run_id = client, run_id
        self.rows, self.sent, self.missed = list(rows), 0, False
        self.weights_sha256 = None

    def log_epoch(self, row: dict, images_per_second: float) -> None:
        """Log one epoch, in one call; `row` has the epoch's number and metrics."""
        self.log_epochs([{**row, "images_per_second": images_per_second}])

    def log_epochs(self, rows: list[dict]) -> None:
        """Log the metrics of epochs, and of those before that could not be sent."""
        self.rows += rows
        if self._send("metrics", mlflow_log.log_rows, self.run_id, self.rows[self.sent :]):
            self.sent = len(self.rows)

    def catch_up(self, rows: list[dict]) -> None:
        """Log those of a resumed training's epochs that its run lacks."""
        self.rows += rows
        if self._send("metrics", mlflow_log.log_missing, self.run_id, rows):
            self.sent = len(self.rows)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Log final metrics, those without an epoch."""
        self.log_epochs([{"epoch": 0, **metrics}])

    def log_dataset(self, name: str, digest: str, source: str | Path, sizes: dict[str, int]) -> None:
        """Log which data the run trains on: `digest` of at most 36 characters, and its sizes."""
        self._send("dataset", mlflow_log.log_dataset, self.run_id, name, digest, source, sizes)

    def log_model(self, model, weights: Path, summary: str, example: np.ndarray) -> None:
        """Log the trained model without pickle, its layer summary and its weights' SHA-256.

        `example` (2 or more, C, H, W) float32 becomes the input example; a batch of one would be
        exported as a fixed batch size.
        """
        self.weights_sha256 = sha256_of(weights)
        if self._send("weights", mlflow_log.log_weights, self.run_id, self.weights_sha256, summary):
            self._send("model", mlflow_log.log_model, self.run_id, model, example)

    def _send(self, what: str, call, *arguments) -> bool:
        if self.client is None:
            return False
        try:
            call(self.client, *arguments)
        except store_faults() as error:
            print(f"MLflow: {what} not sent: {reason(error)}; {AWAY}")
            self.missed = True
            return False
        return True


@contextmanager
def training_run(
    stage: str, params: dict[str, object], if_unreachable: str = "stop", resume: str | None = None
) -> Iterator[TrainingRun]:
    """Open the run of one training; it ends FINISHED, or FAILED, or KILLED when asked to stop.

    `resume` is the run of a training that was stopped; where the store has it, it goes on. A store
    that is away at the start raises StoreError, or is done without if `if_unreachable` is "continue".
    """
    try:
        run = _open_run(stage, params, resume)
    except StoreError as error:
        if if_unreachable == "stop":
            raise
        print(f"{error}; {AWAY}")
        yield TrainingRun(None, None)
        return
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _end(run, status)


def _open_run(stage: str, params: dict[str, object], resume: str | None) -> TrainingRun:
    with told_in_one_line():
        client, experiment_id = connect()
        mlflow_log.send_unsent(client, experiment_id)
        import mlflow

        if resume and not mlflow_log.has_run(client, experiment_id, resume):
            resume = None
        tags = {**git_tags(), **dvc_tags(stage), **machine_tags(), **process_tag()}
        run_id = mlflow.start_run(resume, experiment_id, run_name=stage, tags=tags).info.run_id
        mlflow.log_params(params)
        if tags.get("git_dirty") == "true":
            client.log_text(run_id, git_diff(), "uncommitted.diff")
    return TrainingRun(client, run_id)


def attach(
    stage: str,
    training_stage: str,
    weights_sha256: str,
    metrics: dict[str, float] | None = None,
    artifacts: list[Path] = (),
    if_unreachable: str = "stop",
) -> None:
    """Add metrics and files to the newest run of the training that made these weights.

    Goes through the client alone, which leaves the run's status and times as they are; a value that
    the run has already is left. Where the store has no such run, one is made that says so. A store
    that is away raises StoreError, or is told if `if_unreachable` is "continue".
    """
    try:
        with told_in_one_line():
            _attach(stage, training_stage, weights_sha256, metrics or {}, artifacts)
    except StoreError as error:
        if if_unreachable == "stop":
            raise
        print(f"{error}; `make sync` sends the results later")


def _attach(stage, training_stage, weights_sha256, metrics, artifacts) -> None:
    client, experiment_id = connect()
    mlflow_log.send_unsent(client, experiment_id)
    run_id = mlflow_log.find_run(client, experiment_id, training_stage, weights_sha256)
    run_id = run_id or mlflow_log.stand_in(client, experiment_id, training_stage, weights_sha256)
    has = client.get_run(run_id).data.metrics
    new = {name: value for name, value in metrics.items() if has.get(name) != value}
    mlflow_log.log_rows(client, run_id, [{"epoch": 0, **new}])
    for path in artifacts:
        client.log_artifact(run_id, path, artifact_path=stage)


def _end(run: TrainingRun, status: str) -> None:
    import mlflow

    run.log_epochs([])
    try:
        mlflow.end_run(status)
    except store_faults():
        run.missed = True
    if run.missed:
        record = {"status": status, "weights_sha256": run.weights_sha256, "rows": run.rows}
        mlflow_log.write_unsent(run.run_id, record)
