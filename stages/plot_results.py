"""Draw the figures from metrics, curves and train images: metrics/figures/*.png."""

from fashion_cnn.project.params import load_params
from fashion_cnn.project.process import run_stage, start

if __name__ == "__main__":
    start(load_params)  # before the slow imports, which read the environment

from fashion_cnn.data.copies import load_copies
from fashion_cnn.data.fashion_mnist import TRAIN_IMAGES, read_idx
from fashion_cnn.lesson import figures, results
from fashion_cnn.lesson.results import read_rows, read_table, read_weights_sha256
from fashion_cnn.project.catalog import CNNS, METRICS, TOY, TRAININGS
from fashion_cnn.project.stage_records import StageRecords

FIGURES = METRICS / "figures"
EXAMPLES = 8  # images shown with their copies


def main() -> None:
    params = load_params().plot_results
    records = StageRecords()

    toy_curve = read_table(TOY.curve, results.TOY_CURVE)
    curves, confusion, moved, mistakes = {}, {}, {}, {}
    for name, training in CNNS.items():
        curves[name] = read_table(training.curve, results.CURVE)
        confusion[name] = read_table(training.confusion, results.CONFUSION)
        moved[name] = {
            "shifts": read_rows(training.evaluated, "shifts", results.SHIFT_COLUMNS),
            "rotations": read_rows(training.evaluated, "rotations", results.ROTATION_COLUMNS),
        }
        mistakes[name] = read_rows(training.mistakes, "surest", results.MISTAKES)
    copies, labels, _ = load_copies()
    variants = [images[:EXAMPLES] for images in (read_idx(TRAIN_IMAGES), *copies)]
    drawn = {
        "toy_loss": figures.toy_loss(toy_curve),
        "training_curves": figures.training_curves(curves),
        "robustness": figures.robustness(moved),
        "confusion": figures.confusion(confusion),
        "mistakes": figures.mistakes(mistakes),
        "augmentation": figures.augmentation(variants, labels[:EXAMPLES]),
    }
    for name, figure in drawn.items():
        figures.save(figure, FIGURES / f"{name}.png", params.dpi)

    # Each training's figures go to its own run; those of both CNNs together go to both.
    for training in TRAININGS.values():
        paths = [FIGURES / f"{name}.png" for name in training.figures]
        records.report("plot_results", training, read_weights_sha256(training.metrics), {}, paths)
    records.close()


if __name__ == "__main__":
    run_stage(main)
