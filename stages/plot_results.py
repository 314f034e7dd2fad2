"""Draw the figures from metrics and curves: metrics/figures/*.png."""

from pathlib import Path

from lib import figures
from lib.arguments import IMAGES
from lib.errors import run_stage
from lib.files import read_csv, read_json
from lib.params import load_params
from lib.tracking import attach, require_store

METRICS = Path("metrics")
FIGURES = METRICS / "figures"


def main() -> None:
    params = load_params("plot_results", "tracking")
    require_store(params.tracking.if_unreachable)

    def evaluation_tables(table: str) -> dict:
        return {name: read_csv(METRICS / "evaluate_cnn" / f"{name}_{table}.csv") for name in IMAGES}

    curves = {name: read_csv(METRICS / "train_cnn" / f"{name}.csv") for name in IMAGES}
    toy = {"toy_loss": figures.toy_loss(read_csv(METRICS / "train_toy_cnn.csv"))}
    cnn = {
        "training_curves": figures.training_curves(curves),
        "robustness": figures.robustness(evaluation_tables("robustness")),
        "confusion": figures.confusion(evaluation_tables("confusion")),
        "mistakes": figures.mistakes(evaluation_tables("mistakes")),
        "augmentation": figures.augmentation(read_csv(METRICS / "augment_images.csv")),
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
