"""What several test files need: the map of the project and small stand-ins for the data."""

import ast
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from lib.runtime import prepare_torch

ROOT = Path(__file__).resolve().parents[1]
STAGES = ROOT / "stages"

prepare_torch("cpu", threads=2)  # as every stage does before torch computes


def stage_definitions() -> dict[str, dict]:
    """dvc.yaml's stages, a foreach stage as the definition it repeats."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in stages.items()}


def code_deps(script: Path) -> set[str]:
    """`script` and every local module it imports, transitively, as paths from the root."""
    found: set[Path] = set()
    pending = [script]
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending += _local_imports(path)
    return {path.relative_to(ROOT).as_posix() for path in found}


def _local_imports(path: Path) -> list[Path]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules |= {module.split(".")[0] for module in modules}  # lib.models runs lib/__init__.py first
    candidates = [STAGES / module.replace(".", "/") for module in modules]
    files = [path.with_suffix(".py") for path in candidates] + [path / "__init__.py" for path in candidates]
    return [path for path in files if path.is_file()]


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """An empty folder to run stage code in, with the tests' params.yaml and an MLflow store of its own."""
    shutil.copy(ROOT / "tests/params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def images() -> np.ndarray:
    """Sixteen images of noise, (16, 28, 28) uint8."""
    return np.random.default_rng(0).integers(0, 256, (16, 28, 28), np.uint8)


def copy_of_project(folder: Path) -> Path:
    """The working tree as git sees it, committed in a repository of its own at `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "start")
    return folder


def git(folder: Path, *arguments: str) -> str:
    """Run git in `folder` as somebody; returns what it prints."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
