"""Take away a dvc.lock that a kill has cut short; `make repro` calls this when DVC cannot go on.

DVC writes dvc.lock in place, so a kill in that moment leaves a part of it, which DVC then refuses to
read. Without the file, DVC finds finished stages in its run cache. Exits with code 1 where dvc.lock is whole
or holds a merge conflict, which is for a person to settle.
"""

import sys
from pathlib import Path

from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from ruamel.yaml import YAML, YAMLError
from voluptuous import Invalid

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))

from lib.errors import run_stage

LOCK = Path("dvc.lock")


def main() -> None:
    """Remove dvc.lock unless it is missing, whole or in conflict."""
    if not LOCK.exists() or read_lock() is not None or b"\n<<<<<<< " in b"\n" + LOCK.read_bytes():
        sys.exit(1)
    LOCK.unlink()
    print(f"{LOCK} was cut short by a kill: taken away, DVC finds finished stages in its run cache")


def read_lock() -> dict | None:
    """What dvc.lock holds; None where it is not what DVC writes."""
    try:
        content = YAML(typ="safe").load(LOCK.read_text(encoding="utf-8"))  # as DVC does
        COMPILED_LOCKFILE_SCHEMA(content)
    except (YAMLError, UnicodeDecodeError, Invalid):
        return None
    return content


if __name__ == "__main__":
    run_stage(main)
