"""A project for searches, and its trials."""

import json
from pathlib import Path

import yaml

from pipeline import SMALL, dvc, set_params
from project import copy_of_project, git

STAGE, METRICS, WEIGHTS = (
    "train_cnn@original",
    "metrics/train_cnn/original.json",
    "models/cnn_original.safetensors",
)


def trained(project: Path) -> Path:
    """A copy of the project with small params, after its first training; all is committed."""
    copy_of_project(project)
    set_params(project, SMALL)
    (project / "dvc.lock").unlink()  # its other stages are not in the cache
    dvc(project, "repro", STAGE)
    git(project, "commit", "--quiet", "--all", "--message", "small params")
    return project


def trials_of(project: Path) -> dict[str, tuple[dict, dict]]:
    """Params and metrics of the experiments of HEAD, by name, as git has them."""
    head = git(project, "rev-parse", "HEAD").strip()
    names = git(project, "for-each-ref", "--format=%(refname)", f"refs/exps/{head[:2]}/{head[2:]}/").split()
    return {
        name.rpartition("/")[2]: (
            yaml.safe_load(git(project, "show", f"{name}:params.yaml"))["train_cnn"],
            json.loads(git(project, "show", f"{name}:{METRICS}")),
        )
        for name in names
    }


def rates(project: Path) -> list[float]:
    return sorted(float(params["learning_rate"]) for params, _ in trials_of(project).values())


def table_of(printed: str) -> list[list[str]]:
    _, head, rest = printed.partition("trial ")
    return [line.split() for line in (head + rest).partition("\n\n")[0].splitlines()]
