"""Killing a stage, DVC or both at a moment of choice, and what is there afterwards."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests
import yaml
from mlflow import MlflowClient
from pipeline import dvc, environment, tool, tracked_runs

from lib.mlflow_log import has_model


def outputs(project: Path) -> dict[str, str]:
    """Every output in dvc.lock with its digest."""
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


def stage_processes(project: Path) -> list[psutil.Process]:
    """The processes that run a stage's script in `project`."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command, cwd = process.info["cmdline"] or [], process.info["cwd"]
        if cwd == str(project) and any(part.startswith("stages/") for part in command):
            found.append(process)
    return found


def start_forced(project: Path, stage: str, output, **more: str) -> subprocess.Popen:
    """DVC at work on `stage` alone, whatever its cache has, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", stage],
        cwd=project, env=environment(PYTHONUNBUFFERED="1", **more), text=True,
        stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def kill_once(project: Path, stage: str, victim: str, delay: float) -> str | None:
    """Force `stage`, kill `victim` ("stage", "dvc" or "both") after `delay` seconds of it, and repeat.

    Returns "" when afterwards every output has the digest it had before, or what went wrong; None where
    the victim had ended before.
    """
    before = outputs(project)
    log = (project.parent / "killed.log").open("w")
    started = start_forced(project, stage, log, SHELL="/bin/sh")
    while started.poll() is None and not stage_processes(project):
        time.sleep(0.01)
    time.sleep(delay)
    running = stage_processes(project)
    late = not running if victim == "stage" else started.poll() is not None
    if victim in ("dvc", "both"):
        started.kill()
    if victim in ("stage", "both"):
        for process in running:
            if process.is_running():
                os.kill(process.pid, signal.SIGKILL)
    started.wait()
    log.close()
    _, alive = psutil.wait_procs(running, timeout=2)
    if alive:
        return f"{stage} goes on after its DVC was killed"
    repeated = dvc(project, "repro", "--no-run-cache", check=False)
    if repeated.returncode:  # as `make repro` does: DVC, killed while it wrote dvc.lock, left it cut short
        mended = [sys.executable, "tools/mend_lock.py"]
        if subprocess.run(mended, cwd=project, check=False).returncode == 0:
            repeated = dvc(project, "repro", check=False)
    if repeated.returncode:
        return f"`dvc repro` after a killed {stage} fails: {repeated.stdout[-300:]}"
    after = outputs(project)
    different = [path for path in before if after.get(path) != before[path]]
    if different:
        return f"{stage}: {', '.join(different)} differ"
    return None if late else ""


@contextmanager
def mlflow_server(folder: Path, port: int):
    """An MLflow server on this machine, with its store in `folder`."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db",
        "--artifacts-destination", f"{folder}/artifacts",
    ]  # fmt: skip
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment())
        try:
            for _ in range(600):
                try:
                    if requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok:
                        break
                except requests.ConnectionError:
                    time.sleep(0.1)
            MlflowClient(f"http://127.0.0.1:{port}").search_experiments()  # the first answer takes longer
            yield
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def lose_server(project: Path, epoch: int) -> str:
    """Kill the MLflow server of a training after `epoch`; returns what that lost for good, or ""."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    before = outputs(project)
    shutil.rmtree(project / ".checkpoints", ignore_errors=True)  # a kill may have left a finished one
    with mlflow_server(project.parent, port):
        training = start_forced(project, "train_cnn@original", subprocess.PIPE, **store)
        printed = ""
        for line in training.stdout:
            printed += line
            if line.startswith(f"epoch {epoch}/"):
                break
    printed += training.stdout.read()
    if training.wait() or "not sent" not in printed or "Traceback" in printed:
        return f"the training did not go on: {printed[-300:]}"
    if outputs(project) != before:
        return "other outputs without the server"
    with mlflow_server(project.parent, port):
        tool(project, "sync", **store)
        uri = store["MLFLOW_TRACKING_URI"]
        run = tracked_runs(project, "tags.dvc_stage = 'train_cnn@original'", uri)[0]
        history = MlflowClient(uri).get_metric_history(run.info.run_id, "train_loss")
        steps = [metric.step for metric in history]
        curve = (project / "metrics/train_cnn/original.csv").read_text().splitlines()[1:]
        if run.info.status != "FINISHED" or steps != list(range(1, len(curve) + 1)):
            return f"the run is {run.info.status} with epochs {steps}"
        if "test_accuracy" not in run.data.metrics or not has_model(MlflowClient(uri), run):
            return "the run lacks test metrics or model"
    return ""


def random_kill(project: Path, rng: random.Random, seconds: dict[str, float]) -> tuple[str, str]:
    """One kill at a random moment of a stage, which takes `seconds`; what it was, and what went wrong."""
    while True:
        stage, victim = rng.choice(list(seconds)), rng.choice(["stage", "dvc", "both"])
        delay = rng.uniform(0, seconds[stage])
        fault = kill_once(project, stage, victim, delay)
        if fault is not None:
            return f"{victim} of {stage} after {delay:.1f} s", fault


def seconds_of(project: Path, stage: str) -> float:
    """How long a stage and DVC's part in it take, from the stage's start."""
    started = start_forced(project, stage, subprocess.DEVNULL)
    while not stage_processes(project):
        time.sleep(0.01)
    began = time.monotonic()
    assert started.wait() == 0
    return time.monotonic() - began
