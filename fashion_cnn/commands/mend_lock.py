"""Replace a file of DVC's that a kill has cut short; `make repro` does so before it starts DVC.

DVC writes dvc.lock, and its list of who reads and writes what, in place, so a kill in that moment leaves a
part of it, which DVC then refuses to read. This restores the committed dvc.lock, as `git restore` would, or
deletes the part if git has none; DVC finds stages that finished since in its run cache.
Exits with code 1 if both are whole, or if dvc.lock holds a merge conflict, which a person must settle.
"""

import json
import sys
from itertools import chain
from pathlib import Path

import psutil

from fashion_cnn.commands.dvc_state import parse_lock
from fashion_cnn.project.files import write_text
from fashion_cnn.project.process import run_stage
from fashion_cnn.project.repository import LOCK, GitError, file_at

RWLOCK = Path(".dvc/tmp/rwlock")


def main() -> None:
    """Replace what is cut short."""
    if not any([mend_rwlock(), mend_lock()]):
        sys.exit(1)


def mend_lock() -> bool:
    """Replace dvc.lock unless it is missing, whole or in conflict; whether that was needed."""
    if not LOCK.exists() or parse_lock(LOCK.read_bytes()) or b"\n<<<<<<< " in b"\n" + LOCK.read_bytes():
        return False
    try:
        committed = file_at("HEAD", LOCK)
    except GitError:
        committed = None
    if committed:
        write_text(LOCK, committed.decode())
    else:
        LOCK.unlink()
    done = "the committed one replaces it" if committed else "it is deleted"
    print(f"{LOCK} was cut short by a kill: {done}, and DVC finds later results in its run cache")
    return True


def mend_rwlock() -> bool:
    """Remove DVC's list of who reads and writes what if it is cut short, or all in it have ended.

    Returns whether it was cut short.
    """
    try:
        users = rwlock_users()
    except ValueError:
        RWLOCK.unlink()
        print(f"{RWLOCK} was cut short by a kill and is deleted")
        return True
    # DVC takes a killed process to be at work until its parent has waited for it, which can take seconds.
    if users and not any(is_at_work(user["pid"]) for user in users):
        RWLOCK.unlink()
    return False


def rwlock_users() -> list[dict]:
    """The `pid` and `cmd` of each process that DVC's list names. Raises ValueError if it is cut short."""
    held = json.loads(RWLOCK.read_text(encoding="utf-8")) if RWLOCK.exists() else {}
    return [*held.get("write", {}).values(), *chain(*held.get("read", {}).values())]


def is_at_work(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    run_stage(main)
