"""The figures: what is drawn is read back from the axes, and redrawing gives the same bytes."""

import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.lesson import figures
from pipeline import environment

COLORS = {"original": "#0072b2", "augmented": "#d55e00"}


def tables_of(seed: int) -> dict[str, list[dict]]:
    """Rows as plot_results reads them, with different values for each model."""
    rng = np.random.default_rng(seed)
    tables = {
        "training_curves": [
            {
                "epoch": n,
                "train_loss": rng.random(),
                "train_accuracy": 0.7 + 0.2 * rng.random(),
                "val_loss": rng.random(),
                "val_accuracy": 0.7 + 0.2 * rng.random(),
            }
            for n in (1, 2, 3)
        ],
        "confusion": [
            {"actual": CLASSES[n % 10], "predicted": CLASSES[rng.integers(0, 1 + n % 9)]}
            for n in range(10 * (20 + seed))
        ],
        "mistakes": [
            {
                "label": CLASSES[rng.integers(10)],
                "prediction": CLASSES[rng.integers(10)],
                "confidence": rng.random(),
                "pixels": rng.integers(0, 256, (28, 28), np.uint8),
            }
            for _ in range(6 + seed)
        ],
    }
    robustness = {
        "shifts": [
            {"pixels": by, "shift_x": rng.random(), "shift_y": rng.random(), "n": 1234} for by in (-1, 0, 2)
        ],
        "rotations": [{"degrees": by, "rotation": rng.random(), "n": 1234} for by in (-5, 5)],
    }
    return tables | {"robustness": robustness}


MODELS = {"original": tables_of(1), "augmented": tables_of(2)}
TOY = [{"epoch": n, "train_loss": 1 / n} for n in range(1, 9)]
EXAMPLES = np.random.default_rng(3).integers(0, 256, (3, 4, 28, 28), np.uint8)  # original and two copies
TABLES = {
    name: {images: tables[name] for images, tables in MODELS.items()} for name in MODELS["original"]
} | {"toy_loss": TOY}


def arguments(name) -> list:
    return [[*EXAMPLES], [0, 1, 2, 7]] if name == "augmentation" else [TABLES[name]]


@pytest.fixture
def draw():
    """Draw a figure from its rows and lay it out."""

    def figure(name):
        drawn = getattr(figures, name)(*arguments(name))
        drawn.canvas.draw()
        return drawn

    yield figure
    plt.close("all")


@pytest.mark.parametrize("name", [*TABLES, "augmentation"])
def test_redraw_same_bytes(name, tmp_path):
    """A figure has the same bytes when it is redrawn."""
    for folder in ("first", "second"):
        figures.save(getattr(figures, name)(*arguments(name)), tmp_path / folder / "figure.png", dpi=50)
    first, second = ((tmp_path / folder / "figure.png").read_bytes() for folder in ("first", "second"))
    assert first == second
    assert first.startswith(b"\x89PNG")
    assert b"Software" not in first
    assert plt.get_fignums() == []  # closed; otherwise memory would grow with each figure


def test_a_users_matplotlibrc_moves_no_byte(tmp_path):
    """A user's matplotlibrc does not change a byte of a figure."""
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.facecolor: pink\nlines.linewidth: 9\n")
    code = (
        "from pathlib import Path; from fashion_cnn.lesson import figures;"
        "rows = [{'epoch': n, 'train_loss': 1 / n} for n in range(1, 9)];"
        "figures.save(figures.toy_loss(rows), Path('figure.png'), dpi=50);"
        "print(figures.plt.rcParams['font.size'])"
    )
    command = [sys.executable, "-c", code]
    settings = {"MATPLOTLIBRC": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(**settings), capture_output=True, text=True, check=True
    )
    assert done.stdout == "10.0\n"
    figures.save(figures.toy_loss(TOY), tmp_path / "here.png", dpi=50)
    assert (tmp_path / "figure.png").read_bytes() == (tmp_path / "here.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "width", "height"),  # inches
    [
        ("toy_loss", 6, 3.5),
        ("training_curves", 7, 6.5),
        ("robustness", 12, 4),
        ("confusion", 13, 6.2),
        ("augmentation", 4 * 1.25, 3 * 1.3 + 0.5),  # grows with each image and each copy
        ("mistakes", 6 * 1.75, 2 * 2 * 2.25 + 0.4),  # six in a row, two rows for each model
    ],
)
def test_file_size_in_pixels(name, width, height, draw, tmp_path):
    """A figure's file has its size in inches times the dpi."""
    figures.save(draw(name), tmp_path / "figure.png", dpi=50)
    assert imread(tmp_path / "figure.png").shape[:2] == pytest.approx((height * 50, width * 50), abs=1)


def curves(axes):
    """Each curve's colour, marker, line style, x and y, by its label."""
    return {
        line.get_label(): (
            to_hex(line.get_color()),
            line.get_marker(),
            line.get_linestyle(),
            *np.asarray(line.get_data()).tolist(),
        )
        for line in axes.lines
    }


def column(rows, name):
    return [float(row[name]) for row in rows]


def ticks(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_training_curves(draw):
    """The training curves show each model's own values."""
    axes = draw("training_curves").axes
    for part, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        expected = {}
        for images, rows in TABLES["training_curves"].items():
            epochs = column(rows, "epoch")
            for split, marker, line in (("train", "o", "None"), ("val", "None", "-")):
                values = column(rows, f"{split}_{quantity}")
                expected[f"{images}, {split}"] = (COLORS[images], marker, line, epochs, values)
        assert curves(part) == expected
    assert [part.get_ylabel() for part in axes] == ["cross-entropy", "accuracy"]
    assert axes[0].get_title() == "CNN on Fashion-MNIST"
    assert axes[0].get_ylim()[0] == 0
    assert axes[1].get_xlabel() == "epoch"
    assert {text.get_text() for text in axes[0].get_legend().get_texts()} == set(curves(axes[0]))
    # Whole epochs and whole percents, each only once.
    assert ticks(axes[1].xaxis) == ["0", "1", "2", "3", "4"]
    assert ticks(axes[1].yaxis) == ["65%", "70%", "75%", "80%", "85%", "90%"]


def test_toy_loss(draw):
    """The toy's loss is shown as a curve beside that of a guess."""
    [axes] = draw("toy_loss").axes
    curve, guess = axes.lines
    assert np.asarray(curve.get_data()).tolist() == [column(TOY, "epoch"), column(TOY, "train_loss")]
    assert to_hex(curve.get_color()) == COLORS["original"]
    assert list(guess.get_ydata()) == pytest.approx([0.693147] * 2, abs=1e-6)
    [note] = axes.texts
    assert (note.get_text(), note.xy[1]) == ("ln 2: both outputs 0.5", pytest.approx(0.693147, abs=1e-6))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "binary cross-entropy")
    assert axes.get_title() == "Toy CNN: training loss"
    assert axes.get_ylim()[0] == 0


def test_robustness(draw):
    """The robustness figure shows each model's own accuracies."""
    figure = draw("robustness")
    assert figure.get_suptitle() == "Test accuracy when the image is moved (n = 1,234 at each point)"
    parts = [
        ("shifts", "pixels", "shift_x", "shifted left and right", "pixels (+ right)"),
        ("shifts", "pixels", "shift_y", "shifted up and down", "pixels (+ down)"),
        ("rotations", "degrees", "rotation", "rotated", "degrees (+ counterclockwise)"),
    ]
    for axes, (table, amount, transform, title, label) in zip(figure.axes, parts, strict=True):
        expected = {}
        for images, tables in TABLES["robustness"].items():
            values = (column(tables[table], amount), column(tables[table], transform))
            expected[f"trained on {images} images"] = (COLORS[images], "o", "-", *values)
        assert curves(axes) == expected
        assert (axes.get_title(), axes.get_xlabel(), axes.get_ylim()) == (title, label, (0, 1))
    left = figure.axes[0]
    assert left.get_ylabel() == "test accuracy"
    assert ticks(left.yaxis)[0] == "0%"
    assert ticks(left.yaxis)[-1] == "100%"
    assert {text.get_text() for text in left.get_legend().get_texts()} == set(curves(left))


def test_confusion(draw):
    """The confusion figure shows each model's own shares."""
    figure = draw("confusion")
    for axes, (images, rows) in zip(figure.axes, TABLES["confusion"].items(), strict=True):
        assert axes.get_title() == f"trained on {images} images, n = {len(rows)}"
        shares = np.zeros((10, 10))
        for i, j in np.ndindex(10, 10):
            of_class = [row["predicted"] for row in rows if row["actual"] == CLASSES[i]]
            shares[i, j] = 100 * of_class.count(CLASSES[j]) / len(of_class)
        [image] = axes.images
        assert np.allclose(image.get_array(), shares)
        assert image.get_clim() == (0, 100)
        written = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
        assert written == {
            (j, i): (f"{shares[i, j]:.0f}", "white" if shares[i, j] > 50 else "black")
            for i, j in zip(*np.nonzero(shares), strict=True)
        }
        assert ticks(axes.xaxis) == list(CLASSES)
        assert axes.get_xlabel() == "predicted"
    assert ticks(figure.axes[0].yaxis) == list(CLASSES)
    assert figure.axes[0].get_ylabel() == "actual"
    title = "Test images: predicted class, % of the actual class (0.5 % and less left out)"
    assert figure.get_suptitle() == title


def test_confusion_small_shares():
    """The confusion figure leaves out half a percent and accepts a class with one image or none."""
    rows = [{"actual": CLASSES[0], "predicted": CLASSES[1 if n == 0 else 0]} for n in range(200)]
    rows += [{"actual": CLASSES[1], "predicted": CLASSES[n % 2]} for n in range(2)]
    rows += [{"actual": CLASSES[2], "predicted": CLASSES[3 if n == 0 else 2]} for n in range(100)]
    rows += [{"actual": CLASSES[3], "predicted": CLASSES[9]}]
    axes = figures.confusion({"original": rows, "augmented": rows}).axes[0]
    plt.close("all")
    written = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert written == {
        (0, 0): ("100", "white"),  # 199 of 200; the other is half a percent
        (0, 1): ("50", "black"),
        (1, 1): ("50", "black"),
        (2, 2): ("99", "white"),
        (3, 2): ("1", "black"),
        (9, 3): ("100", "white"),
    }
    assert not np.isnan(axes.images[0].get_array()).any()


def shown(axes) -> str:
    [image] = axes.images
    assert image.get_clim() == (0, 255)
    return image.get_array().tobytes().hex()


def test_mistakes(draw):
    """The figure of mistakes shows each model's own images."""
    for part, (images, rows) in zip(draw("mistakes").subfigs, TABLES["mistakes"].items(), strict=True):
        assert part.get_suptitle() == f"Trained on {images} images: most confident mistakes on the test split"
        assert len(part.axes) == 12  # two rows of at most six
        used = [axes for axes in part.axes if axes.axison]
        assert used == part.axes[: len(rows)]
        assert [shown(axes) for axes in used] == [row["pixels"].tobytes().hex() for row in rows]
        for axes, row in zip(used, rows, strict=True):
            confidence = f"{100 * float(row['confidence']):.2f}%"
            assert axes.get_title() == f"{row['label']}\ntaken for {row['prediction']}\n{confidence}"
            assert [*axes.get_xticks(), *axes.get_yticks()] == []


def test_augmentation(draw):
    """The augmentation figure shows each copy below its image."""
    figure = draw("augmentation")
    assert [shown(axes) for axes in figure.axes] == [
        image.tobytes().hex() for image in EXAMPLES.reshape(-1, 28, 28)
    ]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["T-shirt/top", "Trouser", "Pullover", "Sneaker"] + [""] * 8
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["original", "", "", "", "copy 1", "", "", "", "copy 2", "", "", ""]
    assert figure.get_suptitle() == "Augmentation: train images and their copies"


@pytest.mark.parametrize(
    ("name", "axis"), [("training_curves", "x"), ("robustness", "y"), ("confusion", "y")]
)
def test_shared_axes(draw, name, axis):
    """Parts of a figure that are compared share their axis."""
    first, *others = draw(name).axes
    shared = getattr(first, f"get_shared_{axis}_axes")()
    assert all(shared.joined(first, other) for other in others)


def test_single_mistake_and_image():
    """The figures also draw a single mistake of each model and a single image."""
    figure = figures.mistakes({images: rows[:1] for images, rows in TABLES["mistakes"].items()})
    assert [len(part.axes) for part in figure.subfigs] == [1, 1]
    assert [shown(part.axes[0]) for part in figure.subfigs] == [
        rows[0]["pixels"].tobytes().hex() for rows in TABLES["mistakes"].values()
    ]
    figure = figures.augmentation([EXAMPLES[0][:1], EXAMPLES[1][:1]], np.array([3]))
    assert [shown(axes) for axes in figure.axes] == [EXAMPLES[n][0].tobytes().hex() for n in (0, 1)]
    plt.close("all")
