"""A residual CNN with a third of the lesson's parameters, for the recipes.

Convolution, pooling and ReLU as in the lesson, plus three ideas: batch norm after each convolution, a
residual block after each pooling, and the largest value of each map instead of a hidden linear layer.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Sequential):
    """ReLU of the inputs plus its layers' outputs for them; (N, C, H, W) to the same shape."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """If the layers output zeros, inputs that come from a ReLU pass unchanged."""
        return F.relu(inputs + super().forward(inputs))


def residual_layers() -> list[nn.Module]:
    """(N, 1, 28, 28) to logits (N, 10)."""
    return [
        _conv(1, 32),  # (N, 32, 26, 26)
        nn.MaxPool2d(2),  # (N, 32, 13, 13)
        nn.BatchNorm2d(32),
        nn.ReLU(),
        _residual(32),
        _conv(32, 64),  # (N, 64, 11, 11)
        nn.MaxPool2d(2),  # (N, 64, 5, 5)
        nn.BatchNorm2d(64),
        nn.ReLU(),
        _residual(64),
        _conv(64, 128, padding=1),  # (N, 128, 5, 5)
        nn.MaxPool2d(2),  # (N, 128, 2, 2)
        nn.BatchNorm2d(128),
        nn.ReLU(),
        _residual(128),
        nn.MaxPool2d(2),  # (N, 128, 1, 1)
        nn.Flatten(),  # (N, 128)
        nn.Linear(128, 10),  # (N, 10)
    ]


def _conv(n_in: int, n_out: int, padding: int = 0) -> nn.Conv2d:
    # Batch norm subtracts the mean, and any bias with it.
    return nn.Conv2d(n_in, n_out, kernel_size=3, padding=padding, bias=False)


def _residual(maps: int) -> Residual:
    block = Residual(_conv(maps, maps, padding=1), norm := nn.BatchNorm2d(maps))
    nn.init.zeros_(norm.weight)  # the block starts by adding nothing, and learns what to add
    return block
