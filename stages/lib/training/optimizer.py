"""How the weights move: AdamW, and its learning rate by step."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from params_schema import TrainCnn

RISE = 0.2  # of the steps of a one-cycle schedule


def build_optimizer(model: nn.Module, params: "TrainCnn", device: torch.device) -> torch.optim.AdamW:
    """AdamW; with `params.weight_decay` 0 it is the lesson's Adam.

    Only weights decay; biases and the scales of batch norm need no restraint.
    """
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    on_cuda = device.type == "cuda"
    # A CUDA graph reads the rate where it lies; a number would be fixed at the capture.
    rate = torch.tensor(float(params.learning_rate), device=device) if on_cuda else params.learning_rate
    # fused: one pass over all weights instead of several for each.
    groups: list[dict] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=rate, weight_decay=params.weight_decay, fused=True, capturable=on_cuda,
    )  # fmt: skip


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def scheduled(params: "TrainCnn", step: int, steps: int) -> float:
    """The learning rate of `step`, from 0, of `steps`.

    One-cycle rises evenly to `params.learning_rate` in the first fifth, and falls evenly towards 0.
    """
    if params.schedule == "constant":
        return params.learning_rate
    done = (step + 1) / (steps + 1)  # never 0 or 1, where a step would change nothing
    return params.learning_rate * min(done / RISE, (1 - done) / (1 - RISE))
