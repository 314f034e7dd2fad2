"""Measure what trials cost a team, for team/README.md: a training's overhead, and a server's throughput.

Usage, after `make repro` and `make setup-team`: python -m team.benchmark. If MLFLOW_TRACKING_URI names a
server such as deploy/compose.yaml starts, it is measured, too, with MLFLOW_TRACKING_USERNAME and …_PASSWORD;
it keeps the runs that this makes.
"""

import math
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fashion_cnn.tracking.store import address
from team import trial

ROOT = Path(__file__).resolve().parents[1]
STAGE, TRIALS = "train_cnn@original", 5
COUNTS = (1_000, 10_000)  # numbers of trials in origin
WRITERS, WARM_UP, SECONDS = (1, 4, 16, 64, 128), 5, 20
AUTHOR = ("-c", "user.name=team", "-c", "user.email=team@localhost")
# As short as a training can be, so that the rest is the cost of a trial.
SETTINGS = {"train_cnn.epochs": "1", "split.train_size": "1000"}


def main() -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        measure_trials(Path(folder))
        measure_search(Path(folder))
    if server := address("MLFLOW_TRACKING_URI"):
        measure_server(server.rstrip("/"))


def measure_trials(folder: Path) -> None:
    """Seconds of each step of a trial: of the first on a machine, and the median of the later ones."""
    first, origin, remote = folder / "first", folder / "origin.git", folder / "remote"
    dvc = (*trial.DVC, "remote", "add", "--force", "--default", "team", remote)
    trial.run(folder, "git", "clone", "--quiet", ROOT, first)
    trial.run(first, *dvc)
    trial.run(first, "git", *AUTHOR, "commit", "--quiet", "--all", "--message", "a remote")
    trial.run(first, "git", "clone", "--quiet", "--bare", ".", origin)
    trial.run(first, *trial.DVC, "cache", "dir", "--local", ROOT / ".dvc/cache")
    trial.run(first, *trial.DVC, "push", "--with-deps", STAGE)
    commit = trial.run(first, "git", "rev-parse", "HEAD").strip()
    os.environ["FASHION_CNN_TRIALS"] = str(folder / "node")

    seconds: list[dict[str, float]] = []  # of each trial, by step
    run = trial.run

    def timed(where: Path, *command: str | Path, **more) -> str:
        began = time.perf_counter()
        printed = run(where, *command, **more)
        seconds[-1][step_of(command)] += time.perf_counter() - began
        return printed

    sizes = []
    with patch.object(trial, "run", timed):
        for number in range(TRIALS):
            seconds.append(defaultdict(float))
            began = time.perf_counter()
            settings = SETTINGS | {"train_cnn.seed": str(number + 1)}
            trial.run_trial(str(origin), commit, f"trial-{number}", STAGE, settings)
            seconds[-1]["all"] = time.perf_counter() - began
            sizes.append((size_of(remote), size_of(origin)))

    print("| step | first trial on a machine, s | later ones, median s |\n|---|---|---|")
    for step in seconds[0]:
        later = statistics.median(one[step] for one in seconds[1:])
        print(f"| {step} | {seconds[0][step]:.1f} | {later:.1f} |")
    print(f"bytes that a trial adds, as files (median of {TRIALS - 1}):")
    for place, grown in zip(("DVC's remote", "origin"), zip(*sizes, strict=True), strict=True):
        print(f"{statistics.median(after - before for before, after in pairwise(grown)):,.0f} in {place}")


def step_of(command: tuple) -> str:
    """A command's program and subcommand."""
    words = [str(word) for word in command]
    if words[: len(trial.DVC)] == list(trial.DVC):
        words = ["dvc", *words[len(trial.DVC) :]]
    return " ".join(words[: 3 if words[1] in ("exp", "cache", "config") else 2])


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure_search(folder: Path) -> None:
    """Time what a search on a cluster does after each trial: fetch new trials, and propose the next."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rate = optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    values: dict[str, optuna.distributions.BaseDistribution] = {"rate": rate}
    print("\n| trials of the commit | fetch, s | proposal, s |\n|---|---|---|")
    for trials in COUNTS:
        origin, clone = folder / f"origin-{trials}.git", folder / f"clone-{trials}"
        trial.run(folder, "git", "clone", "--quiet", "--bare", ROOT, origin)
        trial.run(folder, "git", "clone", "--quiet", origin, clone)
        commit = trial.run(clone, "git", "rev-parse", "HEAD").strip()
        place = trial.reference_of(commit, "trial")
        made = "".join(f"create {place}-{number:06} {commit}\n" for number in range(trials))
        subprocess.run(["git", "update-ref", "--stdin"], cwd=origin, check=True, input=made, text=True)
        fetch = ("git", "fetch", "--quiet", "--no-tags", "origin", f"+{place}-*:{place}-*")
        trial.run(clone, *fetch)
        study = optuna.create_study()
        for _ in range(trials):
            at = {"rate": 10 ** random.uniform(-4, -2)}
            study.add_trial(optuna.trial.create_trial(params=at, distributions=values, value=random.random()))
        fetched = statistics.median(seconds_of(trial.run, clone, *fetch) for _ in range(5))
        asked = statistics.median(seconds_of(study.ask, values) for _ in range(5))
        print(f"| {trials:,} | {fetched:.2f} | {asked:.2f} |")


def seconds_of(call: Callable, *arguments: object) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def measure_server(server: str) -> None:
    """Requests a second from n writers at once, each of which logs an epoch's metrics repeatedly."""
    from mlflow import MlflowClient

    client = MlflowClient(server)
    experiment = client.create_experiment(f"load-{time.time_ns()}")
    print("\n| writers at once | requests a second | median, ms | 95th percentile, ms | refused |")
    print("|---|---|---|---|---|")
    for writers in WRITERS:
        runs = [client.create_run(experiment).info.run_id for _ in range(writers)]
        with ThreadPoolExecutor(writers) as pool:
            list(pool.map(write, [server] * writers, runs, [WARM_UP] * writers))
            took = sorted(chain.from_iterable(pool.map(write, [server] * writers, runs, [SECONDS] * writers)))
        refused, most = took.count(math.inf), took[int(len(took) * 0.95)]
        rate = (len(took) - refused) / SECONDS
        median = statistics.median(took)
        print(f"| {writers} | {rate:.0f} | {1000 * median:.0f} | {1000 * most:.0f} | {refused} |")


def write(server: str, run: str, seconds: float) -> list[float]:
    """The seconds of each request that ended in time; infinity for one that the server refused."""
    import requests

    took: list[float] = []
    until = time.perf_counter() + seconds
    with requests.Session() as session:
        who = [os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD")]
        session.auth = (who[0], who[1])
        certificate = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH", True)
        while True:
            now = time.perf_counter()
            metrics = [
                {"key": f"metric_{number}", "value": 0.5, "timestamp": len(took), "step": len(took)}
                for number in range(5)
            ]
            body: dict[str, Any] = {"run_id": run, "metrics": metrics}
            path = "/api/2.0/mlflow/runs/log-batch"
            answer = session.post(server + path, json=body, timeout=60, verify=certificate)
            if time.perf_counter() > until:
                return took
            took.append(time.perf_counter() - now if answer.ok else math.inf)


if __name__ == "__main__":
    main()
