"""Evaluate a trained CNN on the test split, as it is, shifted and rotated.

The only stage that reads the test split. Usage: python stages/evaluate_cnn.py original|augmented
"""

from pathlib import Path

from lib import evaluation
from lib.arguments import images_argument
from lib.errors import run_stage
from lib.files import sha256_of, write_csv, write_json
from lib.idx import TEST_IMAGES, TEST_LABELS, read_idx
from lib.inference import loss_and_accuracy, predict, to_device
from lib.models import build_cnn, load_weights
from lib.outbox import Outbox
from lib.params import load_params
from lib.runtime import prepare_torch


def main() -> None:
    name = images_argument()
    params = load_params("evaluate_cnn").evaluate_cnn
    outbox = Outbox()
    device = prepare_torch(params.device, params.threads, params.numerics)
    images, labels = read_idx(TEST_IMAGES), read_idx(TEST_LABELS)  # (10000, 28, 28), (10000,)
    weights = Path(f"models/cnn_{name}.safetensors")
    model = to_device(load_weights(build_cnn(), weights), device)

    logits = predict(model, images, device)
    predictions = logits.argmax(1).numpy()
    loss, accuracy = loss_and_accuracy(logits, labels)
    n = params.robustness_images
    moved = evaluation.robustness(model, images[:n], labels[:n], device)
    metrics = {
        "test_loss": loss,
        "test_accuracy": accuracy,
        "test_accuracy_shift_3px": evaluation.mean_accuracy(
            moved["shifts"], "pixels", 3, "shift_x", "shift_y"
        ),
        "test_accuracy_rotation_15deg": evaluation.mean_accuracy(
            moved["rotations"], "degrees", 15, "rotation"
        ),
    }
    mistakes = {
        "test_mistakes": int((predictions != labels).sum()),
        "surest": evaluation.mistakes(images, labels, logits, params.mistakes),
    }

    stem = f"metrics/evaluate_cnn/{name}"
    paths = [Path(stem + end) for end in (".json", "_mistakes.json", "_per_class.csv", "_confusion.csv")]
    metrics = write_json(paths[0], metrics | moved) | write_json(paths[1], mistakes)
    write_csv(paths[2], evaluation.per_class(labels, predictions))
    write_csv(paths[3], evaluation.confusion(labels, predictions))
    outbox.report("evaluate_cnn", f"train_cnn@{name}", sha256_of(weights), metrics, paths)
    outbox.close()


if __name__ == "__main__":
    run_stage(main)
