"""MLflow servers on this machine, and what is left when one is killed during a training."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import requests
from mlflow import MlflowClient

from crash import Started, wait_for_text
from fashion_cnn.tracking.models import ready_models
from pipeline import environment, outputs, tool, tracked_runs


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_up(address: str) -> None:
    """Wait until a server answers at `address`, for a minute or two."""
    for _ in range(600):
        try:
            if requests.get(address, timeout=1).ok:
                break
        except (requests.ConnectionError, requests.Timeout):
            time.sleep(0.1)


@contextmanager
def process(log: Path, *command: str, **more: str) -> Iterator[subprocess.Popen]:
    """A server and its children, killed at the end."""
    with log.open("a") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=environment(**more)
        )
        try:
            yield started
        finally:
            with suppress(ProcessLookupError):  # children may have outlived it
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


@contextmanager
def mlflow_server(folder: Path, port: int):
    """An MLflow server on this machine, with its store in `folder`."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db",
        "--artifacts-destination", f"{folder}/artifacts",
    ]  # fmt: skip
    with process(folder / "server.log", *command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"):
        wait_until_up(f"http://127.0.0.1:{port}/health")
        MlflowClient(f"http://127.0.0.1:{port}").search_experiments()  # the first answer takes longer
        yield


def lose_server(project: Path, epoch: int) -> str:
    """Kill the MLflow server of a training after `epoch`; returns what that lost permanently, or ""."""
    port = free_port()
    store = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    before = outputs(project)
    shutil.rmtree(project / ".checkpoints", ignore_errors=True)  # a kill may have left a finished one
    log = project.parent / "logs" / "server-killed.log"
    with mlflow_server(project.parent, port):
        command = ("-m", "dvc", "repro", "--force", "--single-item", "train_cnn@original")
        training = Started(project, log, *command, **store)
        wait_for_text(training, f"epoch {epoch}/")
    failed, printed = training.process.wait(), training.printed()
    if failed or "`fashion-cnn sync` writes the rest" not in printed or "Traceback" in printed:
        return f"the training did not continue: {printed[-300:]}"
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
        if "test_accuracy" not in run.data.metrics or not ready_models(MlflowClient(uri), run):
            return "the run lacks test metrics or model"
    return ""
