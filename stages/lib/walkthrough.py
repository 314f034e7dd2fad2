"""The toy's forward pass written out, every product and sum, for a person to follow."""

import numpy as np


def write_out(
    image: np.ndarray,
    kernel: np.ndarray,
    bias: float,
    linear: tuple[float, float],
    rows: list[dict],
    label: float,
) -> str:
    """Markdown for one image (4, 4) through `kernel` (3, 3) and `linear`, the weight and bias of that layer.

    `rows` are those of compare_layers.
    """
    by_layer = {row["layer"]: row for row in rows}
    convolved = by_layer["Conv2d-1"]["by_hand"][0, 0]  # (2, 2)
    lines = [
        f"The input, label {label:.0f}:",
        "",
        matrix(image),
        "",
        "At each position, patch · kernel + bias:",
        "",
    ]
    for (i, j), total in np.ndenumerate(convolved):
        patch = image[i : i + 3, j : j + 3]
        terms = zip(patch.flat, kernel.flat, strict=True)
        products = " ".join(f"{value:+.3f}·({weight:+.4f})" for value, weight in terms)
        lines.append(f"- row {i}, column {j}: `{products} {bias:+.4f}` = **{total:+.6f}**")
    weight, offset = linear
    pooled, score, output = (
        by_layer[layer]["by_hand"].item() for layer in ("ReLU-3", "Linear-5", "Sigmoid-6")
    )
    lines += [
        "",
        "Then the largest of the four, 0 where it is negative, through the linear layer and the sigmoid:",
        "",
        f"- ReLU(max) = **{pooled:+.6f}**",
        f"- `{pooled:+.6f}·({weight:+.4f}) {offset:+.4f}` = **{score:+.6f}**",
        f"- `1 / (1 + exp({-score:+.6f}))` = **{output:.6f}**",
        "",
        "Every layer's outputs:",
    ]
    lines += ["", "| step | by loops | by torch | absolute error |", "|---|---|---|---|"]
    for row in rows:
        hand, auto = row["by_hand"].ravel(), row["by_torch"].ravel()
        lines.append(f"| {row['layer']} | {_numbers(hand)} | {_numbers(auto)} | {row['error']:.1e} |")
    return "\n".join(lines) + "\n"


def parameters_table(rows: list[dict]) -> str:
    """Markdown for the rows of compare_counts."""
    lines = ["| layer | (in·kh·kw + 1)·out | torchsummary |", "|---|---|---|"]
    lines += [f"| {row['layer']} | {row['by_formula']:,} | {row['by_summary']:,} |" for row in rows]
    lines.append(
        f"| total | {sum(r['by_formula'] for r in rows):,} | {sum(r['by_summary'] for r in rows):,} |"
    )
    return "\n".join(lines) + "\n"


def matrix(values: np.ndarray) -> str:
    """Markdown for a small matrix."""
    return "```\n" + "\n".join(" ".join(f"{value:+.4f}" for value in row) for row in values) + "\n```"


def _numbers(values: np.ndarray) -> str:
    return ", ".join(f"{value:+.6f}" for value in values)
