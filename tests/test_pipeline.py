"""The real pipeline on real data with small params: run, run again, change one param, spoil one."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import copy_of_project, git
from mlflow import MlflowClient

from lib.idx import TRAIN_IMAGES, TRAIN_LABELS, read_idx
from lib.repairs import import_torchvision

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and torchvision warn about themselves

SMALL = {
    "split": {"val_size": 500, "train_size": 1000},
    "augment_images": {"copies": 1},
    "train_toy_cnn": {"epochs": 100},
    "verify_manual_conv": {"images": 1},
    "train_cnn": {"epochs": 2},
    "evaluate_cnn": {"robustness_images": 100},
    "plot_results": {"dpi": 50},
}
TRAININGS = ["train_toy_cnn", "train_cnn@original", "train_cnn@augmented"]


def set_params(project: Path, changes: dict) -> None:
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for section, values in changes.items():
        params[section] |= values
    path.write_text(yaml.safe_dump(params))


def dvc(project: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=project, check=check, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**environment, "PATH": path},
    )  # fmt: skip


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project, in a folder with a space in its name, after one `dvc repro`."""
    folder = tmp_path_factory.mktemp("a project")
    copy_of_project(folder)
    set_params(folder, SMALL)
    git(folder, "commit", "--quiet", "--all", "--message", "small params")
    done = dvc(folder, "repro", "--force", check=False)
    assert done.returncode == 0, done.stdout
    assert len(ran(done.stdout)) == 10
    return folder


def runs(project: Path) -> dict:
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fashion-cnn")
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}
    return {run.info.run_name: run for run in found}


def test_the_data_is_fashion_mnist_as_torchvision_reads_it(project):
    dataset = import_torchvision().datasets.FashionMNIST(project / "data")
    assert (dataset.data.numpy() == read_idx(TRAIN_IMAGES, project / "data/FashionMNIST/raw")).all()
    assert (dataset.targets.numpy() == read_idx(TRAIN_LABELS, project / "data/FashionMNIST/raw")).all()


def test_copies_are_made_of_every_train_image(project):
    copy = np.load(project / "data/augmented/copy_01.npy", mmap_mode="r")
    assert (copy.shape, copy.dtype) == ((60_000, 28, 28), np.uint8)


def test_metrics_and_curves_are_there(project):
    test = json.loads((project / "metrics/evaluate_cnn/original.json").read_text())
    assert 0.5 < test["test_accuracy"] < 0.95
    verified = json.loads((project / "metrics/verify_manual_conv.json").read_text())
    assert (verified["parameters_toy_cnn"], verified["parameters_cnn"]) == (12, 896_522)
    assert all(value < 1e-4 for name, value in verified.items() if name.startswith("max_abs_error_"))
    with (project / "metrics/train_cnn/augmented.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert [row["epoch"] for row in curve] == ["1", "2"]
    assert float(curve[1]["train_loss"]) < float(curve[0]["train_loss"])
    figures = {path.stem for path in (project / "metrics/figures").iterdir()}
    assert figures == {"toy_loss", "training_curves", "robustness", "confusion", "mistakes", "augmentation"}


def test_each_training_is_one_run_with_all_its_results(project):
    found = runs(project)
    assert sorted(found) == sorted(TRAININGS)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True
    )
    for name, run in found.items():
        assert run.data.tags["git_commit"] == commit.stdout.strip()
        assert run.data.tags["git_dirty"] == "false"
        assert run.data.tags["dvc_stage"] == name
        assert run.outputs.model_outputs
    original = found["train_cnn@original"]
    assert original.data.params["train_cnn.epochs"] == "2"
    assert original.data.params["split.train_size"] == "1000"
    test = json.loads((project / "metrics/evaluate_cnn/original.json").read_text())
    assert original.data.metrics["test_accuracy"] == pytest.approx(test["test_accuracy"], rel=1e-5)
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    history = client.get_metric_history(original.info.run_id, "val_accuracy")
    assert [metric.step for metric in history] == [1, 2]
    figures = client.list_artifacts(original.info.run_id, "plot_results")
    assert "plot_results/robustness.png" in {file.path for file in figures}
    assert "max_abs_error_toy_forward" in found["train_toy_cnn"].data.metrics


def test_nothing_reruns_when_nothing_changed(project):
    again = dvc(project, "repro")
    assert ran(again.stdout) == []
    assert "Data and pipelines are up to date" in again.stdout
    assert len(runs(project)) == 3


def test_one_changed_param_reruns_what_depends_on_it_and_nothing_else(project):
    set_params(project, {"train_toy_cnn": {"seed": 10}})
    changed = dvc(project, "repro")
    assert ran(changed.stdout) == ["train_toy_cnn", "verify_manual_conv", "plot_results"]
    assert "dead ReLU" in changed.stdout
    assert json.loads((project / "metrics/train_toy_cnn.json").read_text())["dead_relu"] == 1


def test_a_wrong_param_is_one_line_and_loses_nothing(project):
    before = {path: path.read_bytes() for path in (project / "metrics").rglob("*") if path.is_file()}
    weights = (project / "models/toy_cnn.safetensors").read_bytes()
    right = yaml.safe_load((project / "params.yaml").read_text())["train_toy_cnn"]["epochs"]
    set_params(project, {"train_toy_cnn": {"epochs": "many"}})
    spoiled = dvc(project, "repro", check=False)
    assert spoiled.returncode != 0
    assert (
        "params.yaml: train_toy_cnn.epochs is 'many', expected an integer from 1 to 100000" in spoiled.stdout
    )
    assert "Traceback" not in spoiled.stdout
    # Put back, the run cache restores what DVC had taken away: the training does not run again.
    set_params(project, {"train_toy_cnn": {"epochs": right}})
    restored = dvc(project, "repro")
    assert "train_toy_cnn" not in ran(restored.stdout)
    assert (project / "models/toy_cnn.safetensors").read_bytes() == weights
    assert {path: path.read_bytes() for path in before} == before
