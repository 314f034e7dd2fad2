"""The overhead around the training: imports, DVC, MLflow, and a whole first run."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import ROOT, Report, spread
from ruamel.yaml import YAML

STAGES = sorted(path.name for path in (ROOT / "stages").glob("[!_]*.py"))


def timed(*command: str) -> float:
    """Seconds that a command takes; it must succeed."""
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began


def pipeline_times(rounds: int) -> dict[str, str]:
    """Section e: the overhead around the training, in seconds."""
    times = {}
    for script in STAGES:
        code = f"import sys, runpy; sys.argv = ['x']; runpy.run_path('stages/{script}', run_name='imported')"
        command = [sys.executable, "-c", code]
        times[f"imports at the top of {script}"] = spread([timed(*command) for _ in range(rounds)], 2)
    status, repro = [], []
    for _ in range(rounds):
        status.append(timed(sys.executable, "-m", "dvc", "status"))
        repro.append(timed(sys.executable, "-m", "dvc", "repro"))
    times |= {"`dvc status`": spread(status, 2), "`dvc repro`, nothing to do": spread(repro, 2)}
    times["ratio of the two"] = spread([b / a for a, b in zip(status, repro, strict=True)], 2)
    with tempfile.TemporaryDirectory() as store:
        subprocess.run(["git", "init", "-q"], cwd=store, check=True)
        tracked(store)  # makes the store
        tracking = spread([tracked(store) for _ in range(rounds)], 2)
    return times | {"MLflow in one training: import, run, 5 epochs, model": tracking}


def tracked(store: str) -> float:
    """Seconds of a training's MLflow part, without starting Python and torch."""
    return float(
        subprocess.run(
            [sys.executable, str(ROOT / "benchmarks/mlflow_cost.py")],
            check=True, capture_output=True, text=True, env={**os.environ, "FASHION_CNN_ROOT": store},
        ).stdout.split()[-1]
    )  # fmt: skip


def first_run_rows(report: Report) -> None:
    """`make repro` in a fresh clone, after cloning, with the share of each stage."""
    report.heading(
        "A first run",
        "`make repro` in a fresh clone of this commit, to the end; one run. Its dvc.lock was deleted, so "
        "that every stage runs: with it, DVC skips the stages after a training that gives the committed "
        "bytes.",
    )
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        (clone / "dvc.lock").unlink()
        began = time.perf_counter()
        marks = [("set-up: .venv and packages; DVC starts", 0.0)]
        process = subprocess.Popen(
            ["make", "repro"], cwd=clone, text=True, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        for line in process.stdout:
            if line.startswith("Running stage"):
                stage = line.split("'")[1]
                name = "training and evaluating both CNNs at once" if "@" in stage else stage
                if name != marks[-1][0]:
                    marks.append((name, time.perf_counter() - began))
        if process.wait():
            sys.exit("error: `make repro` failed in a fresh clone")
        ends = [time for _, time in marks[1:]] + [time.perf_counter() - began]
        locks = [YAML(typ="safe").load(root / "dvc.lock")["stages"] for root in (ROOT, clone)]
    rows = [
        f"{name} | {end - start:.1f} | {(end - start) / ends[-1]:.1%}"
        for (name, start), end in zip(marks, ends, strict=True)
    ]
    report.table("what | seconds | share", [*rows, f"all | {ends[-1]:.1f} | 100 %"])
    ours, theirs = (
        {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]} for lock in locks
    )
    same = sum(ours[path] == digest for path, digest in theirs.items())
    report.lines += [f"{same} of {len(theirs)} outputs have the bytes that the committed dvc.lock names.", ""]
