"""Running the pipeline of a copy of the project, with small params."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from mlflow import MlflowClient

from project import copy_of_project, git

LIMIT = 900  # seconds; even on a slow machine, nothing here takes that long
SMALL = yaml.safe_load((Path(__file__).parent / "params.yaml").read_text())


def set_params(project: Path, changes: dict) -> None:
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for section, values in changes.items():
        params[section] |= values
    path.write_text(yaml.safe_dump(params))


def two_stages(folder: Path, training: str | None = None) -> Path:
    """A project of build_toy_tensors and train_toy_cnn at `folder`, after its first run; all is committed.

    `training` replaces the project's script of train_toy_cnn.
    """
    copy_of_project(folder)
    definition = yaml.safe_load((folder / "dvc.yaml").read_text())
    kept = {name: definition["stages"][name] for name in ("build_toy_tensors", "train_toy_cnn")}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": kept}))
    if training:
        (folder / "stages/train_toy_cnn.py").write_text(training)
    (folder / "dvc.lock").unlink()
    shutil.rmtree(folder / "metrics")
    set_params(folder, SMALL)
    dvc(folder, "repro")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "results")
    return folder


def environment(**more: str) -> dict[str, str]:
    """This process's environment with its Python first, and without settings for DVC, MLflow and Ray."""
    others = ("DVC_", "MLFLOW_", "RAY_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, **more}


def dvc(project: Path, *arguments: str, check: bool = True, **more: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=project, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment(**more), timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0 or not check, done.stdout
    return done


def run_module(project: Path, *command: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project, text=True, capture_output=True, env=environment(**more), check=False, timeout=LIMIT,
    )  # fmt: skip


def try_tool(project: Path, *command: str, **more: str) -> subprocess.CompletedProcess:
    return run_module(project, "fashion_cnn", *command, **more)


def tool(project: Path, name: str, *arguments: str, **more: str) -> str:
    done = try_tool(project, name, *arguments, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def outputs(project: Path) -> dict[str, str]:
    """Every output in dvc.lock with its digest."""
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


def tracked_runs(project: Path, query: str = "", store: str | None = None) -> list:
    """The project's MLflow runs, newest first; `store` if it is not the default one."""
    client = MlflowClient(store or f"sqlite:///{project / 'mlflow.db'}")
    found = [client.get_experiment_by_name(name) for name in ("fashion-cnn", "fashion-cnn-toy")]
    return client.search_runs([one.experiment_id for one in found if one], query)


def run_queued(project: Path, workers: int, stage: str, changes: list[str]) -> list[str]:
    """Queue `stage` once for each change and have `workers` run them at once; returns what failed."""
    for number, change in enumerate(changes):
        dvc(project, "exp", "run", "--queue", "--name", f"queued-{number}", "-S", change, stage)
    dvc(project, "queue", "start", "--jobs", str(workers))
    deadline = time.monotonic() + 60 * len(changes)
    while time.monotonic() < deadline:
        status = dvc(project, "queue", "status").stdout
        rows = [line for line in status.splitlines() if "queued-" in line]
        if all("Success" in row or "Failed" in row for row in rows):
            break
        time.sleep(3)  # DVC's own start takes a second of a core
    dvc(project, "queue", "stop", "--kill", check=False)
    return [row for row in rows if "Success" not in row]
