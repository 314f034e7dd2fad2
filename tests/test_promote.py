"""promote: which model becomes the champion, on which images, and what is served."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
import torch
from scipy import stats
from torch.nn import functional as F

from fashion_cnn.cli import cli
from fashion_cnn.commands import promote, registry
from fashion_cnn.commands.registry import find_cnn_run
from fashion_cnn.data.fashion_mnist import CLASSES
from fashion_cnn.data.split import split_indices
from fashion_cnn.models.cnns import build_cnn, fresh, load_weights, save_weights
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import sha256_of
from fashion_cnn.project.record import Record, now_ms
from fashion_cnn.tracking import runs
from fashion_cnn.tracking.models import CODE, LOADER
from fashion_cnn.tracking.store import connect
from servers import free_port, wait_until_up
from small_stages import make_data, read_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # warnings of MLflow and torch
]

SPLIT = {"split.seed": 3, "split.val_size": 100, "split.train_size": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return {
        "train-images": read_data(folder, "TRAIN_IMAGES"),
        "train-labels": read_data(folder, "TRAIN_LABELS"),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> list[Path]:
    """Weights after 0, 1 and 30 steps over 150 of the images."""
    folder, paths = tmp_path_factory.mktemp("weights"), []
    train, _ = split_indices(250, 100, None, 3)
    images = torch.from_numpy(data["train-images"][train])[:, None].float() / 255
    labels = torch.from_numpy(data["train-labels"][train]).long()
    model = fresh(build_cnn, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for step in range(31):
        if step in (0, 1, 30):
            paths.append(folder / f"{step}.safetensors")
            save_weights(model, paths[-1])
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return paths


@pytest.fixture
def store(workspace, new_store, data, monkeypatch):
    """A store without runs; the train images are the small ones."""
    (workspace / "mlflow.db").write_bytes(new_store.read_bytes())
    (workspace / ".dvc/tmp").mkdir(parents=True)
    monkeypatch.setattr(promote, "read_idx", lambda file: data[file.name[: len("train-images")]])
    return connect()


def add_run(store, weights: Path, **split: object) -> str:
    """A finished run of train_cnn@original with these weights."""
    params = SPLIT | {f"split.{name}": value for name, value in split.items()}
    return log(store, weights, params=params, model=weights)


def log(store, weights: Path, params: dict, model: Path | None = None) -> str:
    """Bring the run of these weights up to date; returns its id."""
    record = Record(
        training="train_cnn@original",
        weights_sha256=sha256_of(weights),
        params=params,
        begun=now_ms(),
        weights=model,
    )
    [run_id] = runs.bring_in_line(store, record)
    return run_id


def test_residual_cnn(store, data, workspace, capsys):
    """A residual CNN with six views is registered, and it is read as it was trained."""
    weights = workspace / "residual.safetensors"
    model = fresh(lambda: build_cnn("residual", views=6), 0)
    images = torch.from_numpy(data["train-images"][:40])[:, None].float() / 255
    for _ in range(20):  # moves batch norm's statistics away from their initial values
        model(images)
    save_weights(model, weights)
    run_id = add_run(store, weights)
    log(store, weights, {"train_cnn.model": "residual", "train_cnn.tta_views": 6})
    assert "champion" in run(capsys, weights)
    with torch.inference_mode():
        expected = model.eval()(images).softmax(1).numpy()
    assert not np.allclose(expected[0], expected[1], atol=1e-4)
    for name in (str(weights), run_id, "1", "champion"):
        found = registry.load_classifier(name)(data["train-images"][:40])
        assert np.abs(found - expected).max() < 1e-5, name


def run(capsys, *arguments: object) -> str:
    cli(["promote", *map(str, arguments)], standalone_mode=False)
    return capsys.readouterr().out


def reads_right(weights: Path, data, indices: np.ndarray) -> np.ndarray:
    images = torch.from_numpy(data["train-images"][indices])[:, None].float() / 255
    with torch.inference_mode():
        return load_weights(build_cnn(), weights)(images).argmax(1).numpy() == data["train-labels"][indices]


def test_better_beyond_noise(store, trained, data, capsys):
    """Only a model that is better beyond noise becomes the champion."""
    client = store.client
    untrained, barely, better = trained
    ids = [add_run(store, weights) for weights in trained]
    told = run(capsys, untrained, "--dry-run")
    assert told.endswith("--dry-run: nothing was changed\n")
    assert client.search_registered_models() == []

    _, val = split_indices(250, 100, None, 3)
    right = {path: reads_right(path, data, val) for path in trained}
    first = f"there is no champion yet; val accuracy {100 * right[untrained].mean():.2f} % of 100 images"
    assert first in run(capsys, untrained)
    assert "`champion` is the version to use" in client.get_registered_model("fashion-cnn").description
    told = run(capsys, ids[1])  # named by its run id
    assert f"{right[barely].mean():.2%}".replace("%", " %") in told
    assert "not significantly better than version 1" in told
    assert registry.champion(client).version == 1

    told = run(capsys, better)
    version = registry.champion(client)
    assert version.run_id == ids[2]
    only = (right[better] & ~right[untrained]).sum(), (right[untrained] & ~right[better]).sum()
    p = stats.binomtest(int(only[0]), int(sum(only))).pvalue
    assert p < 0.05
    assert float(version.tags["p"]) == pytest.approx(p)
    assert float(version.tags["val_accuracy"]) == pytest.approx(right[better].mean())
    assert float(version.tags["champion_val_accuracy"]) == pytest.approx(right[untrained].mean())
    assert (version.tags["promoted"], version.tags["images"], version.tags["champion_before"]) == (
        "true",
        "100",
        "1",
    )
    assert (
        f"of 100 val images that neither was trained on (only the champion is right on {only[1]} images, "
        f"only this model on {only[0]}; McNemar's exact test" in version.description
    )
    assert "Trained on 59,900 original images of Fashion-MNIST." in version.description

    signature = mlflow.models.get_model_info("models:/fashion-cnn@champion").signature
    assert signature.outputs.input_names() == list(CLASSES)

    assert "is already the champion" in run(capsys, better)
    assert "not significantly better" in run(capsys, untrained)
    assert client.get_model_version("fashion-cnn", "1").tags["promoted"] == "true"  # unchanged since then
    assert registry.champion(client).run_id == ids[2]
    assert len(client.search_model_versions("name = 'fashion-cnn'")) == 3


def test_version_card(store, trained, capsys):
    """The card of a version contains what the evaluation measured."""
    store.client.log_metric(add_run(store, trained[2]), "test_accuracy", 0.912345)
    run(capsys, trained[2])
    assert "Test accuracy: 91.2 % unmodified.\n\n" in registry.champion(store.client).description


def test_copied_project(store, trained, data, workspace, tmp_path_factory, capsys, monkeypatch):
    """In a copy of the project, the champion is the copy's own."""
    for weights in trained[1:]:
        add_run(store, weights)
    run(capsys, trained[1])
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(workspace, copy)
    monkeypatch.setenv("FASHION_CNN_ROOT", str(copy))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow sets it
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{workspace}/registry.db")
    shutil.rmtree(workspace / "mlruns")
    before = set(workspace.rglob("*"))
    assert registry.load_classifier("champion")(data["train-images"][:2]).shape == (2, 10)
    assert "champion" in run(capsys, trained[2])
    assert set(workspace.rglob("*")) == before


def test_stricter_level(store, trained, capsys):
    """A stricter level requires stronger evidence."""
    client = store.client
    for weights in trained[1:]:
        add_run(store, weights)
    run(capsys, trained[1])
    assert "not significantly better" in run(capsys, trained[2], "--level", "1e-60")
    assert registry.champion(client).version == 1
    with pytest.raises(StageError, match=r"--level is 2\.0, expected a number between 0 and 1"):
        run(capsys, trained[2], "--level", "2")


def test_val_images(store, trained, data):
    """Images that either model was trained on are left out of the comparison."""
    client = store.client
    found = [client.get_run(add_run(store, weights, seed=seed)) for seed, weights in enumerate(trained[:2])]
    splits = [split_indices(250, 100, None, seed) for seed in range(2)]
    expected = np.intersect1d(splits[0][1], splits[1][1])
    images, labels = promote.val_images(*found)
    assert (images == data["train-images"][expected]).all()
    assert (labels == data["train-labels"][expected]).all()


def test_concurrent_promotions(store, trained, monkeypatch):
    """Two promotions at once leave one champion, and it is the better model."""
    client = store.client
    for weights in trained[1:]:
        add_run(store, weights)
    code = (
        "import sys, numpy as np; from fashion_cnn.commands import promote;"
        "data = dict(np.load('data.npz'));"
        "promote.read_idx = lambda file: data[file.name[:12]];"
        "promote.main(sys.argv[1], 0.05, False)"
    )
    np.savez("data.npz", **{name: promote.read_idx(Mock(name)) for name in ("train-images", "train-labels")})
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(
            [*command, str(weights)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for weights in trained[1:]
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    # Whichever came first, the better one is the champion at the end.
    assert registry.champion(client).run_id == find_cnn_run(store, str(trained[2])).info.run_id


class Mock:
    """A file of the data set, as read_idx takes it."""

    def __init__(self, name: str):
        self.name = name


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("0" * 32, "no run of it in MLflow"),
        ("absent.safetensors", "absent.safetensors: not found"),
    ],
)
def test_missing_model(store, capsys, model, words):
    """A missing model is named in the error."""
    with pytest.raises(StageError, match=words):
        run(capsys, model)


def test_run_without_params(store, trained, capsys):
    """The error on a run without params says which command adds them."""
    log(store, trained[0], {})
    with pytest.raises(StageError, match="the run lacks its params; `fashion-cnn sync` adds them"):
        run(capsys, trained[0])


def test_weights_without_run(store, trained, capsys):
    """The error on weights without a run says which command helps."""
    with pytest.raises(StageError, match="no run of it in MLflow, expected one; `fashion-cnn sync`"):
        run(capsys, trained[0])


@pytest.fixture
def server(store, trained, capsys):
    """The champion, served by MLflow on this machine."""
    add_run(store, trained[2])
    run(capsys, trained[2])
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/fashion-cnn@champion",
        "--env-manager", "local", "--port", str(port),
    ]  # fmt: skip
    environment = {
        **os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{Path.cwd()}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    with Path("server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_until_up(f"http://127.0.0.1:{port}/ping")
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_serve_champion(server, trained, data):
    """The champion is served with its probabilities by class, and wrong requests are refused."""
    for count in (1, 2, 7):
        images = data["train-images"][:count]
        answer = requests.post(server, json={"inputs": {"images": images.tolist()}}, timeout=30)
        assert answer.status_code == 200, answer.text
        rows = answer.json()["predictions"]
        with torch.inference_mode():
            model = load_weights(build_cnn(), trained[2])
            expected = model(torch.from_numpy(images)[:, None].float() / 255).softmax(1).numpy()
        assert [list(row) for row in rows] == [list(CLASSES)] * count
        assert np.array([list(row.values()) for row in rows]) == pytest.approx(expected, abs=1e-5)
    image = images[0].tolist()
    for wrong in (
        {"inputs": {"images": (images / 255).tolist()}},
        {"inputs": {"images": [[[str(value) for value in row] for row in image]]}},
        {"inputs": {"images": [[[value > 0 for value in row] for row in image]]}},
        {"inputs": {"images": (images.astype(int) + 1).tolist()}},  # 256
        {"inputs": {"images": json.loads("[" * 60 + "]" * 60)}},
        {"inputs": {"images": np.zeros((2, 28, 27), int).tolist()}},
        {"inputs": {"pictures": np.zeros((2, 28, 28), int).tolist()}},
        {"inputs": {"images": [["a"]]}},
        {"images": 1},
    ):
        answer = requests.post(server, json=wrong, timeout=30)
        assert answer.status_code == 400, (json.dumps(wrong)[:80], answer.text[:300])
    nested = '{"inputs": {"images": ' + "[" * 3000 + "]" * 3000 + "}}"
    answer = requests.post(server, nested, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code == 500  # from MLflow, whose parser has a depth limit
    assert requests.post(server, json={"inputs": {"images": [image]}}, timeout=30).ok  # it still serves


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"other weights")])
def test_model_without_weights(store, trained, workspace, spoil):
    """The error on a model that lacks the weights of its run names the run."""
    run_id = add_run(store, trained[2])
    [weights] = workspace.glob("mlruns/**/data/*.safetensors")
    spoil(weights)
    with pytest.raises(StageError, match=f"{run_id}: its model in MLflow lacks the weights of the run"):
        registry.load_classifier(run_id)


def test_model_code_never_runs(store, trained, data, workspace, capsys):
    """Code that is stored with a model never runs here."""
    run_id = add_run(store, trained[2])
    run(capsys, trained[2])
    [archive] = workspace.glob(f"mlruns/**/{CODE}")
    with zipfile.ZipFile(archive, "w") as other_code:
        other_code.writestr("other_loader.py", "raise SystemExit('ran')")
    about = archive.with_name("MLmodel")
    about.write_text(about.read_text().replace(LOADER, "other_loader"))
    with pytest.raises(SystemExit, match="ran"):
        mlflow.pyfunc.load_model(str(archive.parent))
    [weights] = workspace.glob("mlruns/**/data/*.safetensors")
    images = data["train-images"][:2]
    expected = registry.load_classifier(str(trained[2]))(images)
    for name in (run_id, "champion"):
        assert (registry.load_classifier(name)(images) == expected).all()
    weights.write_bytes(trained[1].read_bytes())
    with pytest.raises(StageError, match="fashion-cnn version 1: not the weights of its run"):
        registry.load_classifier("champion")
