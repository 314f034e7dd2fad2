"""The three trainings: their names, their files, and the later stages that report on them."""

import sys
from dataclasses import dataclass
from pathlib import Path

from fashion_cnn.project.errors import StageError

METRICS = Path("metrics")
RUN_ID = "[0-9a-f]{32}"  # regular expression for the id of an MLflow run


@dataclass(frozen=True)
class Training:
    """One training: one stage of dvc.yaml, one run of MLflow."""

    stage: str  # as dvc.yaml names it
    images: str  # its training images: toy, original or augmented
    weights: Path
    results: Path  # without suffix
    evaluation: str  # the stage that checks or evaluates its weights
    evaluation_results: Path  # without suffix
    figures: tuple[str, ...]  # the figures in metrics/figures/ about it

    @property
    def curve(self) -> Path:
        """The CSV with one row of metrics per epoch."""
        return self.results.with_suffix(".csv")

    @property
    def metrics(self) -> Path:
        """The JSON with the last epoch's metrics and the SHA-256 of the weights."""
        return self.results.with_suffix(".json")

    @property
    def evaluated(self) -> Path:
        """The JSON with the results of its evaluation."""
        return self.evaluation_results.with_suffix(".json")

    @property
    def confusion(self) -> Path:
        """The label and the prediction of each test image; like `mistakes`, only for a CNN."""
        return self.evaluation_results.with_name(f"{self.images}_confusion.csv")

    @property
    def mistakes(self) -> Path:
        """The most confident mistakes."""
        return self.evaluation_results.with_name(f"{self.images}_mistakes.json")

    @property
    def section(self) -> str:
        """Its section of params.yaml."""
        return self.stage.partition("@")[0]

    @property
    def outputs(self) -> tuple[Path, Path, Path]:
        """The files that the training writes."""
        return self.weights, self.curve, self.metrics


def _cnn(images: str) -> Training:
    return Training(
        stage=f"train_cnn@{images}",
        images=images,
        weights=Path(f"models/cnn_{images}.safetensors"),
        results=METRICS / "train_cnn" / images,
        evaluation=f"evaluate_cnn@{images}",
        evaluation_results=METRICS / "evaluate_cnn" / images,
        figures=("training_curves", "robustness", "confusion", "mistakes", "augmentation"),
    )


TOY = Training(
    stage="train_toy_cnn",
    images="toy",
    weights=Path("models/toy_cnn.safetensors"),
    results=METRICS / "train_toy_cnn",
    evaluation="verify_manual_conv",
    evaluation_results=METRICS / "verify_manual_conv",
    figures=("toy_loss",),
)
TOY_HISTORY = Path("models/toy_cnn_history.csv")  # the parameters at selected epochs
CNNS = {images: _cnn(images) for images in ("original", "augmented")}
DEFAULT_CNN = CNNS["augmented"]  # used unless another is named
TRAININGS = {training.stage: training for training in (TOY, *CNNS.values())}


def named_cnn() -> Training:
    """The training that the command line names by its images. Raises StageError for anything else."""
    if len(sys.argv) != 2 or sys.argv[1] not in CNNS:
        given = " ".join(sys.argv[1:]) or "nothing"
        raise StageError(f"argument is {given}, expected one of {', '.join(CNNS)}")
    return CNNS[sys.argv[1]]
