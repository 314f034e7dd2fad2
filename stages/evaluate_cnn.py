"""Evaluate a trained CNN on the test split, as it is, shifted and rotated.

The only stage that reads the test split. Usage: python stages/evaluate_cnn.py original|augmented
"""

from lib import evaluation
from lib.fashion_mnist import TEST_IMAGES, TEST_LABELS, read_idx
from lib.inference import loss_and_accuracy, predict, to_device
from lib.models.cnns import load_cnn
from lib.models.device import prepare_torch
from lib.params import load_params
from lib.reporting.outbox import Outbox
from lib.stage.files import sha256_of, write_csv, write_json
from lib.stage.process import run_stage
from lib.trainings import named_cnn


def main() -> None:
    training = named_cnn()
    params = load_params("evaluate_cnn").evaluate_cnn
    outbox = Outbox()
    device = prepare_torch(params.device)
    images, labels = read_idx(TEST_IMAGES), read_idx(TEST_LABELS)  # (10000, 28, 28), (10000,)
    model = to_device(load_cnn(training.weights), device)

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

    results = training.evaluation_results
    ends = (".json", "_mistakes.json", "_per_class.csv", "_confusion.csv")
    paths = [results.with_name(results.name + end) for end in ends]
    metrics = write_json(paths[0], metrics | moved) | write_json(paths[1], mistakes)
    write_csv(paths[2], evaluation.per_class(labels, predictions))
    write_csv(paths[3], evaluation.confusion(labels, predictions))
    outbox.report("evaluate_cnn", training, sha256_of(training.weights), metrics, paths)
    outbox.close()


if __name__ == "__main__":
    run_stage(main)
