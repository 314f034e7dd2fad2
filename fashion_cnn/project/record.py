"""A record: a small file of what is known about one training, or what a later stage reports about it.

Stages keep records (stage_records.py), `fashion-cnn sync` makes them from what DVC and git have, and
fashion_cnn/tracking/runs.py brings MLflow's runs in line with them.
"""

import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fashion_cnn.project.repository import repository_root

# Names in a record's folder: the record, the weights, the code's changes, and the folder of the run's files.
RECORD, WEIGHTS, DIFF, FILES = "record.json", "weights.safetensors", "uncommitted.diff", "files"


def now_ms() -> int:
    """The time in milliseconds, as MLflow stores it."""
    return int(time.time() * 1000)


class Record(BaseModel):
    """What is known about one training, or what a later stage reports about it. Times are in ms."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    training: str  # as dvc.yaml names it
    key: str = ""  # digest of all that determines the result; set by the training's stage only
    dvc_lock: str = ""  # digest of its entry in dvc.lock, if it was read from there
    weights_sha256: str = ""
    tags: dict[str, str] = {}  # which code, experiment and machine made the weights
    params: dict[str, Any] = {}
    dataset: dict[str, Any] = {}  # name, digest, source, and sizes of the splits
    rows: list[dict[str, float]] = []  # metrics of epochs, each with its "epoch" and "time"
    metrics: dict[str, float] = {}  # metrics without an epoch
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = "FINISHED"
    begun: int = Field(default_factory=now_ms)
    ended: int = Field(default_factory=now_ms)  # while it is running, the time of its last change
    # Files next to the record. The record does not name them, or it could name any file on this machine.
    files: dict[str, Path] = Field(default={}, exclude=True)  # by their paths in the run
    weights: Path | None = Field(default=None, exclude=True)
    diff: Path | None = Field(default=None, exclude=True)  # how the code differed from its commit


def records_folder() -> Path:
    """Where all stages keep records, including those in DVC's temporary copies; names sort by time."""
    return repository_root() / ".records"


def read_record(path: Path) -> Record:
    """A record and the files next to it. Raises ValueError if it is damaged, or a file is a symbolic link."""
    if links := [file for file in path.parent.rglob("*") if file.is_symlink()]:
        raise ValueError(f"{links[0]} is a link, expected only files")
    record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    weights, diff, files = (path.with_name(name) for name in (WEIGHTS, DIFF, FILES))
    record.weights = weights if weights.exists() else None
    record.diff = diff if diff.exists() else None
    found = sorted(file for file in files.rglob("*") if file.is_file())
    record.files = {file.relative_to(files).as_posix(): file for file in found}
    return record
