"""Train the 12-parameter CNN on two 4×4 images: models/toy_cnn.safetensors, and its history."""

from fashion_cnn.project.params import leaves, load_params
from fashion_cnn.project.process import run_stage, start

if __name__ == "__main__":
    start(load_params)  # before the slow imports, which read the environment

from pathlib import Path

from fashion_cnn.lesson.toy import is_relu_dead, outputs, train_toy
from fashion_cnn.models.cnns import TOY_SHAPE, save_weights, summarize
from fashion_cnn.models.device import prepare_torch
from fashion_cnn.project.catalog import TOY, TOY_HISTORY
from fashion_cnn.project.files import read_tensors, write_csv, write_json
from fashion_cnn.project.provenance import digest, result_key
from fashion_cnn.project.stage_records import open_run

TENSORS = Path("data/toy.safetensors")


def main() -> None:
    params = load_params()
    prepare_torch("cpu", threads=1, fixed_order=False)
    toy = read_tensors(TENSORS, "images", "labels")  # images (2, 1, 4, 4), labels (2,)
    images, labels = toy["images"], toy["labels"]

    settings, data_digest = leaves(params, "train_toy_cnn"), digest(images, labels)
    key = result_key(TOY.stage, settings, data_digest)
    with open_run(TOY, settings, key) as run:
        run.log_dataset(TOY.images, data_digest, TENSORS, {"train_images": len(images)})
        model, losses, history = train_toy(
            images,
            labels,
            epochs=params.train_toy_cnn.epochs,
            learning_rate=params.train_toy_cnn.learning_rate,
            seed=params.train_toy_cnn.seed,
        )
        rows = [{"epoch": epoch, "train_loss": loss} for epoch, loss in enumerate(losses, start=1)]
        probabilities = outputs(model, images)
        metrics = {
            "train_loss": losses[-1],
            "output_image_0": probabilities[0],
            "output_image_1": probabilities[1],
            "dead_relu": int(is_relu_dead(model, images)),
        }
        if metrics["dead_relu"]:
            print(
                "dead ReLU: the convolution gives no positive value for either image, so no gradient "
                "reaches it and both outputs settle at 0.5; try another train_toy_cnn.seed"
            )
        print(f"outputs {probabilities[0]:.6f} and {probabilities[1]:.6f} for labels 0 and 1")

        weights_sha256 = save_weights(model, TOY.weights)
        run.log_epochs(write_csv(TOY.curve, rows))
        write_csv(TOY_HISTORY, history)
        # In a list, so that `dvc metrics show` leaves the digest out of its table.
        written = write_json(TOY.metrics, metrics | {"weights_sha256": [weights_sha256]})
        run.log_metrics({name: written[name] for name in metrics if name != "train_loss"})  # it is a curve
        run.log_model(TOY.weights, weights_sha256, summarize(model, TOY_SHAPE))


if __name__ == "__main__":
    run_stage(main)
