"""The lesson's two CNNs, their weights on disk and their layers by the lesson's formula."""

import contextlib
import copy
import io
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchsummary import summary

from lib.errors import StageError
from lib.files import read_tensors, write_tensors

TOY_SHAPE = (1, 4, 4)  # C, H, W
CNN_SHAPE = (1, 28, 28)


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


def build_cnn() -> nn.Sequential:
    """The lesson's CNN for Fashion-MNIST, 896,522 parameters: (N, 1, 28, 28) to logits (N, 10)."""
    return nn.Sequential(
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
    )


def fresh(build: Callable[[], nn.Sequential], seed: int) -> nn.Sequential:
    """A model with torch's usual random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return build()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights as safetensors; the bytes depend on the values alone, not on their layout."""
    write_tensors(path, {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()})


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Read what save_weights wrote into `model`, in eval mode. Raises StageError where it does not fit."""
    tensors = {name: torch.from_numpy(array) for name, array in read_tensors(path).items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise StageError(f"{path}: weights do not fit the model: {' '.join(str(error).split())}") from None
    return model.eval()


def summarize(model: nn.Module, input_shape: tuple[int, int, int]) -> str:
    """The table that torchsummary prints, as text."""
    model = copy.deepcopy(model).cpu()  # the one that trains may be on a GPU, and stays there
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        summary(model, input_shape, device="cpu")
    return printed.getvalue()


def counts_by_summary(table: str) -> list[int]:
    """Parameters of each layer as `summarize` shows them, in order."""
    return [int(count.replace(",", "")) for count in re.findall(r"^ *\w+-\d+ .*\] +([\d,]+)$", table, re.M)]


def counts_by_formula(model: nn.Sequential) -> list[int]:
    """Parameters of each layer by the lesson's formula, (in·kh·kw + 1)·out, 0 where there are none."""
    return [_count(layer) for layer in model]


def _count(layer: nn.Module) -> int:
    if isinstance(layer, nn.Conv2d):
        kernel_height, kernel_width = layer.kernel_size
        return (layer.in_channels * kernel_height * kernel_width + 1) * layer.out_channels
    if isinstance(layer, nn.Linear):
        return (layer.in_features + 1) * layer.out_features
    return 0
