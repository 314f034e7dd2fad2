"""A model as MLflow serves it: from pixels to probabilities. It runs wherever the model was downloaded."""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import torch

from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.models.cnns import build_toy_cnn, load_cnn, load_weights, to_input
from fashion_cnn.project.catalog import TOY
from fashion_cnn.tracking.models import TOY_OUTPUTS


def _load_pyfunc(path: str) -> "Classifier | ToyClassifier":
    """The model with the weights in a file; MLflow calls this."""
    if Path(path).name == TOY.weights.name:
        return ToyClassifier(load_weights(build_toy_cnn(), Path(path)))
    return Classifier(load_cnn(Path(path)))


class Classifier:
    """A CNN of `train_cnn`, with its pre- and postprocessing."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def predict(self, model_input, params=None):  # noqa: ARG002  (MLflow's arguments)
        """From "images" (N, 28, 28), a light garment on black, to probabilities (N, 10) by class."""
        images = torch.from_numpy(pixels(model_input["images"]))
        with torch.inference_mode():
            probabilities = self.model(to_input(images)).softmax(1)
        return pd.DataFrame(probabilities.numpy(), columns=CLASSES)


class ToyClassifier(Classifier):
    """The 12-parameter CNN."""

    def predict(self, model_input, params=None):  # noqa: ARG002
        """From "images" (N, 1, 4, 4), numbers, to the probability of label 1, (N, 1)."""
        images = torch.tensor(model_input["images"].tolist(), dtype=torch.float32)
        with torch.inference_mode():
            return pd.DataFrame(self.model(images).numpy(), columns=TOY_OUTPUTS)


def pixels(images: np.ndarray) -> np.ndarray:
    """Images as (N, 28, 28) uint8. Raises MlflowException, code 400, if they are anything but such integers.

    Without this check, values between 0 and 1 would pass as black, and "7" and true as numbers.
    """
    kinds = {type(value) for value in images.flat} if images.dtype == object else {images.dtype.type}
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        found = f"shape {images.shape}"
    elif not all(kind is int or issubclass(kind, np.integer) for kind in kinds):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
    elif images.size and not 0 <= images.min() <= images.max() <= 255:
        found = f"values from {images.min()} to {images.max()}"
    else:
        return images.astype(np.uint8)
    raise mlflow.MlflowException.invalid_parameter_value(
        f"images: {found}, expected (N, 28, 28) integers from 0 to 255, a light garment on black"
    )
