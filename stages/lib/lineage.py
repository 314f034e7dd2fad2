"""What ties a run to the code and the machine that made it."""

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

# Settings and results, which a run records itself; every other change makes a tree dirty.
NOT_CODE = (":!params.yaml", ":!dvc.lock", ":!metrics")


def repository_root() -> Path:
    """The repository a stage belongs to; in DVC's temporary copies, the one they were made from."""
    return Path(os.environ.get("DVC_ROOT") or Path(__file__).resolve().parents[2])


def git_tags() -> dict[str, str]:
    """The commit, and whether code differs from it; empty outside a git repository."""
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {}
    dirty = bool(git("status", "--porcelain", "--", ".", *NOT_CODE))
    return {"git_commit": commit.decode().strip(), "git_dirty": str(dirty).lower()}


def git_diff() -> str:
    """What a dirty tree holds beyond its commit, new files too; in latin-1, bytes that `git apply` takes.

    Text, since what could not be sent is kept as JSON.
    """
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": f"{scratch}/index"}  # git's own index is the user's
        git("read-tree", "HEAD", **index)
        git("add", "--all", "--", ".", *NOT_CODE, **index)
        return (git("diff", "--cached", "--binary", "HEAD", **index) or b"").decode("latin-1")


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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def process_tag() -> dict[str, str]:
    """By which `make sync` knows that a run's process is gone."""
    return {"process": f"{socket.gethostname()}:{os.getpid()}"}


def digest(*arrays: np.ndarray) -> str:
    """First 32 hex digits of the SHA-256 of the arrays' bytes (MLflow takes at most 36)."""
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array))
    return hasher.hexdigest()[:32]


def result_key(stage: str, params: dict[str, object], data_digest: str) -> str:
    """Digest of everything that determines a training's result: code, params, data, machine."""
    hasher = hashlib.sha256(json.dumps([stage, params, data_digest, machine_tags()]).encode())
    stages = str(Path(__file__).resolve().parents[1])
    for path in sorted(str(getattr(module, "__file__", None)) for module in list(sys.modules.values())):
        if path.startswith(stages):
            hasher.update(Path(path).read_bytes())
    return hasher.hexdigest()


def git(*arguments: str, **environment: str) -> bytes | None:
    """What git prints; None where it fails: without git, a commit, or what was asked for."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, check=True, env=os.environ | environment
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout
