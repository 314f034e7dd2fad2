"""Reading files of other commits, by paths from the project's folder."""

import json
from pathlib import Path

from lib.reporting.provenance import git
from lib.stage.errors import StageError
from lib.trainings import Training


def file_at(reference: str, path: str | Path) -> bytes | None:
    """A file of a commit or an experiment; None if that has no such file. Raises GitError."""
    if not git("ls-tree", reference, "--", str(path)):
        return None
    return git("show", f"{reference}:./{path}")


def weights_at(reference: str, training: Training) -> str | None:
    """The SHA-256 of the training's weights in a commit or an experiment; None if that has no results.

    Raises StageError if it has a damaged file.
    """
    metrics = file_at(reference, training.metrics)
    if metrics is None:
        return None
    try:
        return json.loads(metrics)["weights_sha256"][0]
    except (ValueError, LookupError, TypeError):
        what = f"{training.metrics} of {reference}: damaged, expected JSON with the SHA-256 of the weights"
        raise StageError(what) from None
