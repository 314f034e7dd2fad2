"""The CNNs, their inputs and their weights on disk."""

import contextlib
import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchsummary import summary

from fashion_cnn.models.residual import residual_layers
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import read_metadata, read_tensors, sha256_of, write_tensors

TOY_SHAPE = (1, 4, 4)  # C, H, W
CNN_SHAPE = (1, 28, 28)
Model = TypeVar("Model", bound=nn.Module)


def to_input(images: torch.Tensor) -> torch.Tensor:
    """(B, 28, 28) uint8 to the CNN's input, (B, 1, 28, 28) float32 in [0, 1]."""
    return images[:, None].float().div_(255)


def input_array(images: np.ndarray) -> np.ndarray:
    """The same for an array: (B, 28, 28) uint8 to (B, 1, 28, 28) float32."""
    return to_input(torch.from_numpy(images)).numpy()


def build_toy_cnn() -> nn.Sequential:
    """The lesson's 12-parameter CNN: (N, 1, 4, 4) to the probability of label 1, (N, 1)."""
    return nn.Sequential(
        nn.Conv2d(1, 1, kernel_size=3),  # (N, 1, 2, 2)
        nn.MaxPool2d(2),  # (N, 1, 1, 1)
        nn.ReLU(),
        nn.Flatten(),  # (N, 1)
        nn.Linear(1, 1),  # (N, 1)
        nn.Sigmoid(),
    )


def lesson_layers() -> list[nn.Module]:
    """The lesson's CNN for Fashion-MNIST, 896,522 parameters: (N, 1, 28, 28) to logits (N, 10)."""
    return [
        nn.Conv2d(1, 64, kernel_size=3),  # (N, 64, 26, 26)
        nn.MaxPool2d(2),  # (N, 64, 13, 13)
        nn.ReLU(),
        nn.Conv2d(64, 128, kernel_size=3),  # (N, 128, 11, 11)
        nn.MaxPool2d(2),  # (N, 128, 5, 5)
        nn.ReLU(),
        nn.Flatten(),  # (N, 3200)
        nn.Linear(3200, 256),  # (N, 256)
        nn.ReLU(),
        nn.Linear(256, 10),  # (N, 10)
    ]


LESSON = "lesson"
MODELS = {LESSON: lesson_layers, "residual": residual_layers}


class Cnn(nn.Sequential):
    """A CNN for Fashion-MNIST with the layers named `model`: (N, 1, 28, 28) to logits (N, 10).

    Test-time augmentation: in eval mode, the logits are the mean over 1, 2 or 6 `views` of each image: the
    image, its mirror image, and both shifted by a pixel in two ways. Shifted views have half the weight, as
    in airbench (Jordan, arXiv 2404.00498).
    """

    def __init__(self, model: str = LESSON, views: int = 1):
        super().__init__(*MODELS[model]())
        self.model, self.views = model, views

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, 10) of `images` (N, 1, 28, 28)."""
        read = super().forward
        if self.training or self.views == 1:
            return read(images)

        def both(view: torch.Tensor) -> torch.Tensor:
            return (read(view) + read(view.flip(-1))) / 2

        if self.views == 2:
            return both(images)
        # One pixel right and down, and one left and up; uncovered pixels are black.
        one, other = (F.pad(images, (by, -by, by, -by)) for by in (1, -1))
        return both(images) / 2 + (both(one) + both(other)) / 4


def build_cnn(model: str = LESSON, views: int = 1) -> Cnn:
    """The CNN that the params train_cnn.model and train_cnn.tta_views specify."""
    return Cnn(model, views)


def fresh(build: Callable[[], Model], seed: int) -> Model:
    """A model with torch's default random weights, determined by `seed`."""
    torch.manual_seed(seed)
    return build()


def save_weights(model: nn.Module, path: Path) -> str:
    """Write the weights as safetensors and return the SHA-256 of the file.

    The bytes depend only on the values, not on their layout. If the model is not the lesson's, the file says
    which it is.
    """
    tensors = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
    write_tensors(path, tensors, _about(model) if isinstance(model, Cnn) else {})
    return sha256_of(path)


def load_cnn(path: Path) -> Cnn:
    """The CNN whose weights save_weights wrote, in eval mode. Raises StageError for any other file."""
    about = read_metadata(path).get("model", LESSON)
    known = re.fullmatch(rf"({'|'.join(MODELS)})(?:, ([26]) views)?", about)
    if not known:
        raise StageError(
            f"{path}: weights of a model {about}, expected {' or '.join(MODELS)}, with 2 or 6 views or none"
        )
    load_weights(model := build_cnn(known[1], int(known[2] or 1)), path)
    return model


def load_weights(model: nn.Sequential, path: Path) -> nn.Sequential:
    """Load what save_weights wrote, and set eval mode. Raises StageError if it does not fit `model`."""
    tensors = {name: torch.from_numpy(array) for name, array in read_tensors(path).items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise StageError(f"{path}: weights do not fit the model: {' '.join(str(error).split())}") from None
    return model.eval()


def _about(model: Cnn) -> dict[str, str]:
    # A single entry, because safetensors writes several in no fixed order.
    about = model.model if model.views == 1 else f"{model.model}, {model.views} views"
    return {} if about == LESSON else {"model": about}


def summarize(model: nn.Module, input_shape: tuple[int, int, int]) -> str:
    """The table that torchsummary prints, as text."""
    # A copy, so the caller's model keeps its device; train mode, because with several views eval mode runs
    # each layer several times.
    model = copy.deepcopy(model).cpu().train()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        summary(model, input_shape, device="cpu")
    return printed.getvalue()
