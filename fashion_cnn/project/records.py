"""What a stage tells MLflow: a record of each training that it is about, which always holds all of it.

A stage knows nothing of MLflow. It keeps its records in a folder of its own under .records/, and starts
fashion_cnn/tracking/follower.py, which alone talks to the store, and deletes the folder once the runs in it
are in line with the records.
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
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from fashion_cnn.project.catalog import Training
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import replace_atomically
from fashion_cnn.project.provenance import machine_tags
from fashion_cnn.project.repository import code_state, repository_root

FOLLOWER, STORE = "fashion_cnn.tracking.follower", "fashion_cnn.tracking.store"
WAIT = 30  # seconds that a stage waits for its follower
ALIVE, LOG = "stage.lock", "follower.log"
# What the folder of a record holds beside it: weights, the code's changes, and files as the run has them.
RECORD, WEIGHTS, DIFF, FILES = "record.json", "weights.safetensors", "uncommitted.diff", "files"
LATER = "`fashion-cnn sync` writes the rest"


class Record(BaseModel):
    """What is known of one training; of a later stage, what that says about it. Times are in ms."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    training: str  # as dvc.yaml names it
    key: str = ""  # digest of all that determines the result, if this is the training's own record
    dvc_lock: str = ""  # digest of its entry in dvc.lock, if it was read from there
    weights_sha256: str = ""
    tags: dict[str, str] = {}  # which code, experiment and machine made the weights
    params: dict[str, Any] = {}
    dataset: dict[str, Any] = {}  # name, digest, source, and sizes of the splits
    rows: list[dict[str, float]] = []  # metrics of epochs, each with its "epoch" and "time"
    metrics: dict[str, float] = {}  # those without an epoch
    example: list = []  # input of the model, (2 or more, C, H, W)
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = "FINISHED"
    begun: int
    ended: int = 0
    # Those that are here. Beside the file, not in it, which could name any file of this machine.
    files: dict[str, Path] = Field(default={}, exclude=True)  # by their paths in the run
    weights: Path | None = Field(default=None, exclude=True)
    diff: Path | None = Field(default=None, exclude=True)  # what the code was beyond its commit


def records_folder() -> Path:
    """Where all stages keep records, also those in DVC's temporary copies; names sort by time."""
    return repository_root() / ".records"


def read_record(path: Path) -> Record:
    """A record and the files beside it. Raises ValueError if it is damaged, or a file is a link elsewhere."""
    if links := [file for file in path.parent.rglob("*") if file.is_symlink()]:
        raise ValueError(f"{links[0]} is a link, expected files alone")
    record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    weights, diff, files = (path.with_name(name) for name in (WEIGHTS, DIFF, FILES))
    record.weights = weights if weights.exists() else None
    record.diff = diff if diff.exists() else None
    found = sorted(file for file in files.rglob("*") if file.is_file())
    record.files = {file.relative_to(files).as_posix(): file for file in found}
    return record


class StageRecords:
    """The records of one stage, and the process that follows them while the stage works.

    Open it before the work: the follower takes seconds to start. If the stage fails, it need not be closed.
    A fault of the disk costs a record, not the stage.
    """

    def __init__(self):
        if os.environ.get("REQUIRE_MLFLOW") and subprocess.run([sys.executable, "-m", STORE]).returncode:
            raise StageError("MLflow: no store, and REQUIRE_MLFLOW is set, so the stage stops")
        self.tags, self.diff = code_state()  # now: when the stage ends, the tree may differ
        self.folder = records_folder() / f"{time.time_ns()}-{secrets.token_hex(4)}"
        self.faults: dict[str, str] = {}  # by the file that could not be written
        self._follower = None
        # Hidden from other followers until it is locked: records that nobody holds are of an ended stage.
        hidden = self.folder.with_name(f".new-{self.folder.name}")
        try:
            hidden.mkdir(parents=True)
            self._alive = FileLock(hidden / ALIVE)  # held until the stage ends, however it ends
            self._alive.acquire()
            hidden.rename(self.folder)
            self._follower = self._follow()
        except OSError as error:
            self._note("", error)

    def save(self, record: Record) -> None:
        """Replace the record's file, whole or not at all."""
        self.keep(record, RECORD, f"{record.model_dump_json()}\n".encode())

    def keep(self, record: Record, name: str, content: Path | bytes) -> None:
        """Put a file into the record's folder, as it is now."""
        if not self._follower:
            return
        self.faults.pop(name, None)
        try:
            with replace_atomically(self.folder / record.training / name) as partial:
                if isinstance(content, bytes):
                    partial.write_bytes(content)
                else:
                    shutil.copyfile(content, partial)
        except OSError as error:
            self._note(name, error)

    def report(
        self, stage: str, training: Training, weights_sha256: str, metrics: dict, files: list[Path]
    ) -> None:
        """Record what a later stage says about the training that made these weights."""
        now = now_ms()
        # An experiment may report on weights that its commit has; `fashion-cnn sync` finds out.
        tags = {} if os.environ.get("DVC_EXP_NAME") else self.tags
        record = Record(
            training=training.stage,
            weights_sha256=weights_sha256,
            tags=tags,
            metrics=metrics,
            begun=now,
            ended=now,
        )
        if tags and self.diff:
            self.keep(record, DIFF, self.diff)
        for path in files:
            self.keep(record, f"{FILES}/{stage}/{path.name}", path)
        self.save(record)

    def close(self) -> None:
        """Wait until the follower is done, for a bounded time, and print its line."""
        said = ""
        if self._follower:
            self._alive.release()
            try:
                said, _ = self._follower.communicate(timeout=WAIT)
            except subprocess.TimeoutExpired:  # not killed: it may be making a store, or wait for its answer
                said = f"MLflow: not everything was written within {WAIT} s; that goes on; {LATER}"
        failed = f"MLflow: the follower has failed, see {self.folder / LOG}; {LATER}"
        print(next(iter(self.faults.values()), said.strip()) or failed)

    def _note(self, name: str, error: OSError) -> None:
        what = f"{error.filename or self.folder}: {error.strerror or error}"
        self.faults[name] = f"MLflow: {what}, so not all is recorded; {LATER}"

    def _follow(self) -> subprocess.Popen[str]:
        # In its own session and without DVC_STAGE, so that it outlives the stage and reports how that ended.
        # Its errors go to a file, or who reads this stage's would wait for it. The copy that it was started
        # in may be deleted meanwhile, so it is told the root.
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
        """Which data the run trains on: `digest` of at most 36 characters, and its sizes."""
        self.record.dataset = {"name": name, "digest": digest, "source": str(source), "sizes": sizes}
        self.records.save(self.record)

    def log_epochs(self, rows: list[dict]) -> None:
        """Metrics of epochs, each with the epoch's number; those that the run has already are left."""
        now = now_ms()
        self.record.rows += [{**row, "time": now} for row in rows]
        self.records.save(self.record)

    def log_epoch(self, row: dict, images_per_second: float) -> None:
        """The metrics of one epoch."""
        self.log_epochs([{**row, "images_per_second": images_per_second}])

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Final metrics, those without an epoch."""
        self.record.metrics |= metrics
        self.records.save(self.record)

    def log_model(self, weights: Path, weights_sha256: str, summary: str, example: np.ndarray) -> None:
        """The model's weights, the summary of its layers, and `example` (2 or more, C, H, W) float32."""
        self.records.keep(self.record, WEIGHTS, weights)
        self.records.keep(self.record, f"{FILES}/layers.txt", summary.encode())
        self.record.weights_sha256, self.record.example = weights_sha256, example.tolist()
        self.records.save(self.record)


@contextmanager
def open_run(training: Training, params: dict[str, object], key: str) -> Iterator[Run]:
    """The record of a training, one run: it ends FINISHED, FAILED, or KILLED when asked to stop.

    `key` is the digest of all that determines its result: the same training again is the same run, be it
    resumed or repeated.
    """
    records = StageRecords()
    tags = {**records.tags, **experiment_tag(), **machine_tags()}
    record = Record(
        training=training.stage, key=key, tags=tags, params=params, status="RUNNING", begun=now_ms()
    )
    if records.diff:
        records.keep(record, DIFF, records.diff)
    records.save(record)
    try:
        yield Run(records, record)
        record.status = "FINISHED"
    except BaseException as error:
        record.status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        raise
    finally:
        record.ended = now_ms()
        records.save(record)
        records.close()


def experiment_tag() -> dict[str, str]:
    """The name of the experiment, when DVC runs one."""
    name = os.environ.get("DVC_EXP_NAME")
    return {"dvc_exp_name": name} if name else {}


def now_ms() -> int:
    """Milliseconds, as MLflow counts them."""
    return int(time.time() * 1000)
