"""Make shifted and rotated copies of every train image: data/augmented/."""

from fashion_cnn.project.params import leaves, load_params
from fashion_cnn.project.process import run_stage, start

if __name__ == "__main__":
    start(load_params)  # before the slow imports, which read the environment

from fashion_cnn.data.copies import save_copies
from fashion_cnn.data.fashion_mnist import TRAIN_IMAGES, TRAIN_LABELS, read_idx
from fashion_cnn.lesson.augmentation import augment


def main() -> None:
    params = load_params()
    how = params.augment_images
    images, labels = read_idx(TRAIN_IMAGES), read_idx(TRAIN_LABELS)  # (60000, 28, 28), (60000,)
    copies = augment(
        images,
        copies=how.copies,
        max_shift=how.max_shift,
        max_rotation=how.max_rotation,
        seed=how.seed,
    )
    save_copies(copies, labels, leaves(params, "augment_images"))


if __name__ == "__main__":
    run_stage(main)
