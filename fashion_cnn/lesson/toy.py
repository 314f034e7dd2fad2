"""Part 1 of the lesson: two 4×4 images and 12 parameters."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fashion_cnn.models.cnns import build_toy_cnn, fresh

MOMENTS = 100
PARAMETERS = [*(f"kernel_{row}{column}" for row in range(3) for column in range(3)), "kernel_bias"]
PARAMETERS += ["weight", "bias"]  # in the order of torch's state_dict


def train_toy(
    images: np.ndarray, labels: np.ndarray, *, epochs: int, learning_rate: float, seed: int
) -> tuple[nn.Sequential, list[float], list[dict]]:
    """Train the toy CNN on `images` (2, 1, 4, 4) and `labels` (2,), one image per step, in order.

    Returns the model, each epoch's mean binary cross-entropy (computed before each update), and the
    parameters after about MOMENTS of the epochs, from 0 (before the training) to the last.
    """
    model = fresh(build_toy_cnn, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    # (1, 1, 4, 4) and (1, 1) per step, split once: a DataLoader would cost more than the training
    batches = list(
        zip(torch.from_numpy(images).split(1), torch.from_numpy(labels)[:, None].split(1), strict=True)
    )
    losses, history = [], [{"epoch": 0} | parameters(model)]
    kept = set(np.linspace(0, epochs, MOMENTS + 1).round().astype(int).tolist())
    for epoch in range(1, epochs + 1):
        for image, label in batches:
            loss = F.binary_cross_entropy(model(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if epoch in kept:
            history.append({"epoch": epoch} | parameters(model))
    return model.eval(), torch.stack(losses).view(epochs, len(batches)).mean(1).tolist(), history


def parameters(model: nn.Sequential) -> dict[str, float]:
    """The toy's 12 parameters by name: kernel_00 to kernel_22 by row and column, and the three others."""
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()
    return dict(zip(PARAMETERS, values, strict=True))


def is_relu_dead(model: nn.Sequential, images: np.ndarray) -> bool:
    """True if the ReLU gives 0 for every image.

    Then no gradient reaches the convolution, the linear layer sees the same input for both labels, and the
    outputs settle at 0.5.
    """
    with torch.inference_mode():
        return not model[:3](torch.from_numpy(images)).any()


def outputs(model: nn.Sequential, images: np.ndarray) -> list[float]:
    """The model's probability of label 1 for each of `images` (N, 1, 4, 4)."""
    with torch.inference_mode():
        return model(torch.from_numpy(images)).flatten().tolist()
