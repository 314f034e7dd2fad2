"""Log one training without the training; print the seconds that MLflow takes."""

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))

import numpy as np

from lib.models import CNN_SHAPE, build_cnn, fresh, save_weights, summarize
from lib.params import leaves, load_params
from lib.tracking import training_run


def main() -> None:
    """Do what train_cnn does around its epochs."""
    params = leaves(load_params("split", "train_cnn", path=ROOT / "params.yaml"))
    model, weights = fresh(build_cnn, 0), Path(os.environ["DVC_ROOT"]) / "benchmark.safetensors"
    save_weights(model, weights)
    began = time.perf_counter()
    with training_run("benchmark", params) as run:
        run.log_dataset("original", "0" * 32, "data", {})
        for epoch in range(1, 6):
            run.log_epoch({"epoch": epoch, "train_loss": 1.0, "val_loss": 1.0}, 1.0)
        run.log_model(model, weights, summarize(model, CNN_SHAPE), np.zeros((2, *CNN_SHAPE), np.float32))
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main()
