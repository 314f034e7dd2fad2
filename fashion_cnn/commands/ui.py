"""Serve MLflow's UI on this machine, and open it at the table of trainings.

MLflow's own start page shows other things first: an experiment's traces, or its runs but no metrics.
"""

import json
import os
import socket
import subprocess
import sys
import time
import webbrowser
from contextlib import suppress

import requests

from fashion_cnn.commands import sync
from fashion_cnn.project.errors import StageError
from fashion_cnn.tracking.runs import NOTE_TAG
from fashion_cnn.tracking.store import CNN_RUNS, TOY_RUNS, as_store_error, connect, shown, store_url

HOST, START = "127.0.0.1", 180  # START: seconds in which the UI must answer
# Runs a command. When this process ends, however it ends, the pipe that the shell reads from closes, and the
# shell kills the command and all that the command has started.
KEEPER = '{ "$@"; kill -KILL 0; } & read -r _; kill -KILL 0'
VIEW = "trainings"
COLUMNS = [
    "attributes.`Created`",
    *(f"metrics.`{name}`" for name in ("val_accuracy", "test_accuracy")),
    *(f"params.`train_cnn.{name}`" for name in ("learning_rate", "epochs", "batch_size", "seed")),
    "params.`train_images`",
]  # fmt: skip
SAVED_VIEW = {
    "searchFilter": "tags.dvc_stage LIKE 'train_cnn%'",  # in an old store, the toy's runs are here, too
    "orderByKey": "metrics.`val_accuracy`",
    "orderByAsc": False,
    "selectedColumns": COLUMNS,
    "compareRunsMode": "TABLE",
}
DESCRIPTION = """{}

- **Compare:** select two runs and press *Compare*, or run `fashion-cnn compare` in the project.
- **Restore a run:** `fashion-cnn trace RUN_ID` prints the commands.
- **Figures:** they are among a run's artifacts, under `plot_results`.
"""
ABOUT = {
    CNN_RUNS: "One run for each training of the CNN: `train_cnn@original` and `train_cnn@augmented`.",
    TOY_RUNS: "One run for each training of the 12-parameter CNN on two 4×4 images: `train_toy_cnn`.",
}


def main(port: int) -> None:
    """Bring the runs in line, save the view, start the UI, and print its address; runs until the UI ends."""
    check_free(port)
    try:
        sync.main()
    except StageError as error:  # existing runs can still be shown
        print(f"error: {error}", file=sys.stderr)
    with as_store_error():
        store = connect()
        for name, what in ABOUT.items():
            note = DESCRIPTION.format(what)
            store.client.set_experiment_tag(store.experiment(name), NOTE_TAG, note)
        cnns, view = store.experiment(CNN_RUNS), json.dumps(SAVED_VIEW)
        store.client.set_experiment_tag(cnns, f"mlflow.sharedViewState.{VIEW}", view)
    path = f"/#/experiments/{cnns}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
    url = store_url()
    if url.startswith("http"):  # a server has its own UI
        print(f"MLflow: {shown(url).rstrip('/')}{path}")
        return
    # One worker is enough for one person. With several, MLflow kills each that does not answer within 5 s,
    # so on a busy machine the UI would never open. Job execution would only add an idle process.
    command = [
        sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", url, "--host", HOST, "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    print("starting MLflow's UI …")
    with subprocess.Popen(
        ["/bin/sh", "-c", KEEPER, "sh", *command], env=os.environ | settings, stdin=subprocess.PIPE,
        start_new_session=True,
    ) as server:  # fmt: skip
        wait_until_ready(server, port)
        address = f"http://{HOST}:{port}{path}"
        print(f"MLflow: {address}\nCtrl-C ends it")
        if can_show():
            webbrowser.open(address)
        server.wait()
        raise StageError("MLflow's UI has ended; its messages are above")


def can_show() -> bool:
    """Whether there is a screen; without one, Python may open a text browser in the terminal."""
    return sys.platform == "darwin" or any(map(os.environ.get, ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")))


def check_free(port: int) -> None:
    """Raise StageError if another program uses the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise StageError(
                f"port {port}: {error.strerror}; name another: fashion-cnn ui --port 5001"
            ) from None


def wait_until_ready(server: subprocess.Popen, port: int) -> None:
    """Wait until the UI answers. Raises StageError if it ends, or does not answer in time."""
    deadline = time.monotonic() + START
    with requests.Session() as session:
        session.trust_env = False  # a proxy could not reach this machine
        while server.poll() is None and time.monotonic() < deadline:
            with suppress(requests.ConnectionError, requests.Timeout):
                if session.get(f"http://{HOST}:{port}/health", timeout=5).ok:
                    return
            time.sleep(0.2)
    fault = f"did not answer within {START} s" if server.poll() is None else "ended before it answered"
    raise StageError(f"MLflow's UI {fault}; its messages are above")
