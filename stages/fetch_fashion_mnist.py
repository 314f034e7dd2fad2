"""Fetch Fashion-MNIST: four verified IDX files in data/FashionMNIST/raw/."""

from fashion_cnn.project.params import load_params
from fashion_cnn.project.process import run_stage, start

if __name__ == "__main__":
    start(load_params)  # before the slow imports, which read the environment

from fashion_cnn.data.fashion_mnist import RAW_DIR
from fashion_cnn.sources.fetch import fetch


def main() -> None:
    params = load_params().fetch
    fetch(params.sources, RAW_DIR)


if __name__ == "__main__":
    run_stage(main)
