"""The optimizer, AdamW or Muon, and the learning rate of each step."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from fashion_cnn.schema import TrainCnn

RISE = 0.2  # fraction of a one-cycle schedule's steps in which the rate rises
MOMENTUM = 0.9  # Muon's: how much of each step carries over to the next
# Newton-Schulz, with Muon's coefficients: a step maps a singular value s to a s + b s^3 + c s^5, and five
# steps bring all but the smallest close to 1.
NEWTON_SCHULZ_STEPS, A, B, C = 5, 3.4445, -4.7750, 2.0315


def build_optimizer(model: nn.Module, params: "TrainCnn", device: torch.device) -> torch.optim.AdamW:
    """AdamW or Muon; AdamW with `params.weight_decay` 0 is the lesson's Adam.

    Only weights decay; biases and the scales of batch norm need no regularisation.
    """
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    on_cuda = device.type == "cuda"
    # A CUDA graph reads the rate from a tensor; a number would be fixed at capture.
    rate = torch.tensor(float(params.learning_rate), device=device) if on_cuda else params.learning_rate
    # fused: one pass over all weights instead of several for each.
    groups: list[dict] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    kind = Muon if params.optimizer == "muon" else torch.optim.AdamW
    return kind(groups, lr=rate, weight_decay=params.weight_decay, fused=True, capturable=on_cuda)


class Muon(torch.optim.AdamW):
    """AdamW, but convolution weights take orthogonal steps, which go equally far in all directions.

    Keller Jordan's Muon, scaled as in Liu et al. (arXiv 2502.16982), so that AdamW's rates and decays apply.
    torch.optim.Muon takes only matrices, and computes in bfloat16, which few CPUs support.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Update all weights, and drop the gradients of convolutions."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim < 4 or weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros(())  # AdamW reads it in each state that it loads
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"]
                momentum.mul_(MOMENTUM).add_(weight.grad)
                ahead = weight.grad + MOMENTUM * momentum  # Nesterov momentum: look one step ahead
                update = orthogonal(ahead.flatten(1))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                # Entries of an orthogonal matrix are 1 / sqrt(longer side), those of AdamW's steps about 0.2.
                weight.sub_(group["lr"] * 0.2 * max(update.shape) ** 0.5 * update.view_as(weight))
                weight.grad = None  # so that AdamW skips it
        return super().step(closure)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` (M, N) with its singular values between 0.6 and 1.3, except those below 1 % of its norm.

    Newton-Schulz iteration needs only matrix products. The result is the same for any positive multiple of
    the matrix; zeros give zeros.
    """
    scaled = matrix / (matrix.norm() + 1e-7)
    square = scaled @ scaled.T  # (M, M): iterating on this takes half as long as on the matrix
    product = factor = _factor(square)
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        square = factor @ square @ factor
        factor = _factor(square)
        product = factor @ product
    return product @ scaled


def _factor(square: torch.Tensor) -> torch.Tensor:
    return A * torch.eye(len(square), device=square.device) + B * square + C * square @ square


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def scheduled(params: "TrainCnn", step: int, steps: int) -> float:
    """The learning rate of step number `step`, counted from 0, out of `steps`.

    One-cycle rises linearly to `params.learning_rate` in the first fifth, then falls linearly towards 0.
    """
    if params.schedule == "constant":
        return params.learning_rate
    done = (step + 1) / (steps + 1)  # never 0 or 1, where a step would change nothing
    return params.learning_rate * min(done / RISE, (1 - done) / (1 - RISE))
