"""Comparing torch's layers, values and gradients with those of lib.by_hand.layers."""

import re

import numpy as np
import torch
from torch import nn

from lib.by_hand import layers
from lib.models.cnns import summarize


def compare_layers(model: nn.Sequential, images: np.ndarray) -> list[dict]:
    """Take `images` (N, C, H, W) float32 through `model` twice, by torch and by loops.

    Returns one row a layer: its name, `by_torch`, `by_hand` and their largest absolute error.
    The loops feed on their own outputs, so an error would carry on and show.
    """
    by_hand, by_torch = images.astype(np.float64), torch.from_numpy(images)
    rows = []
    with torch.inference_mode():
        for number, layer in enumerate(model):
            by_torch = layer(by_torch)
            by_hand = _by_hand(layer, by_hand)
            error = float(np.abs(by_hand - by_torch.numpy()).max())
            name = f"{type(layer).__name__}-{number + 1}"
            rows.append({"layer": name, "by_torch": by_torch.numpy(), "by_hand": by_hand, "error": error})
    return rows


def compare_gradients(layer: nn.Conv2d, images: np.ndarray, rng: np.random.Generator) -> float:
    """Largest absolute error of a convolution's three gradients against autograd's.

    `images` (N, in, H, W) float32; the upstream gradient is drawn from `rng`.
    """
    inputs = torch.from_numpy(images).requires_grad_()
    weight, bias = layer.parameters()
    outputs = layer(inputs)
    upstream = rng.standard_normal(outputs.shape, np.float32)
    by_torch = torch.autograd.grad(outputs, (inputs, weight, bias), torch.from_numpy(upstream))
    by_hand = layers.conv2d_gradients(images.astype(np.float64), _array(weight), upstream)
    errors = [np.abs(hand - auto.numpy()).max() for hand, auto in zip(by_hand, by_torch, strict=True)]
    return float(np.max(errors))  # NaN where one is NaN, which Python's max() would pass over


def compare_counts(model: nn.Sequential, input_shape: tuple[int, int, int]) -> list[dict]:
    """Parameters of each layer by the lesson's formula and by torchsummary, one row a layer."""
    by_formula = counts_by_formula(model)
    by_summary = counts_by_summary(summarize(model, input_shape))
    return [
        {"layer": f"{type(layer).__name__}-{number}", "by_formula": formula, "by_summary": summary}
        for number, (layer, formula, summary) in enumerate(
            zip(model, by_formula, by_summary, strict=True), start=1
        )
    ]


def _by_hand(layer: nn.Module, values: np.ndarray) -> np.ndarray:
    match layer:
        case nn.Conv2d():
            return layers.conv2d(values, *map(_array, layer.parameters()))  # weight, bias
        case nn.Linear():
            return layers.linear(values, *map(_array, layer.parameters()))
        case nn.MaxPool2d(kernel_size=int(size)):
            return layers.max_pool2d(values, size)
        case nn.ReLU():
            return layers.relu(values)
        case nn.Sigmoid():
            return layers.sigmoid(values)
        case nn.Flatten():
            return values.reshape(len(values), -1)
    raise TypeError(f"no loops for {type(layer).__name__}")


def _array(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().numpy().astype(np.float64)


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
