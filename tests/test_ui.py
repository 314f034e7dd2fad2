"""fashion-cnn ui: its address shows a fresh browser the table of trainings, and leads on from there."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from browser import needs_browser, open_page, see_comparison, see_models, see_run, see_table
from fashion_cnn.models.cnns import build_cnn, fresh, save_weights
from fashion_cnn.project.catalog import CNNS, TOY
from fashion_cnn.project.record import Record, now_ms
from fashion_cnn.tracking import runs
from fashion_cnn.tracking.store import connect
from pipeline import environment
from project import ROOT
from servers import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow's own warnings
]


def start(port: object, **more: str) -> subprocess.Popen:
    settings = environment(FASHION_CNN_ROOT=os.environ["FASHION_CNN_ROOT"], **more)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        settings.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", "fashion_cnn", "ui", "--port", str(port)],
        env=settings, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory, new_store):
    """The UI's address, for a store with a run of each training; those of the CNNs have models."""
    folder = tmp_path_factory.mktemp("ui")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(ROOT / "dvc.yaml", folder)
        patch.setenv("FASHION_CNN_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        shutil.copy(new_store, folder / "mlflow.db")
        store = connect()
        for number, training in enumerate([TOY, *CNNS.values()]):
            params = {
                "train_cnn.learning_rate": 0.001,
                "train_cnn.epochs": 5,
                "train_cnn.batch_size": 32,
                "split.val_size": 5000,
            }
            rows = [{"epoch": 5, "val_accuracy": 0.875 + number / 100, "test_accuracy": 0.5}]
            record = Record(
                training=training.stage,
                weights_sha256=f"{number}" * 64,
                params=params,
                rows=rows,
                begun=now_ms(),
            )
            if training is not TOY:
                save_weights(fresh(build_cnn, 0), folder / "cnn.safetensors")
                record.weights = folder / "cnn.safetensors"
            runs.bring_in_line(store, record)
        started = start(free_port())
        try:
            line = next((line for line in started.stdout if line.startswith("MLflow: http")), None)
            assert line, started.stderr.read()
            yield line.removeprefix("MLflow: ").strip()
        finally:
            os.killpg(started.pid, signal.SIGKILL)
            started.communicate()


@needs_browser
def test_table_of_trainings(address):
    """A fresh browser shows the CNNs with their val accuracy and the params that were set."""
    with open_page(2000, 1000) as page:
        see_table(page, address)
        text = page.locator("body").inner_text()
    for words in (
        *("val_accuracy", "test_accuracy", "learning_rate", "epochs", "batch_size", "train_images", "55000"),
        *(
            "train_cnn@original",
            "0.885",
            "train_cnn@augmented",
            "0.895",
            "One run for each training of the CNN",
        ),
    ):
        assert words in text, words
    assert text.index("0.895") < text.index("0.885")  # the best first
    assert TOY.stage not in text


@needs_browser
def test_steps_from_table(address):
    """One step leads from the table to a run, a comparison or the models."""
    with open_page(2000, 1000) as page:
        see_table(page, address)
        see_comparison(page)
        for words in ("train_cnn@original", "train_cnn@augmented", "0.885", "0.895"):
            page.get_by_text(words).first.wait_for(timeout=10_000)

        see_table(page, address)
        see_run(page, CNNS["augmented"].stage)
        for words in ("Made to hold results of weights", "train_cnn.learning_rate", "cnn_augmented"):
            page.get_by_text(words).first.wait_for(timeout=10_000)

        see_table(page, address)
        see_models(page)
        for words in ("cnn_original", "cnn_augmented", "val_accuracy", "0.885", "0.895"):
            page.get_by_text(words).first.wait_for(timeout=10_000)


def test_port_in_use(workspace):
    """The error for a port that is in use names the port and the way out."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _, fault = start(port).communicate(timeout=60)
    assert fault == f"error: port {port}: Address already in use; name another: fashion-cnn ui --port 5001\n"
    _, fault = start("many").communicate(timeout=60)
    assert "Error: Invalid value for '--port': 'many' is not a valid integer range." in fault


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_leaves_no_process(workspace, new_store, how):
    """The UI leaves no process behind, and a proxy in the environment does not affect it."""
    shutil.copy(ROOT / "dvc.yaml", workspace)
    shutil.copy(new_store, workspace / "mlflow.db")
    port = str(free_port())
    started = start(port, http_proxy="http://127.0.0.1:9", no_proxy="", NO_PROXY="")
    assert any(line.startswith("MLflow: http") for line in started.stdout), started.stderr.read()
    at_work = [one for one in psutil.process_iter(["cmdline"]) if port in (one.info["cmdline"] or [])]
    assert any("uvicorn" in one.info["cmdline"] for one in at_work)
    started.send_signal(how)
    started.communicate()
    assert psutil.wait_procs(at_work, timeout=30)[1] == []


def test_server_ui(workspace, monkeypatch, capsys):
    """A tracking server has its own UI, whose address is printed."""
    from fashion_cnn.commands import ui

    class Client:
        def set_experiment_tag(self, *arguments) -> None:
            pass

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    monkeypatch.setattr(ui, "connect", lambda: SimpleNamespace(client=Client(), experiment=lambda name: "7"))
    monkeypatch.setattr(ui.sync, "main", lambda: None)
    ui.main(5000)
    told = capsys.readouterr().out
    assert told.startswith("MLflow: http://host:5000/#/experiments/7/runs?workflowType=machine_learning&")
