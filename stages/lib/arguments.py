"""The one argument of the stages that run once for each set of train images."""

import sys

from lib.errors import StageError

IMAGES = ("original", "augmented")


def images_argument() -> str:
    """Which images the stage is for, from the command line. Raises StageError for anything else."""
    if len(sys.argv) != 2 or sys.argv[1] not in IMAGES:
        given = " ".join(sys.argv[1:]) or "nothing"
        raise StageError(f"argument is {given}, expected one of {', '.join(IMAGES)}")
    return sys.argv[1]
