"""The figures: drawn from rows, and the same bytes each time."""

import pytest

from lib import figures
from lib.files import pixels_to_text
from lib.idx import CLASSES


@pytest.fixture
def rows(images):
    """Rows as the stages write them, read back as text."""
    pixels = pixels_to_text(images[0])
    curve = [{"epoch": str(n), "train_loss": "0.5", "train_accuracy": "0.8"} for n in (1, 2)]
    moved = [("shift_x", -1), ("shift_x", 1), ("shift_y", 0), ("rotation", 5)]
    return {
        "toy_loss": curve,
        "training_curves": [{**row, "val_loss": "0.4", "val_accuracy": "0.9"} for row in curve],
        "confusion": [{"actual": CLASSES[n % 10], "predicted": CLASSES[n % 3]} for n in range(40)],
        "robustness": [
            {"transform": transform, "amount": str(amount), "accuracy": "0.5", "n": "9"}
            for transform, amount in moved
        ],
        "augmentation": [
            {"image": str(image), "copy": str(copy), "label": "Bag", "pixels": pixels}
            for image in range(3)
            for copy in range(2)
        ],
        "mistakes": [{"label": "Bag", "prediction": "Shirt", "confidence": "0.99", "pixels": pixels}] * 7,
    }


@pytest.mark.parametrize(
    "name", ["toy_loss", "training_curves", "confusion", "robustness", "augmentation", "mistakes"]
)
def test_a_figure_is_the_same_bytes_when_redrawn(name, rows, tmp_path):
    content = rows[name]
    if name not in ("toy_loss", "augmentation"):  # those of both models
        content = {"original": content, "augmented": content}
    for folder in ("first", "second"):
        figures.save(getattr(figures, name)(content), tmp_path / folder / "figure.png", dpi=50)
    first, second = ((tmp_path / folder / "figure.png").read_bytes() for folder in ("first", "second"))
    assert first == second
    assert first.startswith(b"\x89PNG")
    assert b"Software" not in first


def test_what_is_drawn_is_what_was_measured(rows):
    axes = figures.robustness({"original": rows["robustness"], "augmented": rows["robustness"]}).axes
    assert axes[0].lines[0].get_xydata().tolist() == [[-1, 0.5], [1, 0.5]]
    confusion = figures.confusion({"original": rows["confusion"], "augmented": rows["confusion"]}).axes[0]
    assert (
        confusion.images[0].get_array()[0, 0] == 100 / 4 * 2
    )  # of images 0, 10, 20 and 30, those with n % 3 == 0
