"""What ties a run to the code and the machine that made it."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from fashion_cnn.project.errors import StageError
from fashion_cnn.project.process import ELSEWHERE

# Settings and results, which a run records itself; every other change makes a tree dirty.
NOT_CODE = (":!params.yaml", ":!dvc.lock", ":!metrics")


class GitError(StageError):
    """A git command that failed, and what git says."""


def repository_root() -> Path:
    """The repository a stage belongs to; in a copy, made by DVC or for a trial, what it was made from."""
    named = os.environ.get("FASHION_CNN_ROOT") or os.environ.get("DVC_ROOT")
    return Path(named) if named else Path.cwd()


def git_tags() -> dict[str, str]:
    """The commit, and whether code differs from it; empty, after a line that says why, if git fails."""
    try:
        commit = git("rev-parse", "--verify", "HEAD").decode().strip()
        # Untracked files count, whatever the user's settings are.
        changes = git("status", "--porcelain", "--untracked-files=normal", "--", ".", *NOT_CODE)
    except GitError as error:
        print(f"the run records no commit: {error}")
        return {}
    return {"git_commit": commit, "git_dirty": str(bool(changes)).lower()}


def git_diff() -> str | None:
    """What a dirty tree holds beyond its commit, new files too; in latin-1, bytes that `git apply` takes.

    Text, since what could not be sent is kept as JSON. None, after a line that says why, if git fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": f"{scratch}/index"}  # git's own index is the user's
        try:
            git("read-tree", "HEAD", **index)
            git("add", "--all", "--", ".", *NOT_CODE, **index)
            # diff-index, since the user's settings colour what `git diff` prints, or change its paths.
            diff = git("diff-index", "--cached", "--binary", "--no-ext-diff", "HEAD", **index)
        except GitError as error:
            print(f"the run records no uncommitted changes: {error}")
            return None
    return diff.decode("latin-1")


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


def digest(*arrays: np.ndarray) -> str:
    """First 32 hex digits of the SHA-256 of the arrays' bytes (MLflow takes at most 36)."""
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()[:32]


def result_key(stage: str, params: dict[str, object], data_digest: str) -> str:
    """Digest of everything that determines a training's result: code, params, data, machine."""
    hasher = hashlib.sha256(json.dumps([stage, params, data_digest, machine_tags()]).encode())
    package = Path(__file__).resolve().parents[1]
    code = (f"{package}/", f"{package.with_name('stages')}/")
    for path in sorted(str(getattr(module, "__file__", None)) for module in list(sys.modules.values())):
        if path.startswith(code) and path != f"{package}/schema.py":
            hasher.update(Path(path).read_bytes())
    return hasher.hexdigest()


def _here() -> dict[str, str]:
    """The environment in which git finds the repository of the current folder."""
    return {name: value for name, value in os.environ.items() if name not in ELSEWHERE}


def git(*arguments: str, **environment: str) -> bytes:
    """What git prints. Raises GitError if it fails: without git, a repository, or what was asked for."""
    # Without the option, `git status` locks the index, and a kill leaves a lock that stops the user's git.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, env=_here() | environment, check=False)
    except OSError as error:
        raise GitError(f"git cannot be run: {error.strerror}") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise GitError(f"git {arguments[0]}: {said or f'exit code {done.returncode}'}")
    return done.stdout
