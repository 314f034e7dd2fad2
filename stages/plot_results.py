"""Draw the figures from metrics, curves and train images: metrics/figures/*.png."""

from pathlib import Path

from lib import figures, results
from lib.arguments import IMAGES
from lib.copies import load_copies
from lib.errors import run_stage
from lib.idx import TRAIN_IMAGES, read_idx
from lib.outbox import Outbox
from lib.params import load_params
from lib.results import read_rows, read_table, read_weights_sha256

METRICS = Path("metrics")
FIGURES = METRICS / "figures"
EXAMPLES = 8  # images shown with their copies


def main() -> None:
    params = load_params("plot_results").plot_results
    outbox = Outbox()

    toy_curve = read_table(METRICS / "train_toy_cnn.csv", results.TOY_CURVE)
    curves, confusion, moved, mistakes = {}, {}, {}, {}
    for name in IMAGES:
        evaluation = METRICS / f"evaluate_cnn/{name}.json"
        curves[name] = read_table(METRICS / f"train_cnn/{name}.csv", results.CURVE)
        confusion[name] = read_table(evaluation.with_name(f"{name}_confusion.csv"), results.CONFUSION)
        moved[name] = {
            "shifts": read_rows(evaluation, "shifts", results.SHIFTS),
            "rotations": read_rows(evaluation, "rotations", results.ROTATIONS),
        }
        surest = evaluation.with_name(f"{name}_mistakes.json")
        mistakes[name] = read_rows(surest, "surest", results.MISTAKES)
    copies, labels, _ = load_copies()
    variants = [images[:EXAMPLES] for images in (read_idx(TRAIN_IMAGES), *copies)]
    toy = {"toy_loss": figures.toy_loss(toy_curve)}
    cnn = {
        "training_curves": figures.training_curves(curves),
        "robustness": figures.robustness(moved),
        "confusion": figures.confusion(confusion),
        "mistakes": figures.mistakes(mistakes),
        "augmentation": figures.augmentation(variants, labels[:EXAMPLES]),
    }
    for name, figure in (toy | cnn).items():
        figures.save(figure, FIGURES / f"{name}.png", params.dpi)

    # Each training's figures go to its own run; those of both CNNs together go to both.
    trainings = [("train_toy_cnn", METRICS / "train_toy_cnn.json", toy)]
    trainings += [(f"train_cnn@{name}", METRICS / "train_cnn" / f"{name}.json", cnn) for name in IMAGES]
    for training, metrics, drawn in trainings:
        paths = [FIGURES / f"{name}.png" for name in drawn]
        outbox.report("plot_results", training, read_weights_sha256(metrics), {}, paths)
    outbox.close()


if __name__ == "__main__":
    run_stage(main)
