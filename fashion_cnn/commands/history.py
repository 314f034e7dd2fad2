"""Reading files of other commits, by paths from the project's folder."""

import json
import re
from pathlib import Path

from fashion_cnn.project.catalog import Training
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.provenance import git


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
        found = json.loads(metrics)
    except ValueError:
        found = None
    match found:
        case {"weights_sha256": [str(digest)]} if re.fullmatch("[0-9a-f]{64}", digest):
            return digest
    raise StageError(
        f"{training.metrics} of {reference}: no weights_sha256, expected it as a stage writes it"
    )
