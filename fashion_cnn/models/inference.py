"""From uint8 images to logits, loss and accuracy, without gradients."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fashion_cnn.models.cnns import to_input

BATCH = 500  # images per forward pass; more is not faster on the CPU and takes more memory


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move `model` to `device` in the layout of the fastest convolutions (26 instead of 36 ms per step)."""
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.inference_mode()
def predict(model: nn.Module, images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Logits (N, 10) on the CPU for `images` (N, 28, 28) uint8; the model is put in eval mode."""
    model.eval()
    batches = torch.from_numpy(images).split(BATCH)
    return torch.cat([model(to_input(batch.to(device))).cpu() for batch in batches])


def loss_and_accuracy(logits: torch.Tensor, labels: np.ndarray) -> tuple[float, float]:
    """Mean cross-entropy, and the fraction of `labels` (N,) that `logits` (N, 10) get right."""
    targets = torch.from_numpy(labels).long()
    return F.cross_entropy(logits, targets).item(), (logits.argmax(1) == targets).float().mean().item()
