"""Train and evaluate both CNNs with several seeds, and write every run to benchmarks/seeds.csv.

Usage: make seeds, or python -m fashion_cnn.commands.seeds [--seeds 5]. Each seed is a DVC experiment of its
own, seed-0, seed-1, …, in a copy of the repository; what DVC has cached does not run again. The command
prints the README's table: mean ± standard deviation.
"""

import argparse
import json
import statistics
from pathlib import Path

import dvc.api

from fashion_cnn.commands.dvc_state import run_dvc
from fashion_cnn.project.catalog import CNNS
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import write_csv
from fashion_cnn.project.process import run_stage

RUNS = Path(__file__).resolve().parents[2] / "benchmarks/seeds.csv"
ROWS = {
    "unmodified": "test_accuracy",
    "shifted by ±3 px": "test_accuracy_shift_3px",
    "rotated by ±15°": "test_accuracy_rotation_15deg",
}


def main() -> None:
    """Run the experiments, write their results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; train_cnn.seed counts from 0")
    seeds = range(parser.parse_args().seeds)
    if not seeds:
        raise StageError(f"--seeds is {seeds.stop}, expected 1 or more")
    for seed in seeds:
        run_experiment(seed)
    runs = write_csv(RUNS, [results(seed, images) for seed in seeds for images in CNNS])
    print("\n".join(table(runs)))


def run_experiment(seed: int) -> None:
    """Run the pipeline with train_cnn.seed, in a copy. Raises StageError if it fails."""
    name = f"seed-{seed}"
    # Remove an earlier one of that name, because `dvc exp run --force` would rerun every stage.
    run_dvc("exp", "remove", "--quiet", name, capture_output=True)
    if run_dvc("exp", "run", "--temp", "--name", name, "-S", f"train_cnn.seed={seed}").returncode:
        raise StageError(f"experiment seed-{seed} failed, expected it to finish; its output is above")


def results(seed: int, images: str) -> dict:
    """One row: the seed, the training images, and the last val and all test metrics."""
    training = CNNS[images]
    metrics: dict = {}
    for file in (training.metrics, training.evaluated):
        metrics |= json.loads(dvc.api.read(str(file), rev=f"seed-{seed}"))
    [weights_sha256] = metrics["weights_sha256"]
    numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
    return {"seed": seed, "images": images, **numbers, "weights_sha256": weights_sha256}


def table(rows: list[dict]) -> list[str]:
    """The README's table of the rows of seeds.csv, in Markdown."""
    lines = ["| test images | trained on original | trained on augmented |", "|---|---|---|"]
    for words, metric in ROWS.items():
        cells = [spread([100 * row[metric] for row in rows if row["images"] == images]) for images in CNNS]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation of percentages."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f} %"


if __name__ == "__main__":
    run_stage(main)
