"""The registered model fashion-cnn: its versions, its champion, and loading a model by any of its names."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

# isort: split
import numpy as np
import torch

from fashion_cnn.models.cnns import load_cnn, to_input
from fashion_cnn.project.catalog import CNNS, RUN_ID
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import sha256_of
from fashion_cnn.tracking.models import WEIGHTS_FOLDER, ready_models
from fashion_cnn.tracking.runs import find_run, find_runs
from fashion_cnn.tracking.store import Store, as_store_error, connect

NAME, CHAMPION = "fashion-cnn", "champion"
# (N, 28, 28) uint8 to probabilities (N, 10).
Classify = Callable[[np.ndarray], np.ndarray]


def load_classifier(model: str) -> Classify:
    """The classifier of a file of weights, a run, a version, or the champion.

    Raises StageError if there is none.
    """
    if model != CHAMPION and not re.fullmatch(rf"\d+|{RUN_ID}", model):
        return of_network(load_cnn(Path(model)))
    with as_store_error():
        store = connect()
        if re.fullmatch(RUN_ID, model):
            return of_run(store.client, find_cnn_run(store, model))
        return of_version(store.client, find_version(store.client, model))


def of_network(network: Callable) -> Classify:
    """The classifier of a CNN that gives logits."""

    def classify(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return (
                torch.cat([network(to_input(part)) for part in torch.from_numpy(images).split(500)])
                .softmax(1)
                .numpy()
            )

    return classify


def of_run(client, run) -> Classify:
    """A run's classifier: its weights, with the code of this project. Raises StageError if it has none."""
    run_id = run.info.run_id
    way_out = "delete the model in `fashion-cnn ui`, then `fashion-cnn sync` adds it if the weights are here"
    place = f"{model_of(client, run).artifact_location}/{WEIGHTS_FOLDER}"
    return _of_weights(place, run, f"{run_id}: its model in MLflow lacks the weights of the run; {way_out}")


def of_version(client, version) -> Classify:
    """The classifier of a version.

    Code stored with it does not run, because anyone who may register a version can put code there.
    """
    run = client.get_run(version.run_id)
    fault = f"{NAME} version {version.version}: not the weights of its run, {version.run_id}"
    way_out = "delete the version in `fashion-cnn ui`, then promote the run again"
    place = f"models:/{NAME}/{version.version}/{WEIGHTS_FOLDER}"
    return _of_weights(place, run, f"{fault}; {way_out}")


def model_of(client, run):
    """The run's model in MLflow. Raises StageError if it has none."""
    ready = ready_models(client, run)
    if not ready:
        raise StageError(
            f"{run.info.run_id}: the run has no model; `fashion-cnn sync` adds it if its weights are here"
        )
    return ready[-1]


def _of_weights(place: str, run, fault: str) -> Classify:
    """The classifier with the weights in a folder of MLflow's artifacts, which must be those of the run."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    with tempfile.TemporaryDirectory() as scratch:
        found = []
        if list_artifacts(place):
            found = [*Path(download_artifacts(place, dst_path=scratch)).glob("*.safetensors")]
        if len(found) != 1 or sha256_of(found[0]) != run.data.tags.get("weights_sha256"):
            raise StageError(fault)
        return of_network(load_cnn(found[0]))


def find_version(client, name: str):
    """The version with a number, or the champion. Raises StageError if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        if name == CHAMPION:
            return client.get_model_version_by_alias(NAME, CHAMPION)
        return client.get_model_version(NAME, name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        what = "no champion" if name == CHAMPION else f"no version {name}"
        raise StageError(f"{NAME}: {what} is registered; `fashion-cnn promote` registers a model") from None


def champion(client):
    """The version that is the champion; None if there is none."""
    try:
        return find_version(client, CHAMPION)
    except StageError:
        return None


def find_cnn_run(store: Store, model: str):
    """The run of a CNN, by its id or by a file of its weights. Raises StageError if there is none."""
    if re.fullmatch(RUN_ID, model):
        run = find_run(store, model)
    else:
        run = next(iter(find_runs(store, weights_sha256=sha256_of(Path(model)))), None)
    if run is None:
        raise StageError(
            f"{model}: no run of it in MLflow, expected one; `fashion-cnn sync` makes the runs of models/"
        )
    stage = run.data.tags.get("dvc_stage")
    if stage not in [training.stage for training in CNNS.values()]:
        raise StageError(f"{model}: a run of {stage or 'no stage'}, expected one of train_cnn")
    return run


def register(client, run):
    """The version of a run's model, which is registered if it has no version yet."""
    for version in client.search_model_versions(f"name = '{NAME}'"):
        if version.run_id == run.info.run_id:
            return version
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME, description=DESCRIPTION)
    model = model_of(client, run)
    return client.create_model_version(
        NAME, f"models:/{model.model_id}", run.info.run_id, model_id=model.model_id
    )


DESCRIPTION = (
    "CNNs for Fashion-MNIST. Input `images`: (N, 28, 28) integers from 0 to 255, a light garment on black. "
    "Output: the probability of each class, by its name. The alias `champion` is the version to use; "
    "`fashion-cnn promote` decides on it."
)
