"""Reading files of other commits, by paths from the project's folder."""

import json
from pathlib import Path

from lib.reporting.provenance import git
from lib.trainings import Training


def file_at(reference: str, path: str | Path) -> bytes | None:
    """A file of a commit or an experiment; None if that has no such file. Raises GitError."""
    if not git("ls-tree", reference, "--", str(path)):
        return None
    return git("show", f"{reference}:./{path}")


def weights_at(reference: str, training: Training) -> str | None:
    """The SHA-256 of the training's weights in a commit or an experiment; None if that has no results."""
    metrics = file_at(reference, training.metrics)
    return json.loads(metrics)["weights_sha256"][0] if metrics else None
