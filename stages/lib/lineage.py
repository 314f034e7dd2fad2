"""What ties a run to the code and the machine that made it."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import numpy as np

# Settings and results, which a run records itself; every other change makes a tree dirty.
NOT_CODE = (":!params.yaml", ":!dvc.lock", ":!metrics")


def repository_root() -> Path:
    """The repository a stage belongs to; in DVC's temporary copies, the one they were made from."""
    return Path(os.environ.get("DVC_ROOT") or Path(__file__).resolve().parents[2])


def git_tags() -> dict[str, str]:
    """The commit, and whether code differs from it; empty outside a git repository."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    dirty = bool(_git("status", "--porcelain", "--", ".", *NOT_CODE))
    return {"git_commit": commit, "git_dirty": str(dirty).lower()}


def dvc_tags(stage: str) -> dict[str, str]:
    """The stage, and the experiment when DVC runs one."""
    tags = {"dvc_stage": stage}
    if name := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_exp_name"] = name
    return tags


def machine_tags() -> dict[str, str]:
    """What can move the last bit of a result, apart from code and params."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def digest(*arrays: np.ndarray) -> str:
    """First 32 hex digits of the SHA-256 of the arrays' bytes (MLflow takes at most 36)."""
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array))
    return hasher.hexdigest()[:32]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None
    return done.stdout.strip()
