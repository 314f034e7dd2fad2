"""What is written into a run of MLflow, each a call that may be repeated: values, data, models, reports."""

import json
import math
import sys
import tempfile
import textwrap
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML, YAMLError

from fashion_cnn.project.catalog import TOY, TRAININGS
from fashion_cnn.project.provenance import GitError, git
from fashion_cnn.schema import N_TRAIN
from fashion_cnn.tracking.store import Store

NEWEST = ["attributes.start_time DESC"]
LIMIT = sys.float_info.max  # what MLflow keeps infinity as
TRAIN_IMAGES = "train_images"  # a param of runs that is not one of params.yaml
# Of runs in MLflow's charts and tables; without them, two of a few runs may have the same. Okabe and Ito's,
# from those of the figures on.
COLOR = "mlflow.runColor"
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"]
NOTE = (
    "`fashion-cnn trace {}`, in the project, prints what this run was made from and the "
    "commands that restore it. Figures and tables are artifacts, under the stage that made them."
)


def run_name(stage: str, tags: dict, params: dict) -> str:
    """The stage, and what is special about the run: its experiment, or the params that were not committed."""
    if "dvc_exp_name" in tags:
        return f"{stage} {tags['dvc_exp_name']}"
    try:
        committed = params_in(git("show", f"{tags['git_commit']}:./params.yaml"))
    except (KeyError, GitError):  # not in git, or without params there
        return stage
    own = f"{stage.partition('@')[0]}."
    changed = [
        f"{name.removeprefix(own)}={as_yaml(value)}"
        for name, value in params.items()
        if committed.get(name) != value
    ]
    return textwrap.shorten(" ".join([stage, *changed]), 100, placeholder=" …")


def params_in(content: bytes) -> dict[str, object]:
    """The params of a params.yaml, under their paths, whichever its version has; none if it is damaged."""
    try:
        sections = YAML(typ="safe").load(content)
        return {f"{name}.{leaf}": value for name, part in sections.items() for leaf, value in part.items()}
    except (YAMLError, AttributeError):
        return {}


def has_run(store: Store, run_id: str) -> bool:
    """Whether the store has the run, and it is not deleted."""
    return bool(store.client.search_runs(store.experiments, f"attributes.run_id = '{run_id}'"))


def find_runs(store: Store, **tags: str) -> list:
    """The runs with these tags, newest first; several trainings may give the same weights."""
    query = " and ".join(f"tags.{name} = '{value}'" for name, value in tags.items())
    found, token = [], None
    while True:
        page = store.client.search_runs(store.experiments, query, order_by=NEWEST, page_token=token)
        found += page
        if not (token := page.token):
            return found


def find_run(store: Store, **tags: str) -> str | None:
    """The id of the newest run with these tags."""
    found = find_runs(store, **tags)
    return found[0].info.run_id if found else None


def create_run(store: Store, training: str, name: str, tags: dict[str, str], when: int | None = None) -> str:
    """Make a run in the experiment of its training, in another colour than the last one; `when` in ms."""
    experiment_id = store.experiment_of(training)
    last = store.client.search_runs([experiment_id], max_results=1, order_by=NEWEST)
    color = last[0].data.tags.get(COLOR, COLORS[-1]) if last else COLORS[-1]
    place = COLORS.index(color) if color in COLORS else -1  # a user may have chosen another
    tags = tags | {COLOR: COLORS[(place + 1) % len(COLORS)]}
    return store.client.create_run(experiment_id, when, tags, run_name=name).info.run_id


def ready_models(client, run) -> list:
    """The run's models that have their files: MLflow attaches one before it sends them."""
    from mlflow.exceptions import MlflowException

    found = []
    for output in run.outputs.model_outputs:
        try:
            found.append(client.get_logged_model(output.model_id))
        except MlflowException as error:  # deleted, though the run still names it
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    return [model for model in found if model.status == "READY"]


def is_finished(client, run_id: str) -> bool:
    """Whether the run holds a training that has ended well."""
    run = client.get_run(run_id)
    return run.info.status == "FINISHED" and "weights_sha256" in run.data.tags


def stand_in(
    store: Store, training: str, weights_sha256: str, tags: dict, diff: str | None, name: str = ""
) -> str:
    """Make a finished run for weights that the store does not know; it says so.

    `tags` and `diff` are those of the code that made them, where that is known; `name` is the stage if empty.
    """
    note = (
        "Made to hold results of weights that were not trained into this store: "
        "they came from the DVC cache, or the store is new or was unreachable."
    )
    own = {
        "mlflow.note.content": note, "weights_sha256": weights_sha256, "stand_in": "true",
        "dvc_stage": training,
    }  # fmt: skip
    run_id = create_run(store, training, training, own)
    add_origin(store.client, run_id, tags, diff, name or training)
    return run_id


def add_origin(client, run_id: str, tags: dict, diff: str | None, name: str) -> None:
    """End a stand-in, and say which code made its weights."""
    from mlflow.entities import RunTag

    client.set_terminated(run_id)
    log_diff(client, run_id, diff)
    # At once, since a kill between two would leave a half that looks whole.
    client.log_batch(run_id, tags=[RunTag(*tag) for tag in {"mlflow.runName": name, **tags}.items()])


def lacks_origin(run) -> bool:
    """Whether a run is a stand-in that does not say which code made its weights."""
    return "stand_in" in run.data.tags and not {"git_commit", "dvc_exp_name"} & run.data.tags.keys()


def as_yaml(value: object) -> str:
    """A value as params.yaml has it, and as `dvc exp run -S` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def log_params(client, run_id: str, params: dict[str, Any]) -> bool:
    """Log those params that the run lacks, under their path in params.yaml; returns whether it lacked any.

    Beside them, how many images a CNN trains on: the default of split.train_size, null, does not say it.
    """
    from mlflow.entities import Param

    if "split.val_size" in params:
        rest = N_TRAIN - params["split.val_size"]
        params = {**params, TRAIN_IMAGES: params.get("split.train_size") or rest}
    has = client.get_run(run_id).data.params
    missing = [Param(name, as_yaml(value)) for name, value in params.items() if name not in has]
    client.log_batch(run_id, params=missing)
    return bool(missing)


def log_diff(client, run_id: str, diff: str | None) -> None:
    """Log what the tree holds beyond its commit, from git_diff, if it holds more."""
    if diff is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "uncommitted.diff"
        path.write_bytes(diff.encode("latin-1"))
        client.log_artifact(run_id, path)


def log_rows(client, run_id: str, rows: list[dict], when: int) -> None:
    """Log rows of metrics, each at its epoch, in calls of at most 1,000, MLflow's limit; `when` in ms."""
    from mlflow.entities import Metric

    metrics = [
        Metric(name, value, when, row["epoch"])
        for row in rows
        for name, value in row.items()
        if name != "epoch"
    ]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics[start : start + 1000])


def log_missing_epochs(client, run_id: str, rows: list[dict], when: int) -> int:
    """Log those rows of a training's metrics whose epoch the run lacks; returns how many."""
    logged = {metric.step for metric in client.get_metric_history(run_id, "train_loss")}
    missing = [row for row in rows if row["epoch"] not in logged]
    log_rows(client, run_id, missing, when)
    return len(missing)


def log_new_metrics(client, run_id: str, metrics: dict[str, float], when: int) -> bool:
    """Log metrics without an epoch; a value that the run has already is left. Returns whether any was new."""
    has = client.get_run(run_id).data.metrics
    new = {name: value for name, value in metrics.items() if not _is_kept_as(value, has.get(name))}
    log_rows(client, run_id, [{"epoch": 0, **new}], when)
    return bool(new)


def _is_kept_as(value: float, kept: float | None) -> bool:
    """Whether a store that was given `value` says `kept`."""
    if kept is None:
        return False
    if math.isnan(value):
        return math.isnan(kept)
    return np.clip(value, -LIMIT, LIMIT) == kept


def log_report(client, run_id: str, stage: str, metrics: dict, files: list[Path], when: int) -> None:
    """Log what a later stage says about a training; the run's status and times stay as they are."""
    if synced_tag(stage) in client.get_run(run_id).data.tags:  # it will no longer be so
        client.delete_tag(run_id, synced_tag(stage))
    log_new_metrics(client, run_id, metrics, when)
    for path in files:
        client.log_artifact(run_id, path, artifact_path=stage)
    log_model_metrics(client, run_id)


def log_model_metrics(client, run_id: str) -> None:
    """Give the run's models the last values of its metrics, for the table of models."""
    from mlflow.entities import Metric

    run = client.get_run(run_id)
    for model in ready_models(client, run):
        has = {metric.key: metric.value for metric in model.metrics or []}
        new = []
        # First the one to choose by: the table has its columns in the order in which it was given them.
        for name, value in sorted(run.data.metrics.items(), key=lambda one: one[0] != "val_accuracy"):
            if has.get(name) == value or not math.isfinite(value):  # MLflow would show 0 for NaN
                continue
            # With time and epoch of the run's own value, or the run would get the same value a second time.
            history = client.get_metric_history(run_id, name)
            last = max(history, key=lambda one: (one.step, one.timestamp, one.value))
            new.append(Metric(name, last.value, last.timestamp, last.step, model_id=model.model_id))
        client.log_batch(run_id, new)


def log_dataset(client, run_id: str, name: str, digest: str, source: str, sizes: dict) -> None:
    """Log which data a run trains on, and its sizes; of `digest` the first 8 digits, as in MLflow's own."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = json.dumps({**sizes, "digest": digest})
    dataset = Dataset(name, digest[:8], "local", json.dumps({"uri": source}), profile=profile)
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "train")])])


def log_model(client, run_id: str, training: str, weights: Path, example: np.ndarray | None = None) -> None:
    """Log the model with these weights as torch's exported program, unless the run has one.

    `example` (2 or more, C, H, W) float32 becomes the input example; a batch of one would be exported as
    a fixed batch size.
    """
    import mlflow
    import torch
    from mlflow.models import Model, infer_signature

    from fashion_cnn.models.cnns import CNN_SHAPE, TOY_SHAPE, build_toy_cnn, load_cnn, load_weights

    run = client.get_run(run_id)
    if ready_models(client, run):
        return
    mlflow.set_experiment(experiment_id=run.info.experiment_id)  # else the model goes to "Default"
    is_toy = training == TOY.stage
    model = load_weights(build_toy_cnn(), weights) if is_toy else load_cnn(weights)
    shape = TOY_SHAPE if is_toy else CNN_SHAPE
    example = np.zeros((2, *shape), np.float32) if example is None else example
    with torch.inference_mode():
        outputs = model(torch.from_numpy(example)).numpy()
    # Not mlflow.pytorch.log_model, which logs to an active run, and so would make this one running.
    Model.log(
        None,
        flavor=mlflow.pytorch,
        run_id=run_id,
        name=TRAININGS[training].weights.stem,
        pytorch_model=model,
        serialization_format="pt2",
        input_example=example,
        signature=infer_signature(example, outputs),
        # Given, since inferring them takes 5 s; without the "+cpu" of a local build.
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in ("torch", "numpy")],
    )
    log_model_metrics(client, run_id)


def now() -> int:
    """Milliseconds, as MLflow counts them."""
    return int(time.time() * 1000)


def synced_tag(stage: str) -> str:
    """The tag by which `fashion-cnn sync` knows that a run has what the stage wrote."""
    return f"synced_{stage}"
