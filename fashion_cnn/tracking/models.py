"""A run's model in MLflow: its weights, and the code that turns pixels into probabilities.

`mlflow models serve` serves it from any machine, and `fashion-cnn promote` registers it.
"""

import io
import math
import platform
import shutil
import sys
import zipfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.project.catalog import TOY, TRAININGS, Training
from fashion_cnn.project.record import Record
from fashion_cnn.tracking.store import locked

# In a model's folder: its weights, the package as an archive, and what it needs.
WEIGHTS_FOLDER, CODE = "data", "fashion_cnn.zip"
REQUIREMENTS, ENVIRONMENT = "requirements.txt", "python_env.yaml"
TOY_OUTPUTS = ["label 1"]
LOADER = "fashion_cnn.tracking.serving"  # the module that MLflow imports to load a model


def models_of(client, run) -> list:
    """The run's models, including those whose files MLflow has not sent yet."""
    from mlflow.exceptions import MlflowException

    found = []
    for output in run.outputs.model_outputs if run.outputs else []:
        try:
            found.append(client.get_logged_model(output.model_id))
        except MlflowException as error:  # deleted, though the run still names it
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    return found


def ready_models(client, run) -> list:
    """The run's models whose files are complete."""
    return [model for model in models_of(client, run) if model.status == "READY"]


def log_model(client, run, record: Record) -> bool:
    """Log the model with the record's weights, unless the run has one."""
    run_id, weights = run.info.run_id, record.weights
    if not weights or ready_models(client, run):
        return False
    import mlflow

    with locked(run_id):
        models = models_of(client, client.get_run(run_id))
        if any(one.status == "READY" for one in models):  # another process logged it
            return False
        for one in models:  # a kill stopped its upload
            client.delete_logged_model(one.model_id)
        # Otherwise the model goes to the experiment "Default", which is not the project's.
        mlflow.set_experiment(experiment_id=run.info.experiment_id)
        training = TRAININGS[record.training]
        mlflow.models.Model.log(
            None, run_id=run_id, flavor=sys.modules[__name__], name=training.weights.stem,
            training=training, weights=weights,
        )  # fmt: skip
    return True


def save_model(path: str, mlflow_model, training: Training, weights: Path) -> None:
    """Write the folder of a model; MLflow calls this, as for every flavor.

    Not mlflow.pyfunc.save_model: it looks through all installed packages, which takes longer than the rest.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    folder, data = Path(path), f"{WEIGHTS_FOLDER}/{training.weights.name}"
    (folder / WEIGHTS_FOLDER).mkdir(parents=True)
    shutil.copyfile(weights, folder / data)
    (folder / CODE).write_bytes(packed_code())
    (folder / REQUIREMENTS).write_text("".join(f"{line}\n" for line in requirements()))
    python = {"python": platform.python_version(), "dependencies": [f"-r {REQUIREMENTS}"]}
    (folder / ENVIRONMENT).write_text(yaml.safe_dump(python))
    # Objects pass unchanged; for uint8, MLflow would convert 0.5 and "7" before serving.py could reject them.
    images = TensorSpec(np.dtype("O"), (-1,), "images")
    outputs = TOY_OUTPUTS if training is TOY else CLASSES
    probabilities = Schema([ColSpec("double", name) for name in outputs])
    mlflow_model.signature = ModelSignature(Schema([images]), probabilities)
    mlflow.pyfunc.add_to_model(mlflow_model, LOADER, data=data, code=CODE, python_env=ENVIRONMENT)
    mlflow_model.save(folder / "MLmodel")


@cache
def packed_code() -> bytes:
    """The package as an archive from which Python can import: each separate file would cost a request.

    Call this early: a temporary copy of the project may be deleted before its training's model is sent.
    """
    package, packed = Path(__file__).resolve().parents[1], io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(package.rglob("*.py")):
            archive.write(path, path.relative_to(package.parent))
    return packed.getvalue()


def requirements() -> list[str]:
    """The packages that serve a model, in the installed versions, without the "+cpu" of a local build."""
    names = ("mlflow", "numpy", "pandas", "safetensors", "torch", "torchsummary")
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]


def log_model_metrics(client, run_id: str) -> None:
    """Give the run's models the last values of its metrics, for the table of models."""
    from mlflow.entities import Metric

    run = client.get_run(run_id)
    for model in ready_models(client, run):
        has = {metric.key: metric.value for metric in model.metrics or []}
        new = []
        # The metric to choose by comes first, because the table keeps the order in which columns were added.
        for name, value in sorted(run.data.metrics.items(), key=lambda one: one[0] != "val_accuracy"):
            if has.get(name) == value or not math.isfinite(value):  # MLflow would show 0 for NaN
                continue
            # Reuse time and epoch of the run's own value; otherwise the run would get the value twice.
            history = client.get_metric_history(run_id, name)
            last = max(history, key=lambda one: (one.step, one.timestamp, one.value))
            new.append(Metric(name, last.value, last.timestamp, last.step, model_id=model.model_id))
        client.log_batch(run_id, new)
