"""Evaluate a trained CNN on the test split: unmodified, shifted and rotated.

This is the only stage that reads the test split. Usage: python -m stages.evaluate_cnn original|augmented
"""

from fashion_cnn.project.catalog import named_cnn
from fashion_cnn.project.params import load_params
from fashion_cnn.project.process import run_stage, start

if __name__ == "__main__":
    start(named_cnn, load_params)  # before the slow imports, which read the environment

from fashion_cnn.data.fashion_mnist import TEST_IMAGES, TEST_LABELS, read_idx
from fashion_cnn.lesson import evaluation
from fashion_cnn.models.cnns import load_cnn
from fashion_cnn.models.device import prepare_torch
from fashion_cnn.models.inference import loss_and_accuracy, predict, to_device
from fashion_cnn.project.files import sha256_of, write_csv, write_json
from fashion_cnn.project.stage_records import StageRecords


def main() -> None:
    training = named_cnn()
    params = load_params().evaluate_cnn
    records = StageRecords()
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
    found = evaluation.mistakes(images, labels, logits, params.mistakes)
    mistakes = {"test_mistakes": int((predictions != labels).sum()), **found}

    per_class = training.evaluation_results.with_name(f"{training.images}_per_class.csv")
    paths = [training.evaluated, training.mistakes, per_class, training.confusion]
    metrics = write_json(training.evaluated, metrics | moved) | write_json(training.mistakes, mistakes)
    write_csv(per_class, evaluation.per_class(labels, predictions))
    write_csv(training.confusion, evaluation.confusion(labels, predictions))
    records.report("evaluate_cnn", training, sha256_of(training.weights), metrics, paths)
    records.close()


if __name__ == "__main__":
    run_stage(main)
