"""Write the lesson's two 4×4 images and their labels: data/toy.safetensors."""

from fashion_cnn.project.process import run_stage, start

if __name__ == "__main__":
    start()  # before the slow imports, which read the environment

from pathlib import Path

import numpy as np

from fashion_cnn.project.files import write_tensors

IMAGES = [
    [[1, 2, 3, 4], [2, 3, 4, 5], [5, 6, 7, 8], [1, 3, 4, 5]],
    [[-1, 2, 3, -4], [2, -3, 4, 5], [-5, 6, -7, 8], [-1, -3, -4, -5]],
]
LABELS = [0, 1]


def main() -> None:
    images = np.array(IMAGES, np.float32)[:, None] / 8  # (2, 1, 4, 4), scaled into [-1, 1]
    labels = np.array(LABELS, np.float32)  # (2,), as binary cross-entropy takes them
    write_tensors(Path("data/toy.safetensors"), {"images": images, "labels": labels})


if __name__ == "__main__":
    run_stage(main)
