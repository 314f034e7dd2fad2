"""Compare torch's values and gradients with those of fashion_cnn.lesson.by_hand.layers."""

import copy
import re

import numpy as np
import torch
from torch import nn

from fashion_cnn.lesson.by_hand import layers
from fashion_cnn.models.cnns import summarize
from fashion_cnn.models.residual import Residual


def fill_batch_norms(model: nn.Sequential, rng: np.random.Generator) -> None:
    """Fill each batch norm as training could: a fresh one multiplies by 1 or 0, which hides errors."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            drawn = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5)}
            drawn |= {"running_var": (0.5, 1.5), "running_mean": (-0.5, 0.5)}
            for name, (low, high) in drawn.items():
                numbers = torch.from_numpy(rng.uniform(low, high, layer.num_features))
                getattr(layer, name).data.copy_(numbers)


def compare_layers(model: nn.Sequential, images: np.ndarray) -> list[dict]:
    """Run `images` (N, C, H, W) float32 through `model` twice, by torch and by loops.

    Returns one row per layer: its name, `by_torch`, `by_hand` and their largest absolute error.
    The loops read their own outputs, so an error propagates to the layers after it.
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


def compare_gradients(layer: nn.Module, images: np.ndarray, rng: np.random.Generator) -> float:
    """Largest absolute error, against autograd, of a layer's gradients with respect to inputs and parameters.

    torch computes in the precision of `images` (N, C, H, W); the upstream gradient is drawn from `rng`. The
    layer is in train mode: batch norm uses the statistics of `images`.
    """
    inputs = torch.from_numpy(images).requires_grad_()
    layer = copy.deepcopy(layer).train().to(inputs.dtype)
    outputs = layer(inputs)
    upstream = rng.standard_normal(outputs.shape, np.float32).astype(images.dtype)
    by_torch = torch.autograd.grad(outputs, (inputs, *layer.parameters()), torch.from_numpy(upstream))
    by_hand = _gradients(layer, images.astype(np.float64), upstream)
    errors = [np.abs(hand - auto.numpy()).max() for hand, auto in zip(by_hand, by_torch, strict=True)]
    return float(np.max(errors))  # NaN if any is NaN, which Python's max() could skip


def compare_counts(model: nn.Sequential, input_shape: tuple[int, int, int]) -> list[dict]:
    """Parameters of each layer by the lesson's formula and by torchsummary, one row per layer."""
    by_formula = counts_by_formula(model)
    by_summary = counts_by_summary(summarize(model, input_shape))
    return [
        {"layer": f"{type(layer).__name__}-{number}", "by_formula": formula, "by_summary": summary}
        for number, (layer, formula, summary) in enumerate(
            zip(_single(model), by_formula, by_summary, strict=True), start=1
        )
    ]


def _by_hand(layer: nn.Module, values: np.ndarray) -> np.ndarray:
    match layer:
        case nn.Conv2d(padding=(width, _)):
            return layers.conv2d(layers.pad(values, width), *_kernels(layer))
        case nn.BatchNorm2d():
            mean, variance = layers.batch_statistics(values)
            if not layer.training:
                mean = _array(layer.get_buffer("running_mean"))
                variance = _array(layer.get_buffer("running_var"))
            return layers.batch_norm(
                values, _array(layer.weight), _array(layer.bias), mean, variance, layer.eps
            )
        case Residual():
            added = values
            for inner in layer:
                added = _by_hand(inner, added)
            return layers.relu(values + added)
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


def _gradients(layer: nn.Module, values: np.ndarray, upstream: np.ndarray) -> list[np.ndarray]:
    """Gradients of sum(layer(values) * upstream) with respect to values, then to torch's parameters."""
    match layer:
        case nn.Conv2d(padding=(width, _)):
            kernels, _ = _kernels(layer)
            images, *others = layers.conv2d_gradients(layers.pad(values, width), kernels, upstream)
            inside = slice(width, -width or None)
            return [images[:, :, inside, inside], *others[: len(list(layer.parameters()))]]
        case nn.BatchNorm2d():
            return list(layers.batch_norm_gradients(values, _array(layer.weight), upstream, layer.eps))
        case Residual():
            inputs = [values]
            for inner in layer:
                inputs.append(_by_hand(inner, inputs[-1]))
            passed = upstream * (values + inputs[-1] > 0)  # back through the ReLU
            gradient = passed
            of_parameters: list[np.ndarray] = []
            for inner, before in zip(reversed(layer), reversed(inputs[:-1]), strict=True):
                gradient, *others = _gradients(inner, before, gradient)
                of_parameters = others + of_parameters
            return [passed + gradient, *of_parameters]  # a sum passes its gradient to both of its terms
    raise TypeError(f"no loops for the gradients of {type(layer).__name__}")


def _kernels(layer: nn.Conv2d) -> tuple[np.ndarray, np.ndarray]:
    """A convolution's kernels and biases; the biases are zeros if it has none."""
    bias = np.zeros(layer.out_channels) if layer.bias is None else _array(layer.bias)
    return _array(layer.weight), bias


def _single(model: nn.Sequential) -> list[nn.Module]:
    """The layers as torchsummary lists them: those of a residual block one by one."""
    return [one for layer in model for one in (layer if isinstance(layer, Residual) else [layer])]


def _array(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().numpy().astype(np.float64)


def counts_by_summary(table: str) -> list[int]:
    """Parameters of each layer as `summarize` shows them, in order."""
    return [int(count.replace(",", "")) for count in re.findall(r"^ *\w+-\d+ .*\] +([\d,]+)$", table, re.M)]


def counts_by_formula(model: nn.Sequential) -> list[int]:
    """Parameters of each layer by the lesson's formula, (in·kh·kw + 1)·out; 0 if it has none.

    Without a bias there is no + 1. Batch norm has a scale and a shift for each map.
    """
    return [_count(layer) for layer in _single(model)]


def _count(layer: nn.Module) -> int:
    if isinstance(layer, nn.Conv2d):
        kernel_height, kernel_width = layer.kernel_size
        bias = layer.bias is not None
        return (layer.in_channels * kernel_height * kernel_width + bias) * layer.out_channels
    if isinstance(layer, nn.BatchNorm2d):
        return 2 * layer.num_features
    if isinstance(layer, nn.Linear):
        return (layer.in_features + 1) * layer.out_features
    return 0
