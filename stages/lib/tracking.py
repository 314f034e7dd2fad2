"""What joins the stages to MLflow: one training is one run, and later stages report to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lib import mlflow_log
from lib.files import sha256_of
from lib.lineage import dvc_tags, git_diff, git_tags, machine_tags, process_tag
from lib.store import StoreError, connect, reason, store_faults, told_in_one_line
from lib.unsent import send_unsent, write_unsent

AWAY = "the stage goes on without it, and the next command sends what was missed"


class TrainingRun:
    """The MLflow run of a training; where the store goes away, the training goes on.

    `client` is None when the store was away from the start. What could not be sent is sent with the
    next epoch, or written down at the end for the next command.
    """

    def __init__(self, client, run_id: str | None):
        self.client, self.run_id = client, run_id
        self.missed: dict[str, list] = {}  # what was not sent: the arguments of its call

    def log_start(self, params: dict[str, object], dirty: bool) -> None:
        """Log the params, and the diff of a dirty tree."""
        self._send("params", params)
        if dirty and (diff := git_diff()) is not None:  # taken now: when it is sent, the tree may differ
            self._send("diff", diff)

    def log_epoch(self, row: dict, images_per_second: float) -> None:
        """Log one epoch, in one call; `row` has the epoch's number and metrics."""
        self.log_epochs([{**row, "images_per_second": images_per_second}])

    def log_epochs(self, rows: list[dict]) -> None:
        """Log the metrics of those epochs that the run lacks, and of those that could not be sent."""
        [missed] = self.missed.get("metrics", [[]])
        self._send("metrics", [*missed, *rows])

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Log final metrics, those without an epoch."""
        self.log_epochs([{"epoch": 0, **metrics}])

    def log_dataset(self, name: str, digest: str, source: str | Path, sizes: dict[str, int]) -> None:
        """Log which data the run trains on: `digest` of at most 36 characters, and its sizes."""
        self._send("dataset", name, digest, str(source), sizes)

    def log_model(self, model, weights: Path, summary: str, example: np.ndarray) -> None:
        """Log the trained model without pickle, its layer summary and its weights' SHA-256.

        `example` (2 or more, C, H, W) float32 becomes the input example; a batch of one would be
        exported as a fixed batch size.
        """
        self._send("weights", sha256_of(weights), summary)
        self._send("model", model, example)

    def end(self, status: str) -> None:
        """End the run as "FINISHED", "FAILED" or "KILLED"; write down what it lacks."""
        if "metrics" in self.missed:
            self.log_epochs([])
        self._send("end", status)
        if self.missed:
            write_unsent(self.run_id, self.missed)

    def _send(self, what: str, *arguments) -> None:
        if self.client is None:
            return
        try:
            mlflow_log.SEND[what](self.client, self.run_id, *arguments)
            self.missed.pop(what, None)
        except store_faults() as error:
            print(f"MLflow: {what} not sent: {reason(error)}; {AWAY}")
            self.missed[what] = list(arguments)


@contextmanager
def training_run(
    stage: str, params: dict[str, object], if_unreachable: str = "stop", resume: str | None = None
) -> Iterator[TrainingRun]:
    """Open the run of one training; it ends FINISHED, or FAILED, or KILLED when asked to stop.

    `resume` is the run of a training that was stopped; where the store has it, it goes on. A store
    that is away at the start raises StoreError, or is done without if `if_unreachable` is "continue".
    """
    run, tags = TrainingRun(None, None), {**git_tags(), **dvc_tags(stage), **machine_tags(), **process_tag()}
    status = "FAILED"
    try:
        if require_store(if_unreachable):
            run = _start(stage, tags, resume)
        run.log_start(params, tags.get("git_dirty") == "true")
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.end(status)


def _start(stage: str, tags: dict[str, str], resume: str | None) -> TrainingRun:
    import mlflow

    with told_in_one_line():
        client, experiment_id = connect()
        if resume and not mlflow_log.has_run(client, experiment_id, resume):
            resume = None
        run = mlflow.start_run(resume, experiment_id, run_name=stage, tags=tags)
    return TrainingRun(client, run.info.run_id)


def require_store(if_unreachable: str) -> bool:
    """Whether the store answers; send it what it missed. Stages that report ask before they work.

    Where it is away, raises StoreError, or says so if `if_unreachable` is "continue".
    """
    try:
        with told_in_one_line():
            send_unsent(*connect())
    except StoreError as error:
        if if_unreachable == "stop":
            raise
        print(f"{error}; {AWAY}")
        return False
    return True


def attach(
    stage: str,
    training_stage: str,
    weights_sha256: str,
    metrics: dict[str, float] | None = None,
    artifacts: list[Path] = (),
) -> None:
    """Report metrics and files to the newest run of the training that made these weights.

    Where the store has no such run, one is made that says so. The outputs are written by now, so a
    store that is away costs no more than a line.
    """
    try:
        with told_in_one_line():
            report(stage, training_stage, weights_sha256, metrics or {}, artifacts)
    except StoreError as error:
        print(f"{error}; `make sync` sends the results later")


def report(stage: str, training_stage: str, weights_sha256: str, metrics: dict, artifacts: list) -> None:
    """What `attach` does, with the store's own errors.

    Goes through the client alone, which leaves the run's status and times as they are; a value that
    the run has already is left.
    """
    client, experiment_id = connect()
    run_id = mlflow_log.find_run(client, experiment_id, training_stage, weights_sha256)
    run_id = run_id or mlflow_log.stand_in(client, experiment_id, training_stage, weights_sha256)
    has = client.get_run(run_id).data
    if mlflow_log.synced_tag(stage) in has.tags:  # it will no longer be so
        client.delete_tag(run_id, mlflow_log.synced_tag(stage))
    new = {name: value for name, value in metrics.items() if has.metrics.get(name) != value}
    mlflow_log.log_rows(client, run_id, [{"epoch": 0, **new}])
    for path in artifacts:
        client.log_artifact(run_id, path, artifact_path=stage)
