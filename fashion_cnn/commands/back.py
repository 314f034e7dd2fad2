"""Return from experiments to the committed params and results, without training again.

Restores params.yaml, dvc.lock and metrics/ from the last commit, also what `dvc exp run` has staged, and
puts HEAD on its branch again, which a killed one leaves on none. Code is left alone. Results stay in DVC's
cache, so the way to an experiment is as short: `dvc exp apply NAME`.
"""

import json
import os
import re
import shlex
import subprocess
import sys

from dvc.utils.serialize import dump_yaml

from fashion_cnn.commands.dvc_state import read_lock
from fashion_cnn.commands.mend_lock import is_at_work, mend_rwlock, rwlock_users
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.process import DVC
from fashion_cnn.project.repository import LOCK, NOT_CODE, GitError, git

SETTINGS_AND_RESULTS = ("params.yaml", "dvc.lock", "metrics")
# Where `dvc exp run` puts what is not committed, until it has put it back.
KEPT_CHANGES = ("refs/stash", "refs/exps/exec/EXEC_MERGE")
QUEUED = "refs/exps/stash"  # an experiment that was killed before its first stage


def main() -> None:
    """Restore the files, then let DVC restore the outputs."""
    mend_rwlock()
    refuse_while_dvc_works()
    try:
        return_to_branch()
        git("update-ref", "-d", QUEUED)  # else DVC runs it before the next experiment
        git("rm", "-r", "--cached", "--quiet", "--ignore-unmatch", "--", ".dvc/tmp")  # DVC's own, staged
        git("restore", "--source=HEAD", "--staged", "--worktree", "--", *SETTINGS_AND_RESULTS)
    except GitError as error:
        raise StageError(f"params, dvc.lock and metrics cannot be restored: {error}") from None
    print(f"restored from the last commit: {', '.join(SETTINGS_AND_RESULTS)}", flush=True)
    drop_unknown_results()
    # Stages that DVC has seen with these params come from its cache; it runs what it has never seen.
    if subprocess.run([*DVC, "repro"], check=False).returncode:
        raise StageError("`dvc repro` failed, expected it to restore the outputs; its message is above")
    say_where_changes_are()


def commit_results() -> None:
    """Make the results of this tree the ones that later ones are compared with."""
    message = "Take this machine's results as the baseline"
    commit = ["git", "commit", "--message", message, "--", *SETTINGS_AND_RESULTS]
    sys.exit(subprocess.run(commit, check=False).returncode)


def refuse_while_dvc_works() -> None:
    """Raise StageError if DVC is running stages here: what they read must not change meanwhile."""
    if at_work := {user["cmd"] for user in rwlock_users() if is_at_work(user["pid"])}:
        raise StageError(f"`{'`, `'.join(sorted(at_work))}` is running here; wait until it ends")


def return_to_branch() -> None:
    """Put HEAD on the branch it was on before it was detached, if it is still at that branch's commit."""
    if git("rev-parse", "--symbolic-full-name", "HEAD").strip() != b"HEAD":
        return
    at_head = git("for-each-ref", "--points-at=HEAD", "--format=%(refname)", "refs/heads").decode().split()
    left = re.search(r"^checkout: moving from (\S+) to", git("reflog", "-1", "--format=%gs").decode())
    if left and f"refs/heads/{left[1]}" in at_head:
        git("symbolic-ref", "-m", "fashion-cnn back", "HEAD", f"refs/heads/{left[1]}")
        print(f"HEAD is on branch {left[1]} again", flush=True)


def say_where_changes_are() -> None:
    """Say which changes of code git keeps for this commit, if the files have none.

    `dvc exp run` takes what is not committed out of the files for a moment; a kill in it leaves it there.
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
    """Remove those stages from dvc.lock whose outputs DVC's cache lacks.

    They were made on another machine. DVC would trust the lock, find nothing, and run the stage; without
    its entry, DVC looks for this machine's own results in its run cache.
    """
    done = subprocess.run([*DVC, "data", "status", "--json"], check=False, capture_output=True, text=True)
    if done.returncode:
        raise StageError(f"`dvc data status` failed: {' '.join(done.stderr.split())[-300:]}")
    unknown = set(json.loads(done.stdout).get("not_in_cache", []))
    lock = read_lock()
    kept = {
        name: stage
        for name, stage in lock["stages"].items()
        if unknown.isdisjoint(out["path"].rstrip("/") for out in stage["outs"])
    }
    if len(kept) < len(lock["stages"]):
        print(f"not in DVC's cache, so made on another machine: {', '.join(sorted(unknown))}", flush=True)
        dump_yaml(LOCK, lock | {"stages": kept})
