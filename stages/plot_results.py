"""Draw the figures from metrics, curves and train images: metrics/figures/*.png."""

from pathlib import Path

from lib import figures
from lib.arguments import IMAGES
from lib.copies import load_copies
from lib.errors import run_stage
from lib.files import read_csv, read_json
from lib.idx import TRAIN_IMAGES, read_idx
from lib.params import load_params
from lib.tracking import attach, require_store

METRICS = Path("metrics")
FIGURES = METRICS / "figures"
EXAMPLES = 8  # images shown with their copies


def main() -> None:
    params = load_params("plot_results", "tracking")
    require_store(params.tracking.if_unreachable)

    evaluations = METRICS / "evaluate_cnn"
    confusion = {name: read_csv(evaluations / f"{name}_confusion.csv") for name in IMAGES}
    mistakes = {name: read_json(evaluations / f"{name}_mistakes.json")["surest"] for name in IMAGES}
    moved = {name: read_json(evaluations / f"{name}.json") for name in IMAGES}
    copies, labels, _ = load_copies()
    variants = [images[:EXAMPLES] for images in (read_idx(TRAIN_IMAGES), *copies)]
    curves = {name: read_csv(METRICS / "train_cnn" / f"{name}.csv") for name in IMAGES}
    toy = {"toy_loss": figures.toy_loss(read_csv(METRICS / "train_toy_cnn.csv"))}
    cnn = {
        "training_curves": figures.training_curves(curves),
        "robustness": figures.robustness(moved),
        "confusion": figures.confusion(confusion),
        "mistakes": figures.mistakes(mistakes),
        "augmentation": figures.augmentation(variants, labels[:EXAMPLES]),
    }
    for name, figure in (toy | cnn).items():
        figures.save(figure, FIGURES / f"{name}.png", params.plot_results.dpi)

    # Each training's figures go to its own run; those of both CNNs together go to both.
    trainings = [("train_toy_cnn", METRICS / "train_toy_cnn.json", toy)]
    trainings += [(f"train_cnn@{name}", METRICS / "train_cnn" / f"{name}.json", cnn) for name in IMAGES]
    for training, metrics, drawn in trainings:
        [weights_sha256] = read_json(metrics)["weights_sha256"]
        paths = [FIGURES / f"{name}.png" for name in drawn]
        attach("plot_results", training, weights_sha256, artifacts=paths)


if __name__ == "__main__":
    run_stage(main)
