"""Recording a stage for MLflow: one record per training, rewritten atomically at each change.

The stage keeps them in a folder under .records/ and starts the follower, the only process that talks to the
store. The follower deletes the folder once the runs are in line with the records.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from fashion_cnn.project.catalog import Training
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import replace_atomically
from fashion_cnn.project.provenance import machine_tags
from fashion_cnn.project.record import DIFF, FILES, RECORD, WEIGHTS, Record, now_ms, records_folder
from fashion_cnn.project.repository import code_state, repository_root

FOLLOWER = "fashion_cnn.tracking.follower"
WAIT, STOPPED = 30, 5  # seconds that a stage waits for its follower; STOPPED if it was stopped
ALIVE, LOG = "stage.lock", "follower.log"
LATER = "`fashion-cnn sync` writes the rest"


class StageRecords:
    """The records of one stage, and the process that follows them while the stage works.

    Create it before the work, because the follower takes seconds to start. A disk error loses a record, but
    does not stop the stage.
    """

    def __init__(self):
        reach = [sys.executable, "-m", "fashion_cnn.tracking.store"]
        if os.environ.get("REQUIRE_MLFLOW") and subprocess.run(reach, check=False).returncode:
            raise StageError("MLflow: no store, and REQUIRE_MLFLOW is set, so the stage stops")
        self.folder = records_folder() / f"{time.time_ns()}-{secrets.token_hex(4)}"
        self.faults: dict[Path, str] = {}  # by the file that could not be written
        self._follower = None
        # Other followers do not see it until it is locked: unlocked records belong to a stage that has ended.
        hidden = self.folder.with_name(f".new-{self.folder.name}")
        try:
            hidden.mkdir(parents=True)
            self._alive = FileLock(hidden / ALIVE)  # held until the stage ends, however it ends
            self._alive.acquire()
            hidden.rename(self.folder)
            self._follower = self._follow()
        except OSError as error:
            self._note(self.folder, error)

    def save(self, record: Record) -> None:
        """Replace the record's file atomically."""
        record.ended = now_ms()
        self.keep(record, RECORD, f"{record.model_dump_json()}\n".encode())

    def keep(self, record: Record, name: str, content: Path | bytes) -> None:
        """Write the current content of a file, or bytes, into the record's folder."""
        if not self._follower:
            return
        path = self.folder / record.training / name
        self.faults.pop(path, None)
        try:
            with replace_atomically(path) as partial:
                if isinstance(content, bytes):
                    partial.write_bytes(content)
                else:
                    shutil.copyfile(content, partial)
        except OSError as error:
            self._note(path, error)

    def report(
        self, stage: str, training: Training, weights_sha256: str, metrics: dict, files: list[Path]
    ) -> None:
        """Record what a later stage says about the training that made these weights."""
        record = Record(training=training.stage, weights_sha256=weights_sha256, metrics=metrics)
        for path in files:
            self.keep(record, f"{FILES}/{stage}/{path.name}", path)
        self.save(record)

    def close(self, is_stopped: bool = False) -> None:
        """Wait until the follower is done, for a bounded time, and print its line."""
        said, wait = "", STOPPED if is_stopped else WAIT
        if self._follower:
            self._alive.release()
            try:
                said, _ = self._follower.communicate(timeout=wait)
            except subprocess.TimeoutExpired:  # not killed: it may be creating a store, or waiting for one
                said = f"MLflow: not everything was written within {wait} s; the follower continues; {LATER}"
        told = next(iter(self.faults.values()), said.strip())
        print(told or f"MLflow: the follower has failed, see {self.folder / LOG}; {LATER}")

    def _note(self, path: Path, error: OSError) -> None:
        what = f"MLflow: {error.filename or path}: {error.strerror or error}"
        self.faults[path] = f"{what}, so the record is incomplete; {LATER}"

    def _follow(self) -> subprocess.Popen[str]:
        # The follower outlives the stage, and perhaps the copy of the project in which the stage runs. So it
        # gets its own session, its own file for errors, and the project's root.
        environment = os.environ | {"FASHION_CNN_ROOT": str(repository_root())}
        environment.pop("DVC_STAGE", None)
        with (self.folder / LOG).open("w") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", FOLLOWER, self.folder], start_new_session=True, env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8",
                errors="replace",
            )  # fmt: skip


class Run:
    """The run of a training, as its stage sees it."""

    def __init__(self, records: StageRecords, record: Record):
        self.records, self.record = records, record

    def log_dataset(self, name: str, digest: str, source: str | Path, sizes: dict[str, int]) -> None:
        """Record the data that the run trains on, with its sizes; `digest` has at most 36 characters."""
        self.record.dataset = {"name": name, "digest": digest, "source": str(source), "sizes": sizes}
        self.records.save(self.record)

    def log_epochs(self, rows: list[dict]) -> None:
        """Record rows of metrics, each with the number of its epoch."""
        self.record.rows += [{**row, "time": now_ms()} for row in rows]
        self.records.save(self.record)

    def log_epoch(self, row: dict, images_per_second: float) -> None:
        """Record the metrics of one epoch."""
        self.log_epochs([{**row, "images_per_second": images_per_second}])

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Record the final metrics, which have no epoch."""
        self.record.metrics |= metrics
        self.records.save(self.record)

    def log_model(self, weights: Path, weights_sha256: str, summary: str) -> None:
        """Record the weights and the summary of the layers."""
        self.records.keep(self.record, WEIGHTS, weights)
        self.records.keep(self.record, f"{FILES}/layers.txt", summary.encode())
        self.record.weights_sha256 = weights_sha256
        self.records.save(self.record)


@contextmanager
def open_run(training: Training, params: dict[str, object], key: str) -> Iterator[Run]:
    """Record a training as one run, which ends FINISHED, FAILED, or KILLED if it was asked to stop.

    `key` is the digest of all that determines its result, so a resumed or repeated training reuses its run.
    """
    records = StageRecords()
    record = Record(training=training.stage, key=key, params=params, status="RUNNING")
    tags, diff = code_state()  # taken now, because the tree may change during the training
    record.tags = tags | machine_tags()
    if name := os.environ.get("DVC_EXP_NAME"):
        record.tags["dvc_exp_name"] = name
    if diff:
        records.keep(record, DIFF, diff)
    records.save(record)
    try:
        yield Run(records, record)
        record.status = "FINISHED"
    except BaseException as fault:
        record.status = "KILLED" if isinstance(fault, KeyboardInterrupt) else "FAILED"
        raise
    finally:
        records.save(record)
        records.close(is_stopped=record.status == "KILLED")
