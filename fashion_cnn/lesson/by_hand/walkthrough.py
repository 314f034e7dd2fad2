"""The toy's forward pass, with every product and sum written out."""

from collections.abc import Iterator

import numpy as np
from torch import nn

TITLES = {
    nn.Conv2d: "at each position, patch · kernel + bias",
    nn.MaxPool2d: "the largest of each window",
    nn.ReLU: "0 where it is negative",
    nn.Flatten: "the same values in one row",
    nn.Linear: "inputs · weights + bias",
    nn.Sigmoid: "between 0 and 1",
}


def write_out(model: nn.Sequential, image: np.ndarray, rows: list[dict], label: float) -> str:
    """Markdown for one image (C, H, W) through each layer of `model`; `rows` are those of compare_layers."""
    lines = [f"The input, label {label:.0f}:", ""]
    lines += [matrix(channel) for channel in image]
    values = image
    for layer, row in zip(model, rows, strict=True):
        outputs = row["by_hand"][0]
        lines += ["", f"{row['layer']}, {TITLES[type(layer)]}:", ""]
        lines += [f"- {step}" for step in _steps(layer, values, outputs)]
        values = outputs
    lines += ["", "Every layer's outputs:"]
    lines += ["", "| step | by loops | by torch | absolute error |", "|---|---|---|---|"]
    for row in rows:
        hand, auto = row["by_hand"].ravel(), row["by_torch"].ravel()
        lines.append(f"| {row['layer']} | {_numbers(hand)} | {_numbers(auto)} | {row['error']:.1e} |")
    return "\n".join(lines) + "\n"


def weights_table(model: nn.Sequential) -> str:
    """Markdown for the trained weights of each layer that has any."""
    text = ""
    for number, layer in enumerate(model, start=1):
        match layer:
            case nn.Conv2d():
                for kernel, bias in zip(*_parameters(layer), strict=True):
                    text += f"The kernel of Conv2d-{number}, with bias {bias:+.4f}:\n\n"
                    text += "\n\n".join(map(matrix, kernel)) + "\n\n"
            case nn.Linear():
                for weights, bias in zip(*_parameters(layer), strict=True):
                    text += f"Linear-{number}: weight {_numbers(weights, 4)}, bias {bias:+.4f}.\n"
    return text


def _steps(layer: nn.Module, values: np.ndarray, outputs: np.ndarray) -> Iterator[str]:
    """How each of `outputs` comes from `values`, the layer's input without its batch."""
    match layer:
        case nn.Conv2d():
            kernels, biases = _parameters(layer)
            height, width = layer.kernel_size
            for (out, i, j), total in np.ndenumerate(outputs):
                patch = values[:, i : i + height, j : j + width]
                yield f"row {i}, column {j}: {_sum(patch, kernels[out], float(biases[out]), total)}"
        case nn.MaxPool2d(kernel_size=size):
            for (channel, i, j), largest in np.ndenumerate(outputs):
                window = values[channel, i * size : (i + 1) * size, j * size : (j + 1) * size]
                yield f"`max({_numbers(window.ravel())})` = **{largest:+.6f}**"
        case nn.ReLU():
            for value, output in zip(values.flat, outputs.flat, strict=True):
                yield f"`max(0, {value:+.6f})` = **{output:+.6f}**"
        case nn.Flatten():
            yield _numbers(outputs)
        case nn.Linear():
            weight, biases = _parameters(layer)
            for weights, bias, total in zip(weight, biases, outputs, strict=True):
                yield _sum(values, weights, bias, float(total))
        case nn.Sigmoid():
            for value, output in zip(values.flat, outputs.flat, strict=True):
                yield f"`1 / (1 + exp({-value:+.6f}))` = **{output:.6f}**"


def _sum(values: np.ndarray, weights: np.ndarray, bias: float, total: float) -> str:
    terms = zip(values.flat, weights.flat, strict=True)
    products = " ".join(f"{value:+.7g}·({weight:+.4f})" for value, weight in terms)
    return f"`{products} {bias:+.4f}` = **{total:+.6f}**"


def _parameters(layer: nn.Conv2d | nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = layer.parameters()
    return weight.detach().numpy(), bias.detach().numpy()


def parameters_table(rows: list[dict]) -> str:
    """Markdown for the rows of compare_counts."""
    has_norm = any(row["layer"].startswith("BatchNorm2d") for row in rows)
    lines = (
        ["Convolutions have no bias: in·kh·kw·out. Batch norm has 2 for each map.", ""] if has_norm else []
    )
    lines += ["| layer | (in·kh·kw + 1)·out | torchsummary |", "|---|---|---|"]
    lines += [f"| {row['layer']} | {row['by_formula']:,} | {row['by_summary']:,} |" for row in rows]
    lines.append(
        f"| total | {sum(r['by_formula'] for r in rows):,} | {sum(r['by_summary'] for r in rows):,} |"
    )
    return "\n".join(lines) + "\n"


def matrix(values: np.ndarray) -> str:
    """Markdown for a small matrix."""
    return "```\n" + "\n".join(" ".join(f"{value:+.4f}" for value in row) for row in values) + "\n```"


def _numbers(values: np.ndarray, digits: int = 6) -> str:
    return ", ".join(f"{value:+.{digits}f}" for value in values)
