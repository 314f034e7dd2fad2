"""Killing `dvc exp run`, in the workspace and in a temporary copy, and the way back."""

import subprocess
import time
from pathlib import Path

import yaml
from crash import Started, Strike, stage_processes, wait_until_gone
from pipeline import dvc, ran
from recovery import (
    CONTINUES,
    Trial,
    contents,
    finished_since,
    forget_caches,
    judge_training,
    last_epoch,
    next_log,
    resumed_epoch,
    run_statuses,
)

STAGE = "train_cnn@original"
IN_WORKSPACE = ("exp", "run", "-S", "train_cnn.seed=1", STAGE)
IN_COPY = ("exp", "run", "--temp", "-S", "train_cnn.seed=1", STAGE)


def git_says(project: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=project, check=True, capture_output=True, text=True).stdout


def experiments(project: Path) -> list[str]:
    """The references of the experiments that are complete."""
    return git_says(project, "for-each-ref", "--format=%(refname)", "refs/exps/??/*/*").split()


def entry_of_experiment(project: Path) -> dict:
    """What the dvc.lock of the only experiment says about its training."""
    [reference] = experiments(project)
    return yaml.safe_load(git_says(project, "show", f"{reference}:dvc.lock"))["stages"][STAGE]


def way_back_by_plain_git(project: Path) -> str:
    """Undo what `dvc exp run` leaves in the workspace, killed or not; returns what is still not as committed.

    DVC stages params.yaml, and a kill can leave the lock of git's index, a HEAD that is on no branch, and
    outputs that no cache has, which `dvc checkout` replaces only with --force.
    """
    (project / ".git/index.lock").unlink(missing_ok=True)
    git_says(project, "restore", "--staged", "--worktree", ".")
    if git_says(project, "branch", "--show-current") == "":
        git_says(project, "switch", "-")
    dvc(project, "checkout", "--force")
    return not_as_committed(project)


def not_as_committed(project: Path) -> str:
    """How the workspace differs from a branch whose results are all there; "" if it does not."""
    status = git_says(project, "status", "--porcelain", "--branch")
    outs = dvc(project, "status").stdout
    if "HEAD (no branch)" in status or len(status.splitlines()) > 1:
        return status
    return "" if "up to date" in outs else outs


def undisturbed(project: Path) -> tuple[dict, float]:
    """The entry in dvc.lock of the experiment that nothing kills, and how long that takes."""
    began = time.monotonic()
    dvc(project, *IN_COPY)
    seconds = time.monotonic() - began
    entry = entry_of_experiment(project)
    dvc(project, "exp", "remove", "--all-commits")
    return entry, seconds


def kill_experiment(project: Path, command: tuple, strike: Strike, what: str, entry: dict) -> Trial | None:
    """Kill an experiment's first run, go the way back, and run it again; None if it was complete."""
    forget_caches(project, entry)
    runs, log = run_statuses(project, STAGE), next_log(project)
    started = Started(project, log, "-m", "dvc", *command)
    struck = strike(started)
    running = stage_processes(project)
    started.process.wait()
    trial = Trial(what, epochs=last_epoch(log.read_text()))
    if not wait_until_gone(running, timeout=2):
        trial.lose(CONTINUES)
        return trial
    struck = struck and not experiments(project)
    ended = finished_since(project, STAGE, runs)
    trial.fault = not_as_committed(project) if command == IN_COPY else way_back_by_plain_git(project)
    again = dvc(project, *command, check=False)
    log.with_suffix(".again.log").write_text(again.stdout)
    trial.saved = resumed_epoch(again.stdout)
    if not trial.fault:
        judge_experiment(project, trial, command, again, entry, started.killed_at_work)
    if not trial.fault:
        judge_training(trial, ended, finished_since(project, STAGE, runs))
    way_back_by_plain_git(project)
    dvc(project, "exp", "remove", "--all-commits")
    return trial if struck else None


def judge_experiment(project, trial, command, again, entry, killed_at_work) -> None:
    """A fault if the second run fails, has nothing to recover, or gives other results."""
    if again.returncode or len(experiments(project)) != 1:
        trial.lose(f"the second run fails: {again.stdout[-300:]}")
    elif entry_of_experiment(project)["outs"] != entry["outs"]:
        trial.lose("other bytes than those of the undisturbed experiment")
    elif command == IN_WORKSPACE and any(
        contents(project).get(out["path"]) != out["md5"] for out in entry["outs"]
    ):
        trial.lose("other bytes in the workspace than in the experiment")
    elif not ran(again.stdout) and killed_at_work:
        trial.lose("nothing had to be recovered")
