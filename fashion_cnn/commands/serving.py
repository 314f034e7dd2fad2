"""The model that is registered and served: pixels to the probability of each class. MLflow runs this file."""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import torch


class Prediction:
    """From pixels to probabilities. A class of its own, or MLflow asks for type hints, and refuses them."""

    model: torch.nn.Module

    def predict(self, context, model_input, params=None):  # noqa: ARG002  (MLflow's arguments)
        """From "images" (N, 28, 28) uint8, a light garment on black, to probabilities (N, 10) by class."""
        from fashion_cnn.data.fashion_mnist import CLASSES
        from fashion_cnn.models.cnns import to_input

        images = torch.from_numpy(np.array(model_input["images"], np.uint8))
        with torch.inference_mode():
            probabilities = self.model(to_input(images)).softmax(1)
        return pd.DataFrame(probabilities.numpy(), columns=CLASSES)


class Classifier(Prediction, mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """A CNN of `train_cnn`, with what must come before and after it."""

    def load_context(self, context) -> None:
        """Read the weights; the package is at hand, because MLflow keeps it with the model."""
        from fashion_cnn.models.cnns import load_cnn

        self.model = load_cnn(Path(context.artifacts["weights"]))


mlflow.models.set_model(Classifier())
