"""The model that is registered and served: pixels to the probability of each class. MLflow runs this file."""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import torch


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


class Prediction:
    """From pixels to probabilities. In Classifier, MLflow would ask for type hints, and then reject them."""

    model: torch.nn.Module

    def predict(self, context, model_input, params=None):  # noqa: ARG002  (MLflow's arguments)
        """From "images" (N, 28, 28), a light garment on black, to probabilities (N, 10) by class."""
        from fashion_cnn.data.fashion_mnist import CLASSES
        from fashion_cnn.models.cnns import to_input

        images = torch.from_numpy(pixels(model_input["images"]))
        with torch.inference_mode():
            probabilities = self.model(to_input(images)).softmax(1)
        return pd.DataFrame(probabilities.numpy(), columns=CLASSES)


class Classifier(Prediction, mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """A CNN of `train_cnn`, with its pre- and postprocessing."""

    def load_context(self, context) -> None:
        """Read the weights; the package can be imported, because MLflow keeps it with the model."""
        from fashion_cnn.models.cnns import load_cnn

        self.model = load_cnn(Path(context.artifacts["weights"]))


mlflow.models.set_model(Classifier())
