"""Train the CNN on Fashion-MNIST: models/cnn_<images>.safetensors.

Usage: python -m stages.train_cnn original|augmented
"""

from fashion_cnn.project.catalog import named_cnn
from fashion_cnn.project.params import leaves, load_params
from fashion_cnn.project.process import run_stage, start

if __name__ == "__main__":
    start(named_cnn, load_params)  # before the slow imports, which read the environment

from fashion_cnn.models.cnns import CNN_SHAPE, build_cnn, fresh, save_weights, summarize
from fashion_cnn.models.device import prepare_torch
from fashion_cnn.project.files import write_csv, write_json
from fashion_cnn.project.provenance import digest, result_key
from fashion_cnn.project.stage_records import open_run
from fashion_cnn.training.checkpoints import exclusive_checkpoint
from fashion_cnn.training.loop import train_cnn
from fashion_cnn.training.train_data import load_train_data


def main() -> None:
    training = named_cnn()
    params = load_params()
    how = params.train_cnn
    device = prepare_torch(how.device)
    data = load_train_data(training.images, params.split.val_size, params.split.train_size, params.split.seed)

    # Include the params that made the copies, so that runs on different copies can be compared.
    settings = leaves(params, "split", "train_cnn") | data.made_by
    data_digest = digest(data.pool, data.labels, data.train, data.val)
    key = resumed = result_key(training.stage, settings, data_digest)
    if how.schedule == "constant":  # then a longer training begins with the epochs of a shorter one
        resumed = result_key(training.stage, settings | {"train_cnn.epochs": None}, data_digest)
    with (
        exclusive_checkpoint(resumed, training.weights, how.epochs) as checkpoint,
        open_run(training, settings, key) as run,
    ):
        run.log_epochs(checkpoint.rows)
        sizes = {"train_images": len(data.train), "val_images": len(data.val), "variants": len(data.pool)}
        run.log_dataset(training.images, data_digest, "data", sizes)
        model = fresh(lambda: build_cnn(how.model), how.seed)
        rows = train_cnn(model, data, how, device, checkpoint, run.log_epoch)
        model.views = how.tta_views  # only now: six would make each epoch's validation six times as long
        weights_sha256 = save_weights(model, training.weights)
        write_csv(training.curve, rows)
        last = {name: value for name, value in rows[-1].items() if name != "epoch"}
        # In a list, so that `dvc metrics show` leaves the digest out of its table.
        write_json(training.metrics, {**last, "weights_sha256": [weights_sha256]})
        run.log_model(training.weights, weights_sha256, summarize(model, CNN_SHAPE))


if __name__ == "__main__":
    run_stage(main)
