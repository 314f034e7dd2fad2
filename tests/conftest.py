"""Fixtures that several test files need, and torch set up as a stage sets it up."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from lib.models.device import prepare_torch
from pipeline import SMALL, dvc, set_params
from project import ROOT, copy_of_project, git

prepare_torch("cpu", threads=2)  # as every stage does before torch computes


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """An empty folder to run stage code in, with the tests' params.yaml and an MLflow store of its own."""
    shutil.copy(ROOT / "tests/helpers/params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def new_store(tmp_path_factory) -> Path:
    """A store of SQLite as MLflow makes it, which takes it seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    from mlflow import MlflowClient  # takes seconds, and the fast tests do without

    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def images() -> np.ndarray:
    """Sixteen images of noise, (16, 28, 28) uint8."""
    return np.random.default_rng(0).integers(0, 256, (16, 28, 28), np.uint8)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A project of two stages, build_toy_tensors and train_toy_cnn, after its first run; all is committed."""
    folder = copy_of_project(tmp_path_factory.mktemp("back") / "project")
    definition = yaml.safe_load((folder / "dvc.yaml").read_text())
    kept = {name: definition["stages"][name] for name in ("build_toy_tensors", "train_toy_cnn")}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": kept}))
    (folder / "dvc.lock").unlink()
    shutil.rmtree(folder / "metrics")
    set_params(folder, SMALL)
    dvc(folder, "repro")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "results")
    return folder


@pytest.fixture
def project(finished, tmp_path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))
