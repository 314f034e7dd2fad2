"""What each idea gains: accuracy against time, relative to the lesson's own loop.

Usage, after `make repro`: make ladder, or python benchmarks/ladder.py [RUNG …] [--seeds 5]. Each run
executes the stages in a folder of its own: train_cnn.py, timed as a whole with imports and validation, and
evaluate_cnn.py. Some steps of the lesson's own loop before and after each training show how fast the machine
is at that time. A run is added to benchmarks/ladder.csv when it ends; those already there are not rerun.
Finally, the table is printed and docs/pictures/ladder.png drawn.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import ROOT
from ruamel.yaml import YAML

from fashion_cnn.commands.recipe import read_recipe
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import write_csv
from fashion_cnn.project.params import as_yaml, read_yaml
from fashion_cnn.project.process import run_stage
from fashion_cnn.tracking.runs import COLORS

RUNS = ROOT / "benchmarks/ladder.csv"
PICTURE = ROOT / "docs/pictures/ladder.png"
OWN_LOOP = "lesson's own loop"
YARDSTICK = 200  # steps of it before and after each training
EPOCHS = 6  # until `easy images`, whose ten (those of fast) take a seventh more time
# Each rung adds one idea to the one before, with the values of the recipe fast, which adds the last: views.
STEPS = {
    "residual": ("model",),
    "one-cycle": ("batch_size", "schedule", "learning_rate", "weight_decay"),
    "muon": ("optimizer",),
    "flips": ("flips",),
    "shifts": ("shift",),
    "label smoothing": ("label_smoothing",),
    "easy images": ("prune_easy", "epochs"),
}
RECIPES = ("fast", "long")
AUGMENTED = ("steady",)  # recipes for the CNN that also trains on the copies
HEADER = (
    "rung", "params", "seed", "epochs", "seconds", "own_loop_seconds", "val_accuracy", "test_accuracy",
    "test_accuracy_shift_3px", "test_accuracy_rotation_15deg", "shifts_up_to_4px", "rotations_up_to_15deg",
    "weights_sha256",
)  # fmt: skip


def main() -> None:
    """Run what is missing, then print the table and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = rungs()
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help=f"one of: {', '.join(known)}; default: all")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds: train_cnn.seed from 0")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.rungs if name not in known]:
        raise StageError(f"{unknown[0]}: no rung of this name, expected one of {', '.join(known)}")
    for seed in range(arguments.seeds):
        for name in arguments.rungs or known:
            if not any(is_of(row, name, known[name], seed) for row in read_runs()):
                row = run(name, known[name], seed)  # takes hours, in which the file may change
                write_csv(RUNS, sorted([*read_runs(), row], key=lambda row: place_of(row, [*known])))
    rows = read_runs()
    print("\n".join(table(rows)))
    draw(rows)


def place_of(row: dict, names: list[str]) -> tuple[int, int]:
    """Where a row stands in the file: by rung, then by seed; a rung that no longer exists comes last."""
    return names.index(row["rung"]) if row["rung"] in names else len(names), int(row["seed"])


def is_of(row: dict, name: str, settings: dict, seed: int) -> bool:
    """Whether a row is of this rung and seed. Raises StageError if the rung had other params then."""
    if row["rung"] != name or int(row["seed"]) != seed:
        return False
    if row["params"] != in_words(settings):
        raise StageError(
            f"{RUNS.name}: {name} ran with {row['params']}, expected {in_words(settings)}; delete its rows"
        )
    return True


def in_words(settings: dict) -> str:
    """Params in one line."""
    return " ".join(f"{name}={as_yaml(value)}" for name, value in settings.items())


def rungs() -> dict[str, dict]:
    """Every rung's params, where they differ from params.yaml, in order."""
    found, so_far, fast = {OWN_LOOP: {}}, {"train_cnn.epochs": EPOCHS}, read_recipe("fast")
    for name, keys in STEPS.items():
        so_far = so_far | {f"train_cnn.{key}": fast[f"train_cnn.{key}"] for key in keys}
        found[name] = so_far
    return found | {name: read_recipe(name) for name in (*RECIPES, *AUGMENTED)}


def run(name: str, settings: dict, seed: int) -> dict:
    """Train and evaluate once; returns the row."""
    images = "augmented" if name in AUGMENTED else "original"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        params = read_yaml(ROOT / "params.yaml")
        for path, value in {**settings, "train_cnn.seed": seed}.items():
            section, key = path.split(".")
            params[section][key] = value
        with (folder / "params.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(params, file)
        (folder / "data").mkdir()
        (folder / "data/FashionMNIST").symlink_to(ROOT / "data/FashionMNIST")
        if any(path.startswith("augment_images.") for path in settings):
            stage(folder, "augment_images")
        else:
            (folder / "data/augmented").symlink_to(ROOT / "data/augmented")
        print(f"{name}, seed {seed}", flush=True)
        if name == OWN_LOOP:
            seconds = own_loop_seconds = own_loop(folder, seed)
        else:
            before = own_loop(folder, 0, YARDSTICK)
            began = time.perf_counter()
            stage(folder, "train_cnn", images)
            seconds = time.perf_counter() - began
            own_loop_seconds = (before + own_loop(folder, 0, YARDSTICK)) / 2
        stage(folder, "evaluate_cnn", images)
        return row_of(folder, name, settings, seed, (seconds, own_loop_seconds), images)


def own_loop(folder: Path, *numbers: int) -> float:
    """Seconds of the lesson's five epochs by its own loop, without imports and validation.

    `numbers`: the seed, and the number of steps to estimate from, if the epochs do not run.
    """
    command = [sys.executable, str(ROOT / "benchmarks/lesson.py"), *map(str, numbers)]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def stage(folder: Path, script: str, *arguments: str) -> None:
    """Run a stage in `folder`; its MLflow store and checkpoints stay there, too."""
    command = [sys.executable, str(ROOT / f"stages/{script}.py"), *arguments]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    subprocess.run(command, cwd=folder, env=settings | {"FASHION_CNN_ROOT": str(folder)}, check=True)


def row_of(
    folder: Path, name: str, settings: dict, seed: int, times: tuple[float, float], images: str
) -> dict:
    """What the stages wrote about a run, and its seconds with those of the lesson's own loop."""
    evaluation = json.loads((folder / f"metrics/evaluate_cnn/{images}.json").read_text())
    metrics = folder / f"metrics/train_cnn/{images}.json"
    training = json.loads(metrics.read_text()) if metrics.exists() else {}  # none of the lesson's own loop
    curve = folder / f"metrics/train_cnn/{images}.csv"
    row = {
        "rung": name,
        "params": in_words(settings),
        "seed": seed,
        "epochs": len(curve.read_text().splitlines()) - 1 if curve.exists() else 5,
        "seconds": round(times[0], 1),
        "own_loop_seconds": round(times[1], 1),
        "val_accuracy": training.get("val_accuracy", ""),
        **{key: evaluation[key] for key in HEADER if key in evaluation},
        "shifts_up_to_4px": mean(evaluation["shifts"], "pixels", 4),
        "rotations_up_to_15deg": mean(evaluation["rotations"], "degrees", 15),
        "weights_sha256": training.get("weights_sha256", [""])[0],
    }
    return {key: row[key] for key in HEADER}


def mean(rows: list[dict], amount: str, most: int) -> float:
    """Mean accuracy over the movements of 1 to `most`, either way, along each axis."""
    chosen = [row for row in rows if 0 < abs(row[amount]) <= most]
    return statistics.mean(row[name] for row in chosen for name in row if name not in (amount, "n"))


def read_runs() -> list[dict]:
    """The rows of ladder.csv."""
    if not RUNS.exists():
        return []
    with RUNS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict]) -> list[str]:
    """The table of docs/recipes.md, in Markdown."""
    lines = [
        "| rung | epochs | time | test accuracy | shifted up to ±4 px | rotated up to ±15° | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["rung"] for row in rows):
        mine = [row for row in rows if row["rung"] == name]
        accuracies = ("test_accuracy", "shifts_up_to_4px", "rotations_up_to_15deg")
        lasted = f"{statistics.median(share(row) for row in mine):.2f}"
        cells = [spread([100 * float(row[key]) for row in mine]) for key in accuracies]
        lines.append(f"| {name} | {mine[0]['epochs']} | {lasted} | {' | '.join(cells)} | {len(mine)} |")
    return lines


def share(row: dict) -> float:
    """A run's time as a share of the lesson's own loop at the machine's speed at that time."""
    return float(row["seconds"]) / float(row["own_loop_seconds"])


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation of percentages."""
    if len(values) == 1:
        return f"{values[0]:.2f} %"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %"


def draw(rows: list[dict]) -> None:
    """Accuracy against the share of the lesson's time: each run a point, each rung a dash and its name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    blue, orange, *_ = COLORS
    left = min(share(row) for row in rows) / 2  # a column of labels, because the steps are close
    free = 0.0  # the lowest place for the next label
    for name in dict.fromkeys(row["rung"] for row in rows):
        mine = [row for row in rows if row["rung"] == name]
        shares = [share(row) for row in mine]
        accuracy = [100 * float(row["test_accuracy"]) for row in mine]
        color = blue if name in STEPS else "0.3" if name == OWN_LOOP else orange
        axes.scatter(shares, accuracy, s=14, alpha=0.5, color=color)
        middle = statistics.median(shares), statistics.mean(accuracy)
        axes.scatter(*middle, s=90, marker="_", color=color)
        style = {"color": color, "fontsize": 9, "va": "center"}
        if name in STEPS:
            free = max(middle[1], free + 0.2)
            line = {"arrowstyle": "-", "color": color, "lw": 0.5, "alpha": 0.5}
            axes.annotate(f"+ {name}", middle, xytext=(1.03 * left, free), arrowprops=line, **style)
        else:
            axes.annotate(name, middle, xytext=(9, 0), textcoords="offset points", **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("training time on 2 cores, 1 = five epochs of the lesson's own loop")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Accuracy against time: each point is a run, each dash a rung", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15, y=0.12)
    axes.set_xlim(left=left)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    run_stage(main)
