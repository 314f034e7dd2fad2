"""Repair DVC's and git's files, for example after a kill; `make repro` and `fashion-cnn back` use it."""

import json
import os
import re
import shlex
from contextlib import suppress
from itertools import chain
from pathlib import Path

import psutil

from fashion_cnn.commands.dvc_state import parse_lock, read_lock, run_dvc
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import write_text
from fashion_cnn.project.repository import LOCK, NOT_CODE, GitError, file_at, git

RWLOCK = Path(".dvc/tmp/rwlock")  # DVC's list of who reads and writes what
# Where `dvc exp run` keeps uncommitted changes until it has restored them.
KEPT_CHANGES = ("refs/stash", "refs/exps/exec/EXEC_MERGE")


def mend_lock() -> bool:
    """Replace a truncated dvc.lock; returns whether that was needed.

    DVC writes it in place, so a kill at that moment leaves a part of it, which DVC then refuses to read. The
    committed one replaces it, as with `git restore`; if git has none, it is deleted. DVC's run cache has the
    stages that finished after that commit. A merge conflict is not touched, because a person must resolve it.
    """
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
    """Delete DVC's list of readers and writers if it is truncated, or all its processes have ended.

    Returns whether it was truncated.
    """
    try:
        users = rwlock_users()
    except ValueError:
        RWLOCK.unlink()
        print(f"{RWLOCK} was cut short by a kill and is deleted")
        return True
    # DVC considers a killed process alive until its parent has waited for it, which can take seconds.
    if users and not any(is_at_work(user) for user in users):
        RWLOCK.unlink()
    return False


def rwlock() -> dict[str, dict]:
    """DVC's list: by path, the `pid` and `cmd` of its writer, and of all its readers.

    Raises ValueError if it is truncated.
    """
    held = json.loads(RWLOCK.read_text(encoding="utf-8")) if RWLOCK.exists() else {}
    return {"write": {}, "read": {}} | held


def rwlock_users() -> list[dict]:
    """Each process that DVC's list names. Raises ValueError if it is truncated."""
    held = rwlock()
    return [*held["write"].values(), *chain(*held["read"].values())]


def is_at_work(user: dict) -> bool:
    """Whether a process in DVC's list still exists; its id may belong to another process by now."""
    try:
        process = psutil.Process(user["pid"])
        arguments = user["cmd"].partition(" ")[2]  # without `dvc`, which the kernel may show differently
        ended = process.status() == psutil.STATUS_ZOMBIE
        return not ended and " ".join(process.cmdline()).endswith(arguments)
    except psutil.Error:
        return False


def refuse_while_dvc_works() -> None:
    """Raise StageError if DVC is running stages here: what they read must not change meanwhile."""
    if at_work := {user["cmd"] for user in rwlock_users() if is_at_work(user)}:
        raise StageError(f"`{'`, `'.join(sorted(at_work))}` is running here; wait until it ends")


def check_weights(path: Path) -> None:
    """Raise StageError if a file of weights is missing; the message says if DVC is making it."""
    if path.is_file():
        return
    with suppress(ValueError):  # DVC is writing its list
        for written, user in rwlock()["write"].items():  # it deletes a model before training it again
            if Path(written).resolve() == path.resolve() and is_at_work(user):
                raise StageError(f"{path}: `{user['cmd']}` is remaking it; wait until that ends")
    raise StageError(f"{path}: not found; expected weights, as `make repro` makes them, or a model's name")


def return_to_branch() -> None:
    """Reattach a detached HEAD to the branch it was on, if it is still at that branch's commit."""
    if git("rev-parse", "--symbolic-full-name", "HEAD").strip() != b"HEAD":
        return
    at_head = git("for-each-ref", "--points-at=HEAD", "--format=%(refname)", "refs/heads").decode().split()
    left = re.search(r"^checkout: moving from (\S+) to", git("reflog", "-1", "--format=%gs").decode())
    if left and f"refs/heads/{left[1]}" in at_head:
        git("symbolic-ref", "-m", "fashion-cnn back", "HEAD", f"refs/heads/{left[1]}")
        print(f"HEAD is on branch {left[1]} again", flush=True)


def say_where_changes_are() -> None:
    """Print which code changes git holds for this commit, if the files have none.

    `dvc exp run` takes uncommitted changes out of the files for a moment; a kill then leaves them in git.
    """
    if git("status", "--porcelain", "--untracked-files=no", "--", ".", *NOT_CODE):
        return
    head = git("rev-parse", "HEAD").decode().strip()
    kept = git("for-each-ref", "--format=%(refname) %(parent)", *KEPT_CHANGES).decode()
    for ref, parent, *_ in map(str.split, kept.splitlines()):
        if parent != head:
            continue
        listed = git("diff", "--name-only", "--relative", "-z", head, ref, "--", ".", *NOT_CODE)
        if files := os.fsdecode(listed).split("\0")[:-1]:
            command = shlex.join(["git", "restore", f"--source={ref}", "--", *files])
            print(f"git has changes that your files lack; to restore them: {command}")


def drop_unknown_results() -> None:
    """Remove from dvc.lock the stages whose outputs are not in DVC's cache.

    They were made on another machine. DVC would trust the lock, find nothing, and run the stage; without
    its entry, DVC looks for this machine's own results in its run cache.
    """
    from dvc.utils.serialize import dump_yaml  # here, because `make repro` does not need it

    done = run_dvc("data", "status", "--json", capture_output=True, text=True)
    if done.returncode:
        raise StageError(f"`dvc data status` failed: {' '.join(done.stderr.split())[-300:]}")
    unknown = {path.rstrip("/") for path in json.loads(done.stdout).get("not_in_cache", [])}
    lock = read_lock()
    kept = {
        name: stage
        for name, stage in lock["stages"].items()
        if unknown.isdisjoint(out["path"] for out in stage["outs"])
    }
    if len(kept) < len(lock["stages"]):
        print(f"not in DVC's cache, so made on another machine: {', '.join(sorted(unknown))}", flush=True)
        dump_yaml(LOCK, lock | {"stages": kept})
