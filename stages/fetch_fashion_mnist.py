"""Fetch Fashion-MNIST: four verified IDX files in data/FashionMNIST/raw/."""

from lib.fashion_mnist import RAW_DIR
from lib.params import load_params
from lib.sources.fetch import fetch
from lib.stage.process import run_stage


def main() -> None:
    params = load_params("fetch")
    fetch(params.fetch.sources, RAW_DIR)


if __name__ == "__main__":
    run_stage(main)
