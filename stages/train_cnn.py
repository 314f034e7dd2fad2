"""Train the CNN on Fashion-MNIST: models/cnn_<images>.safetensors.

Usage: python stages/train_cnn.py original|augmented
"""

from pathlib import Path

import numpy as np

from lib.arguments import images_argument
from lib.checkpoints import exclusive_checkpoint
from lib.copies import load_copies
from lib.errors import run_stage
from lib.files import sha256_of, write_csv, write_json
from lib.idx import TRAIN_IMAGES, TRAIN_LABELS, read_idx
from lib.lineage import digest, result_key
from lib.models import CNN_SHAPE, build_cnn, fresh, save_weights, summarize
from lib.outbox import training
from lib.params import leaves, load_params
from lib.runtime import prepare_torch
from lib.splits import split_indices
from lib.training import train_cnn


def main() -> None:
    images = images_argument()
    params = load_params("split", "train_cnn")
    device = prepare_torch(params.train_cnn.device, params.train_cnn.threads, params.train_cnn.numerics)
    pool, labels, made_by = load_pool(images)  # (variants, 60000, 28, 28), (60000,)
    train_index, val_index = split_indices(
        len(labels), params.split.val_size, params.split.train_size, params.split.seed
    )

    # The params that made the copies, too, so that runs on other copies can be compared.
    stage, settings = f"train_cnn@{images}", leaves(params) | made_by
    weights = Path(f"models/cnn_{images}.safetensors")
    data_digest = digest(pool, labels, train_index, val_index)
    key = result_key(stage, settings, data_digest)
    with exclusive_checkpoint(key, weights) as checkpoint, training(stage, settings, key) as run:
        run.log_epochs(checkpoint.rows)
        sizes = {"train_images": len(train_index), "val_images": len(val_index), "variants": len(pool)}
        run.log_dataset(images, data_digest, "data", sizes)
        model = fresh(build_cnn, params.train_cnn.seed)
        rows = train_cnn(
            model,
            pool,
            labels,
            train_index,
            val_index,
            epochs=params.train_cnn.epochs,
            batch_size=params.train_cnn.batch_size,
            learning_rate=params.train_cnn.learning_rate,
            seed=params.train_cnn.seed,
            device=device,
            checkpoint=checkpoint,
            on_epoch=run.log_epoch,
        )
        save_weights(model, weights)
        write_csv(Path(f"metrics/train_cnn/{images}.csv"), rows)
        last = {name: value for name, value in rows[-1].items() if name != "epoch"}
        # In a list, so that `dvc metrics show` leaves the digest out of its table.
        weights_sha256 = sha256_of(weights)
        write_json(Path(f"metrics/train_cnn/{images}.json"), {**last, "weights_sha256": [weights_sha256]})
        example = pool[0, :2, None].astype(np.float32) / 255  # (2, 1, 28, 28)
        run.log_model(weights, weights_sha256, summarize(model, CNN_SHAPE), example)


def load_pool(images: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """All variants of every train image, the original first, the labels, and the copies' params."""
    originals = read_idx(TRAIN_IMAGES)[None]
    if images == "original":
        return originals, read_idx(TRAIN_LABELS), {}
    copies, labels, made_by = load_copies()
    return np.concatenate([originals, *(copy[None] for copy in copies)]), labels, made_by


if __name__ == "__main__":
    run_stage(main)
