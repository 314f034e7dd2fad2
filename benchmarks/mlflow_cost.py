"""Log one training without training; print the seconds that MLflow takes."""

import os
import time
from pathlib import Path

import numpy as np

from fashion_cnn.models.cnns import CNN_SHAPE, build_cnn, fresh, save_weights, summarize
from fashion_cnn.project.catalog import CNNS
from fashion_cnn.project.params import leaves, load_params
from fashion_cnn.project.stage_records import open_run

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Do what train_cnn does around its epochs."""
    params = leaves(load_params(ROOT / "params.yaml"), "split", "train_cnn")
    model, weights = fresh(build_cnn, 0), Path(os.environ["FASHION_CNN_ROOT"]) / "benchmark.safetensors"
    weights_sha256 = save_weights(model, weights)
    began = time.perf_counter()
    with open_run(CNNS["original"], params, "0" * 64) as run:
        run.log_dataset("original", "0" * 32, "data", {})
        for epoch in range(1, 6):
            run.log_epoch({"epoch": epoch, "train_loss": 1.0, "val_loss": 1.0}, 1.0)
        example = np.zeros((2, *CNN_SHAPE), np.float32)
        run.log_model(weights, weights_sha256, summarize(model, CNN_SHAPE), example)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main()
