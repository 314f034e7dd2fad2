"""What a stage reports to MLflow: one JSON line an event, in a folder that a sender follows.

A stage knows nothing of MLflow. It writes what happened to a folder of its own under .outbox/, and starts
fashion_cnn/tracking/sender.py, which alone talks to the store, and deletes the folder once the store has all
of it.
"""

import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

from fashion_cnn.project.catalog import Training
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.provenance import dvc_tags, git_diff, git_tags, machine_tags, repository_root

SENDER = "fashion_cnn.tracking.sender"
WAIT = 30  # seconds that a stage waits for the sender
EVENTS, ALIVE, FILES = "events.jsonl", "stage.lock", "files"


def outboxes() -> Path:
    """The folder of all outboxes, also for DVC's temporary copies; names sort by time."""
    return repository_root() / ".outbox"


class Outbox:
    """The outbox of one stage, and the sender that follows it while the stage works.

    Open it before the work: the sender takes seconds to start. If the stage fails, it need not be closed.
    """

    def __init__(self):
        self.git_tags = git_tags()
        # Taken now: when it is sent, the tree may differ.
        self.diff = git_diff() if self.git_tags.get("git_dirty") == "true" else None
        self.folder = outboxes() / f"{time.time_ns()}-{secrets.token_hex(4)}"
        # Hidden from senders until it is locked: an outbox that nobody holds is one whose stage has ended.
        hidden = self.folder.with_name(f".new-{self.folder.name}")
        (hidden / FILES).mkdir(parents=True)
        self._alive = FileLock(hidden / ALIVE)  # held until the stage ends, however it ends
        self._alive.acquire()
        hidden.rename(self.folder)
        self._events = (self.folder / EVENTS).open("a", encoding="utf-8")
        # In its own session and without DVC_STAGE, so that it outlives the stage and reports how that ended.
        environment = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
        self._sender = subprocess.Popen(
            [sys.executable, "-m", SENDER, self.folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment,
        )  # fmt: skip
        if os.environ.get("REQUIRE_MLFLOW"):
            self._require_store()

    def write(self, event: str, **facts: object) -> None:
        """Append one event."""
        line = json.dumps({"event": event, "time": int(time.time() * 1000), **facts})
        self._events.write(line + "\n")
        self._events.flush()

    def keep(self, path: Path) -> str:
        """Copy a file into the outbox, since it may change before it is sent; returns its name there."""
        number = len(list((self.folder / FILES).iterdir()))
        kept = Path(FILES, str(number), path.name)
        (self.folder / kept).parent.mkdir()
        shutil.copyfile(path, self.folder / kept)
        return str(kept)

    def report(
        self, stage: str, training: Training, weights_sha256: str, metrics: dict, files: list[Path]
    ) -> None:
        """Report metrics and files to the run of the training that made these weights."""
        self.write(
            "report",
            stage=stage,
            training=training.stage,
            weights_sha256=weights_sha256,
            metrics=metrics,
            files=[self.keep(path) for path in files],
            tags=self.git_tags | dvc_tags(training.stage),
            diff=self.diff,
        )

    def close(self) -> None:
        """Wait until the sender is done, for a bounded time, and print its line."""
        self._events.close()
        self._alive.release()
        try:
            said, _ = self._sender.communicate(timeout=WAIT)
        except subprocess.TimeoutExpired:
            said = f"MLflow: not everything was sent within {WAIT} s; `fashion-cnn sync` sends the rest\n"
            self._sender.kill()  # not waited for: it may hang in a file system that does not answer
        print(said.strip() or "MLflow: the sender has failed; `fashion-cnn sync` sends the rest")

    def _require_store(self) -> None:
        """Raise StageError unless the sender says, by an empty first line, that it has reached the store."""
        answer = self._sender.stdout
        assert answer
        if not select.select([answer], [], [], 2 * WAIT)[0]:  # longer than the sender waits for the store
            fault = f"MLflow: the store did not answer within {2 * WAIT} s"
        elif (first := answer.readline()).isspace():
            return
        else:
            fault = first.strip() or "MLflow: the sender has failed"
        self._sender.kill()
        raise StageError(f"{fault}; the stage stops since REQUIRE_MLFLOW is set")


class Run:
    """The run of a training: what it writes into its outbox."""

    def __init__(self, outbox: Outbox):
        self.outbox = outbox

    def log_dataset(self, name: str, digest: str, source: str | Path, sizes: dict[str, int]) -> None:
        """Which data the run trains on: `digest` of at most 36 characters, and its sizes."""
        self.outbox.write("dataset", name=name, digest=digest, source=str(source), sizes=sizes)

    def log_epochs(self, rows: list[dict]) -> None:
        """Metrics of epochs, each with the epoch's number; those that the run has already are left."""
        self.outbox.write("epochs", rows=rows)

    def log_epoch(self, row: dict, images_per_second: float) -> None:
        """The metrics of one epoch."""
        self.log_epochs([{**row, "images_per_second": images_per_second}])

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Final metrics, those without an epoch."""
        self.outbox.write("metrics", metrics=metrics)

    def log_model(self, weights: Path, weights_sha256: str, summary: str, example: np.ndarray) -> None:
        """The model's weights, the summary of its layers, and `example` (2 or more, C, H, W) float32."""
        kept = self.outbox.keep(weights)
        self.outbox.write(
            "model",
            weights=kept,
            weights_sha256=weights_sha256,
            summary=summary,
            example=example.tolist(),
        )


@contextmanager
def open_run(training: Training, params: dict[str, object], key: str) -> Iterator[Run]:
    """The outbox of a training, one run: it ends FINISHED, FAILED, or KILLED when asked to stop.

    `key` is the digest of all that determines its result: the same training again is the same run, be it
    resumed or repeated.
    """
    outbox = Outbox()
    tags = {**outbox.git_tags, **dvc_tags(training.stage), **machine_tags(), "training": key}
    outbox.write("begin", stage=training.stage, tags=tags, params=params, diff=outbox.diff)
    status = "FAILED"
    try:
        yield Run(outbox)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        outbox.write("end", status=status)
        outbox.close()
