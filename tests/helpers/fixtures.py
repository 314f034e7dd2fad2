"""Fixtures that several test files need, and torch set up as a stage sets it up."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fashion_cnn.models.device import prepare_torch
from fashion_cnn.project.process import start
from project import ROOT

start()
prepare_torch("cpu")  # as every stage does before torch computes


def needs(*wanted: tuple[object, str]) -> pytest.MarkDecorator:
    """Skip a test if one of `wanted` is missing; each comes with a text that says how to get it."""
    missing = next((what for found, what in wanted if not found), "")
    return pytest.mark.skipif(bool(missing), reason=f"needs {missing}")


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """An empty folder to run stage code in, with the tests' params.yaml and an MLflow store of its own."""
    shutil.copy(ROOT / "tests/helpers/params.yaml", tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)  # the command fashion-cnn looks for it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASHION_CNN_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def new_store(tmp_path_factory) -> Path:
    """A SQLite store as MLflow makes it, which takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    from mlflow import MlflowClient  # takes seconds; the fast tests do not need it

    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def project(finished, tmp_path) -> Path:
    """A copy, for one test, of what a file's fixture `finished` has made."""
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


@pytest.fixture
def images() -> np.ndarray:
    """Sixteen images of noise, (16, 28, 28) uint8."""
    return np.random.default_rng(0).integers(0, 256, (16, 28, 28), np.uint8)
