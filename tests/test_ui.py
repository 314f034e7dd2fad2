"""make ui: its address leads a fresh browser to the table of trainings, with the columns that matter."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from lib.trainings import CNNS, TOY
from pipeline import environment
from project import ROOT
from servers import free_port
from tracking import runs
from tracking.store import Store, connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow warns about itself
]

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def start(**more: str) -> subprocess.Popen:
    settings = environment(DVC_ROOT=os.environ["DVC_ROOT"], **more)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        settings.pop(name, None)
    return subprocess.Popen(
        [sys.executable, ROOT / "tools/ui.py"],
        env=settings, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def address(workspace, new_store):
    """Of the UI of a store with a run of each training."""
    shutil.copy(new_store, workspace / "mlflow.db")
    store = connect()
    for number, training in enumerate([TOY, *CNNS.values()]):
        run_id = runs.stand_in(store, training.stage, f"{number}" * 64, {}, None)
        runs.log_params(store.client, run_id, {"train_cnn.learning_rate": 0.001, "train_cnn.epochs": 5})
        runs.log_rows(
            store.client,
            run_id,
            [{"epoch": 5, "val_accuracy": 0.875 + number / 100, "test_accuracy": 0.5}],
            runs.now(),
        )
    started = start(PORT=str(free_port()))
    try:
        line = next(line for line in started.stdout if line.startswith("MLflow: http"))
        yield line.removeprefix("MLflow: ").strip()
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_a_fresh_browser_sees_the_cnns_with_val_accuracy_and_what_was_set(address, tmp_path):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
        "--window-size=2000,1000", "--virtual-time-budget=30000", "--dump-dom", address,
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    text = re.sub("<[^>]*>", " ", page)
    for words in ("val_accuracy", "test_accuracy", "learning_rate", "epochs", "train_cnn@original", "0.885"):
        assert words in text, words
    assert runs.find_run(connect(), dvc_stage=CNNS["augmented"].stage) in page
    assert runs.find_run(connect(), dvc_stage=TOY.stage) not in page


def test_a_port_that_is_in_use_is_named_with_the_way_out(workspace):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _, fault = start(PORT=str(port)).communicate(timeout=60)
    assert fault == f"error: port {port}: Address already in use; name another: PORT=5001 make ui\n"
    _, fault = start(PORT="many").communicate(timeout=60)
    assert fault == "error: PORT is 'many', expected a number from 1 to 65535\n"


def test_a_server_has_a_ui_of_its_own(workspace, monkeypatch, capsys):
    import ui

    class Client:
        def set_experiment_tag(self, *arguments) -> None:
            pass

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    monkeypatch.setattr(ui, "connect", lambda: Store(Client(), "7", "8"))
    ui.main()
    told = capsys.readouterr().out
    assert told.startswith("MLflow: http://host:5000/#/experiments/7/runs?workflowType=machine_learning&")
