"""A run's model in MLflow: its weights, and the code that turns pixels into probabilities.

`mlflow models serve` serves it from any machine, and `fashion-cnn promote` registers it.
"""

import io
import math
import tempfile
import zipfile
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.project.catalog import TOY, TRAININGS
from fashion_cnn.project.record import Record
from fashion_cnn.tracking.store import locked

WEIGHTS_FOLDER = "data"  # MLflow's name for the folder with a model's weights
CODE, LOADER = "fashion_cnn.zip", "served"
# The module that MLflow imports to load a model.
LOAD = f"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("{CODE}")))
from fashion_cnn.tracking.serving import _load_pyfunc
"""


def models_of(client, run) -> list:
    """The run's models, also those whose files MLflow has not sent yet."""
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


@cache
def packed_code() -> bytes:
    """The package as an archive from which Python can import; one file, because each would be a request.

    Read it early: a temporary copy of the project may be deleted before its training's model is sent.
    """
    package, packed = Path(__file__).resolve().parents[1], io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(package.rglob("*.py")):
            archive.write(path, path.relative_to(package.parent))
    return packed.getvalue()


def log_model(client, run, record: Record) -> bool:
    """Log the model with the record's weights, unless the run has one.

    Neither torch nor the model is loaded, because their imports take longer than the rest of the upload.
    """
    run_id, weights = run.info.run_id, record.weights
    if not weights or ready_models(client, run):
        return False
    import mlflow

    training = TRAININGS[record.training]
    with locked(run_id), tempfile.TemporaryDirectory() as scratch:
        models = models_of(client, client.get_run(run_id))
        if any(one.status == "READY" for one in models):  # another process logged it
            return False
        for one in models:  # a kill stopped its upload
            client.delete_logged_model(one.model_id)
        data, code, load = (Path(scratch, name) for name in (training.weights.name, CODE, f"{LOADER}.py"))
        data.write_bytes(weights.read_bytes())
        code.write_bytes(packed_code())
        load.write_text(LOAD)
        shape, outputs = ((1, 4, 4), ["label 1"]) if training is TOY else ((28, 28), CLASSES)
        # Otherwise the model goes to the experiment "Default", which is not the project's.
        mlflow.set_experiment(experiment_id=run.info.experiment_id)
        # Not mlflow.pyfunc.log_model: it logs to an active run, so it would set this one to RUNNING.
        mlflow.models.Model.log(
            None, run_id=run_id, flavor=mlflow.pyfunc, name=training.weights.stem, loader_module=LOADER,
            data_path=str(data), code_paths=[str(code), str(load)], signature=signature(outputs),
            input_example={"images": np.zeros((2, *shape), np.uint8)},
            pip_requirements=pinned("torch", "torchsummary", "numpy", "pandas", "safetensors"),
        )  # fmt: skip
    return True


def signature(outputs: Iterable[str]):
    """From images to a probability for each of the outputs."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    # Objects pass unchanged; for uint8, MLflow would convert 0.5 and "7" before serving.py could reject them.
    images = TensorSpec(np.dtype("O"), (-1,), "images")
    return ModelSignature(Schema([images]), Schema([ColSpec("double", name) for name in outputs]))


def pinned(*names: str) -> list[str]:
    """A model's requirements, without the "+cpu" of a local build; MLflow would take 5 s to infer them."""
    return [f"{name}=={version(name).split('+')[0]}" for name in names]


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
