"""Make shifted and rotated copies of every train image: data/augmented/."""

from pathlib import Path

from lib.augmentation import augment
from lib.copies import load_copies, save_copies
from lib.errors import run_stage
from lib.files import pixels_to_text, write_csv
from lib.idx import CLASSES, TRAIN_IMAGES, TRAIN_LABELS, read_idx
from lib.params import leaves, load_params

EXAMPLES = 8  # images shown in the figure


def main() -> None:
    sections = load_params("augment_images")
    params = sections.augment_images
    images, labels = read_idx(TRAIN_IMAGES), read_idx(TRAIN_LABELS)  # (60000, 28, 28), (60000,)
    copies = augment(
        images,
        copies=params.copies,
        max_shift=params.max_shift,
        max_rotation=params.max_rotation,
        seed=params.seed,
    )
    save_copies(copies, labels, leaves(sections))
    variants = [images, *load_copies()[0]]
    examples = [
        {"image": row, "copy": copy, "label": CLASSES[labels[row]], "pixels": pixels_to_text(variant[row])}
        for row in range(EXAMPLES)
        for copy, variant in enumerate(variants)  # copy 0 is the original
    ]
    write_csv(Path("metrics/augment_images.csv"), examples)


if __name__ == "__main__":
    run_stage(main)
