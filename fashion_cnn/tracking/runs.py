"""The runs of MLflow, and the one function that brings them in line with a record."""

import hashlib
import json
import math
import os
import sys
import textwrap
from collections import defaultdict
from getpass import getuser
from pathlib import Path, PurePosixPath

import numpy as np

from fashion_cnn.project.catalog import TRAININGS
from fashion_cnn.project.files import sha256_of
from fashion_cnn.project.params import as_yaml, params_in
from fashion_cnn.project.record import Record
from fashion_cnn.project.repository import GitError, git
from fashion_cnn.schema import N_TRAIN
from fashion_cnn.tracking.models import log_model, log_model_metrics
from fashion_cnn.tracking.store import Store, locked

NEWEST = ["attributes.start_time DESC"]
LIMIT = sys.float_info.max  # MLflow stores infinity as this
IMAGES = "train_images"  # a param of runs that is not in params.yaml
DVC_LOCK = "dvc_lock"  # a tag: the digest of the training's entry in dvc.lock
LOCK_FILE = "dvc.lock.json"  # this entry, and those of the later stages that read the training's outputs
# Colours of runs in MLflow's charts and tables, because MLflow may give two of a few runs the same colour.
# The palette is Okabe and Ito's, beginning with the two colours of the figures.
COLOR = "mlflow.runColor"
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"]
NOTE_TAG = "mlflow.note.content"  # what MLflow shows as a run's description
NOTE = (
    "`fashion-cnn trace {}`, in the project, prints what this run was made from and the "
    "commands that restore it. Figures and tables are artifacts, under the stage that made them."
)
STAND_IN = (
    "Made to hold results of weights whose training was not recorded in this store: "
    "they came from the DVC cache, or the store is new or was unreachable."
)


def bring_in_line(store: Store, record: Record, only_missing: bool = False) -> dict[str, list[str]]:
    """Write what the runs of a record lack; returns what was added, by the runs' ids.

    It is idempotent, and may be interrupted anywhere. A training's record goes to one run, a later stage's to
    all runs of its weights; if there is none, one is created. With `only_missing`, nothing that a run already
    has is replaced.
    """
    with locked():  # otherwise two processes would each make a run
        found, made = runs_of(store, record), []
        if not found:
            found, made = [create_run(store, record)], ["made"]
    return {run.info.run_id: made + _complete(store, run, record, only_missing) for run in found}


def runs_of(store: Store, record: Record) -> list:
    """The existing runs that a record is about."""
    if record.key:
        return find_runs(store, training=record.key)[:1]
    found = find_runs(store, dvc_stage=record.training, weights_sha256=record.weights_sha256)
    if not record.dvc_lock:
        return found
    mine = [run for run in found if run.data.tags.get(DVC_LOCK, record.dvc_lock) == record.dvc_lock]
    if name := record.tags.get("dvc_exp_name"):
        mine = of_experiment(mine, name, record.tags.get("git_commit"))
    return (mine or found)[:1]  # or the newest run of these weights, even if another training made it


def of_experiment(found: list, name: str, baseline: str | None) -> list:
    """The runs of an experiment, first the one of its commit, then those that may become its runs."""
    own = [run for run in found if run.data.tags.get("dvc_exp_name") == name]
    own.sort(key=lambda run: run.data.tags.get("git_commit") != baseline)
    return own + [run for run in found if lacks_origin(run)]


def lacks_origin(run) -> bool:
    """Whether a run is a stand-in that does not say which code made its weights."""
    return "stand_in" in run.data.tags and not {"git_commit", "dvc_exp_name"} & run.data.tags.keys()


def find_runs(store: Store, **tags: str) -> list:
    """The runs with these tags, newest first; several trainings may give the same weights."""
    query = " and ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
    found, token = [], None
    while True:
        page = store.client.search_runs(store.experiments, query, order_by=NEWEST, page_token=token)
        found += page
        if not (token := page.token):
            return found


def find_run(store: Store, run_id: str):
    """The run with this id; None if there is none, or it is deleted."""
    found = store.client.search_runs(store.experiments, f"attributes.run_id = '{run_id}'")
    return found[0] if found else None


def create_run(store: Store, record: Record):
    """Create a record's run in the experiment of its training, in a different colour than the last run."""
    experiment_id = store.experiment_of(record.training)
    last = store.client.search_runs([experiment_id], max_results=1, order_by=NEWEST)
    color = last[0].data.tags.get(COLOR, COLORS[-1]) if last else COLORS[-1]
    place = COLORS.index(color) if color in COLORS else -1  # a user may have chosen another
    tags = {
        "dvc_stage": record.training,
        COLOR: COLORS[(place + 1) % len(COLORS)],
        "mlflow.source.name": f"stages/{TRAININGS[record.training].section}.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }
    if record.key:
        tags["training"] = record.key
    else:
        tags |= {"stand_in": "true", "weights_sha256": record.weights_sha256, NOTE_TAG: STAND_IN}
    return store.client.create_run(experiment_id, record.begun, tags, run_name=run_name(record))


def _user() -> str:
    try:
        return getuser()
    except (KeyError, OSError):  # as in a container whose user has no name
        return str(os.getuid())


def run_name(record: Record) -> str:
    """The stage, and what distinguishes the run: its experiment, or the params that were not committed."""
    stage, tags = record.training, record.tags
    if "dvc_exp_name" in tags:
        return f"{stage} {tags['dvc_exp_name']}"
    try:
        committed = params_in(git("show", f"{tags['git_commit']}:./params.yaml"))
    except (KeyError, GitError):  # not in git, or no params in the commit
        return stage
    own = f"{TRAININGS[stage].section}."
    changed = [
        f"{name.removeprefix(own)}={as_yaml(value)}"
        for name, value in record.params.items()
        if committed.get(name) != value
    ]
    return textwrap.shorten(" ".join([stage, *changed]), 100, placeholder=" …")


def _complete(store: Store, run, record: Record, only_missing: bool) -> list[str]:
    """Write what a run lacks of a record; the status comes last, so that a finished run is complete."""
    client, run_id, tags = store.client, run.info.run_id, run.data.tags
    is_finished = run.info.status == "FINISHED" and "weights_sha256" in tags
    is_own = bool(record.key) and not is_finished
    if is_own and run.info.status != record.status == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    if NOTE_TAG not in tags:  # a stand-in has one already
        client.set_tag(run_id, NOTE_TAG, NOTE.format(run_id))
    if record.key and record.weights_sha256 and tags.get("weights_sha256") != record.weights_sha256:
        client.set_tag(run_id, "weights_sha256", record.weights_sha256)  # early: later stages look for it
    is_other = DVC_LOCK in tags and tags[DVC_LOCK] != record.dvc_lock  # other code made the same weights
    files = {name: path for name, path in record.files.items() if not (name == LOCK_FILE and is_other)}
    sent = {
        "commit": _log_origin(client, run, record) if is_own or lacks_origin(run) else False,
        "params": _log_params(client, run, record.params),
        "data": _log_dataset(client, run, record),
        "curve": _log_epochs(client, run_id, record),
        "metrics": _log_metrics(client, run, record, only_missing),
        "model": log_model(client, run, record),
    }
    added = [name for name, was_sent in sent.items() if was_sent]
    added += _log_files(client, run, files, only_missing)
    if record.dvc_lock and not is_other and DVC_LOCK not in tags:
        client.set_tag(run_id, DVC_LOCK, record.dvc_lock)
    if record.status != "RUNNING":
        log_model_metrics(client, run_id)
    is_left = "stand_in" in tags and run.info.status == "RUNNING"  # just created, or left by a kill
    if is_left or (is_own and run.info.status != record.status != "RUNNING"):
        client.set_terminated(run_id, record.status, record.ended)
    return added


def _log_origin(client, run, record: Record) -> bool:
    """Log which code, experiment and machine made the weights of a run."""
    from mlflow.entities import RunTag

    new = {name: value for name, value in record.tags.items() if run.data.tags.get(name) != value}
    if not new:
        return False
    if record.diff:
        client.log_artifact(run.info.run_id, record.diff)
    if not record.key:
        new["mlflow.runName"] = run_name(record)
    # All in one call, because a kill between two would leave half of the tags, which looks complete.
    client.log_batch(run.info.run_id, tags=[RunTag(*tag) for tag in new.items()])
    return True


def _log_params(client, run, params: dict[str, object]) -> bool:
    """Log the params that the run lacks, under their paths in params.yaml.

    Also logs how many images a CNN trains on, because the default of split.train_size, null, does not say it.
    """
    from mlflow.entities import Param

    if "split.val_size" in params:
        rest = N_TRAIN - int(str(params["split.val_size"]))
        params = {**params, IMAGES: params.get("split.train_size") or rest}
    missing = [Param(name, as_yaml(value)) for name, value in params.items() if name not in run.data.params]
    if missing:
        client.log_batch(run.info.run_id, params=missing)
    return bool(missing)


def _log_dataset(client, run, record: Record) -> bool:
    """Log which data a run trains on, its sizes, and the first 8 digits of its digest, as MLflow does."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if not (data := record.dataset) or (run.inputs and run.inputs.dataset_inputs):
        return False
    profile, source = {**data["sizes"], "digest": data["digest"]}, {"uri": data["source"]}
    dataset = Dataset(
        data["name"], data["digest"][:8], "local", json.dumps(source), profile=json.dumps(profile)
    )
    client.log_inputs(run.info.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "train")])])
    return True


def _log_epochs(client, run_id: str, record: Record) -> bool:
    """Log the rows of a training's metrics whose epoch the run lacks."""
    if not record.rows:
        return False
    logged = {metric.step for metric in client.get_metric_history(run_id, "train_loss")}
    missing = [row for row in record.rows if row["epoch"] not in logged]
    _log_rows(client, run_id, missing, record.ended)
    return bool(missing)


def _log_metrics(client, run, record: Record, only_missing: bool) -> bool:
    """Log metrics without an epoch, except values that the run already has."""
    has = run.data.metrics
    new = {
        name: value
        for name, value in record.metrics.items()
        if name not in has or not (only_missing or _is_kept_as(value, has[name]))
    }
    _log_rows(client, run.info.run_id, [{"epoch": 0, **new}], record.ended)
    return bool(new)


def _log_rows(client, run_id: str, rows: list[dict], when: int) -> None:
    """Log rows of metrics, each at its epoch, in calls of at most 1,000, MLflow's limit; `when` in ms."""
    from mlflow.entities import Metric

    metrics = [
        Metric(name, value, int(row.get("time", when)), int(row["epoch"]))
        for row in rows
        for name, value in row.items()
        if name not in ("epoch", "time")
    ]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics[start : start + 1000])


def _is_kept_as(value: float, kept: float) -> bool:
    """Whether a store that was given `value` returns `kept`."""
    if math.isnan(value):
        return math.isnan(kept)
    return np.clip(value, -LIMIT, LIMIT) == kept


def _log_files(client, run, files: dict[str, Path], only_missing: bool) -> list[str]:
    """Attach files, folder by folder; returns the folders that the run lacked or had with other files."""
    folders: dict[str, dict[str, Path]] = defaultdict(dict)
    for name, path in files.items():
        folders[PurePosixPath(name).parts[0]][name] = path
    added = []
    for folder, members in folders.items():
        tag, sent = f"synced_{folder}", run.data.tags.get(f"synced_{folder}")
        content = sorted([name, sha256_of(path)] for name, path in members.items())
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        if sent == digest or (sent and only_missing):
            continue
        if sent:  # the new files invalidate it
            client.delete_tag(run.info.run_id, tag)
        for name, path in members.items():
            parent = str(PurePosixPath(name).parent)
            client.log_artifact(run.info.run_id, path, None if parent == "." else parent)
        client.set_tag(run.info.run_id, tag, digest)
        added.append(folder)
    return added
