"""The figures, each from rows of metrics or from images; byte-identical when redrawn."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, the same renderer on every machine

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.project.files import replace_atomically

COLORS = {"original": "#0072b2", "augmented": "#d55e00"}  # distinguishable for colour-blind readers
plt.rcdefaults()  # so that a user's matplotlibrc changes no byte
plt.rcParams.update(
    {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
)

Rows = list[dict]


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG without the version that matplotlib would put into it."""
    with replace_atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(figure)


def toy_loss(rows: Rows) -> Figure:
    """Loss of the toy CNN per epoch."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(_column(rows, "epoch"), _column(rows, "train_loss"), color=COLORS["original"])
    axes.axhline(np.log(2), color="grey", linestyle=":", linewidth=1)
    axes.annotate(
        "ln 2: both outputs 0.5", (1, np.log(2)), (0, -3), xycoords=("axes fraction", "data"),
        textcoords="offset points", color="grey", ha="right", va="top",
    )  # fmt: skip
    axes.set(title="Toy CNN: training loss", xlabel="epoch", ylabel="binary cross-entropy", ylim=(0, None))
    return figure


def training_curves(curves: dict[str, Rows]) -> Figure:
    """Loss and accuracy of both CNNs per epoch, on train and val."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6.5), sharex=True, layout="constrained")
    for axes, quantity in ((top, "loss"), (bottom, "accuracy")):
        for images, rows in curves.items():
            epochs, color = _column(rows, "epoch"), COLORS[images]
            axes.plot(epochs, _column(rows, f"train_{quantity}"), "o", color=color, label=f"{images}, train")
            axes.plot(epochs, _column(rows, f"val_{quantity}"), "-", color=color, label=f"{images}, val")
    top.set(title="CNN on Fashion-MNIST", ylabel="cross-entropy", ylim=(0, None))
    bottom.set(xlabel="epoch", ylabel="accuracy")
    bottom.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # whole percents
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.legend(ncols=2)
    return figure


def confusion(tables: dict[str, Rows]) -> Figure:
    """How often each class is taken for each other class, in percent of the actual class."""
    figure, columns = plt.subplots(1, len(tables), figsize=(13, 6.2), sharey=True, layout="constrained")
    for axes, (images, rows) in zip(columns, tables.items(), strict=True):
        counts = np.zeros((len(CLASSES), len(CLASSES)))
        for row in rows:
            counts[CLASSES.index(row["actual"]), CLASSES.index(row["predicted"])] += 1
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1) * 100
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (actual, predicted), share in np.ndenumerate(shares):
            if share > 0.5:
                color = "white" if share > 50 else "black"
                axes.text(
                    predicted, actual, f"{share:.0f}", ha="center", va="center", color=color, fontsize=9
                )
        axes.set(title=f"trained on {images} images, n = {len(rows):,}", xlabel="predicted")
        axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
        axes.set_yticks(range(len(CLASSES)), CLASSES)
        axes.grid(False)
    columns[0].set_ylabel("actual")
    figure.suptitle("Test images: predicted class, % of the actual class (0.5 % and less left out)")
    return figure


def robustness(tables: dict[str, dict[str, Rows]]) -> Figure:
    """Accuracy of both CNNs on shifted and rotated test images."""
    figure, columns = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    panels = [
        ("shifts", "pixels", "shift_x", "shifted left and right", "pixels (+ right)"),
        ("shifts", "pixels", "shift_y", "shifted up and down", "pixels (+ down)"),
        ("rotations", "degrees", "rotation", "rotated", "degrees (+ counterclockwise)"),
    ]
    for axes, (table, amount, accuracy, title, label) in zip(columns, panels, strict=True):
        for images, rows in tables.items():
            axes.plot(
                _column(rows[table], amount), _column(rows[table], accuracy), "o-", color=COLORS[images],
                markersize=4, label=f"trained on {images} images",
            )  # fmt: skip
        axes.set(title=title, xlabel=label, ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    columns[0].set_ylabel("test accuracy")
    columns[0].legend(loc="lower center")
    n = next(iter(tables.values()))["shifts"][0]["n"]
    figure.suptitle(f"Test accuracy when the image is moved (n = {n:,} at each point)")
    return figure


def augmentation(variants: list[np.ndarray], labels: np.ndarray) -> Figure:
    """Images of each variant (n, 28, 28), the original first, one column per image; labels (n,)."""
    figure, grid = plt.subplots(
        len(variants), len(labels), figsize=(1.25 * len(labels), 1.3 * len(variants) + 0.5),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for number, (line, images) in enumerate(zip(grid, variants, strict=True)):
        line[0].set_ylabel(f"copy {number}" if number else "original", fontsize=9)
        for axes, image in zip(line, images, strict=True):
            _show(axes, image)
    for axes, label in zip(grid[0], labels, strict=True):
        axes.set_title(CLASSES[label], fontsize=9)
    figure.suptitle("Augmentation: train images and their copies")
    return figure


def mistakes(tables: dict[str, Rows]) -> Figure:
    """The most confident mistakes of each CNN on test images."""
    width = max(len(rows) for rows in tables.values())
    columns = min(width, 6)
    lines = -(-width // columns)
    figure = plt.figure(figsize=(1.75 * columns, 2.25 * lines * len(tables) + 0.4), layout="constrained")
    parts = figure.subfigures(len(tables), 1, squeeze=False)[:, 0]
    for part, (images, rows) in zip(parts, tables.items(), strict=True):
        part.suptitle(f"Trained on {images} images: most confident mistakes on the test split", fontsize=11)
        grid = part.subplots(lines, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, row in zip(grid.flat, rows, strict=False):
            _show(axes, row["pixels"])
            axes.set_axis_on()
            confidence = f"{row['confidence']:.2%}"
            axes.set_title(f"{row['label']}\ntaken for {row['prediction']}\n{confidence}", fontsize=8)
    return figure


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)


def _column(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows]
