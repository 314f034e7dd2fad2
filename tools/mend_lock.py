"""Take away a dvc.lock that a kill has cut short; `make repro` calls this when DVC cannot go on.

DVC writes dvc.lock in place, so a kill in that moment leaves a part of it, which DVC then refuses to
read. Without the file, DVC finds finished stages in its run cache. Exits with code 1 where dvc.lock is whole.
"""

import sys
from pathlib import Path

import yaml
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from voluptuous import Invalid

LOCK = Path("dvc.lock")


def main() -> None:
    """Remove dvc.lock unless it is missing or whole."""
    if not LOCK.exists():
        sys.exit(1)
    try:
        COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(LOCK.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, Invalid):
        LOCK.unlink()
        print(f"{LOCK} was cut short by a kill: taken away, DVC finds finished stages in its run cache")
    else:
        sys.exit(1)


if __name__ == "__main__":
    main()
