"""Measure what trials cost a team, for docs/team.md: the steps around a training, and what the server takes.

Usage, after `make repro` and `make setup-team`: python benchmarks/team.py. If MLFLOW_TRACKING_URI names a
server, as deploy/compose.yaml starts one, it is measured, too; it keeps the runs that are made for this.
"""

import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

import trial

STAGE, TRIALS, SECONDS = "train_cnn@original", 5, 10
WRITERS = (1, 4, 16, 64)
AUTHOR = ("-c", "user.name=team", "-c", "user.email=team@localhost")
# As short as a training can be, so that what remains is the cost of a trial.
SETTINGS = {"train_cnn.epochs": "1", "split.train_size": "1000"}


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as folder:
        measure_trials(Path(folder))
    if "MLFLOW_TRACKING_URI" in os.environ:
        measure_server()


def measure_trials(folder: Path) -> None:
    """Seconds of each step of a trial: of the first on a machine, and the median of those that follow."""
    first, origin, remote = folder / "first", folder / "origin.git", folder / "remote"
    dvc = (*trial.DVC, "remote", "add", "--default", "team", remote)
    trial.run(folder, "git", "clone", "--quiet", ROOT, first)
    trial.run(first, *dvc)
    trial.run(first, "git", *AUTHOR, "commit", "--quiet", "--all", "--message", "a remote")
    trial.run(first, "git", "clone", "--quiet", "--bare", ".", origin)
    trial.run(first, *trial.DVC, "cache", "dir", "--local", ROOT / ".dvc/cache")
    trial.run(first, *trial.DVC, "push", "--with-deps", STAGE)
    commit = trial.run(first, "git", "rev-parse", "HEAD").strip()
    os.environ["FASHION_CNN_TRIALS"] = str(folder / "node")

    seconds: list[Counter] = []
    really = trial.run

    def timed(where: Path, *command: str | Path, **more) -> str:
        began = time.perf_counter()
        printed = really(where, *command, **more)
        seconds[-1][step_of(command)] += time.perf_counter() - began
        return printed

    trial.run = timed
    sizes = []
    for number in range(TRIALS):
        seconds.append(Counter())
        began = time.perf_counter()
        settings = SETTINGS | {"train_cnn.seed": str(number + 1)}
        trial.run_trial(str(origin), commit, f"trial-{number}", STAGE, settings)
        seconds[-1]["all"] = time.perf_counter() - began
        sizes.append((size_of(remote), size_of(origin)))
    trial.run = really

    print("| step | first trial on a machine, s | later ones, median s |\n|---|---|---|")
    for step in seconds[0]:
        later = statistics.median(one[step] for one in seconds[1:])
        print(f"| {step} | {seconds[0][step]:.1f} | {later:.1f} |")
    print(f"bytes that a trial adds, as files (median of {TRIALS - 1}):")
    for place, grown in zip(("DVC's remote", "origin"), zip(*sizes, strict=True), strict=True):
        print(f"{statistics.median(after - before for before, after in pairwise(grown)):,.0f} in {place}")


def step_of(command: tuple) -> str:
    """The program of a command, and what it is to do."""
    words = [str(word) for word in command]
    if words[: len(trial.DVC)] == list(trial.DVC):
        words = ["dvc", *words[len(trial.DVC) :]]
    return " ".join(words[: 3 if words[1] in ("exp", "cache", "config") else 2])


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure_server() -> None:
    """Requests a second from n writers at once, each of which logs an epoch's metrics again and again."""
    import requests
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.create_experiment(f"load-{time.time_ns()}")
    address = f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/runs/log-batch"
    who = tuple(os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))

    def write(until: float) -> list[float]:
        run, took = client.create_run(experiment).info.run_id, []
        with requests.Session() as session:
            session.auth = who
            while (began := time.perf_counter()) < until:
                metrics = [
                    {"key": f"metric_{number}", "value": 0.5, "timestamp": len(took), "step": len(took)}
                    for number in range(5)
                ]
                session.post(address, json={"run_id": run, "metrics": metrics}).raise_for_status()
                took.append(time.perf_counter() - began)
        return took

    print("\n| writers | requests a second | median, ms | slowest of a hundred, ms |\n|---|---|---|---|")
    for writers in WRITERS:
        with ThreadPoolExecutor(writers) as pool:
            until = time.perf_counter() + SECONDS
            took = sorted(chain.from_iterable(pool.map(write, [until] * writers)))
        slow = took[int(len(took) * 0.99)]
        middle = statistics.median(took)
        print(f"| {writers} | {len(took) / SECONDS:.0f} | {1000 * middle:.0f} | {1000 * slow:.0f} |")


if __name__ == "__main__":
    main()
