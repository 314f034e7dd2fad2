"""Killing `dvc exp run`, in the workspace and in a temporary copy, and the way back."""

import re
import shlex
import time
from pathlib import Path

import yaml

from crash import Started, Strike, stage_processes, wait_until_gone
from pipeline import dvc, ran, try_tool
from project import git
from recovery import (
    CONTINUES,
    Trial,
    contents,
    forget_caches,
    judge_training,
    last_epoch,
    next_log,
    resumed_epoch,
    run_statuses,
)

STAGE = "train_cnn@original"
EDITED = "Makefile"  # a file with a change that is not committed, which no kill may lose
IN_WORKSPACE = ("exp", "run", "-S", "train_cnn.seed=1", STAGE)
IN_COPY = ("exp", "run", "--temp", "-S", "train_cnn.seed=1", STAGE)


def experiments(project: Path) -> list[str]:
    """The references of the experiments that are complete."""
    return git(project, "for-each-ref", "--format=%(refname)", "refs/exps/??/*/*").split()


def entry_of_experiment(project: Path) -> dict:
    """What the dvc.lock of the only experiment says about its training."""
    [reference] = experiments(project)
    return yaml.safe_load(git(project, "show", f"{reference}:dvc.lock"))["stages"][STAGE]


def way_back(project: Path) -> str:
    """Undo what `dvc exp run` leaves in the workspace, killed or not; returns what is still wrong with it."""
    for lock in (project / ".git").glob("*.lock"):
        lock.unlink()  # as git says, and nothing else may do
    done = try_tool(project, "back")
    if done.returncode:
        return f"no way back: {done.stderr[-300:]}"
    for told in re.findall(
        r"^git has changes that your files lack; to restore them: git (.+)$", done.stdout, re.MULTILINE
    ):
        git(project, *shlex.split(told))
    status = git(project, "status", "--porcelain", "--branch").splitlines()
    outs = dvc(project, "status").stdout
    if "HEAD (no branch)" in status[0] or status[1:] != [f" M {EDITED}"]:
        return f"not as before: {status}"
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
    """Kill an experiment's first run, go back, and run it again; None if it was complete."""
    forget_caches(project, entry)
    runs, log = run_statuses(project, STAGE), next_log(project)
    git(project, "restore", EDITED)
    with (project / EDITED).open("a") as edited:
        edited.write("# not committed\n")
    started = Started(project, log, "-m", "dvc", *command)
    struck = strike(started)
    running = stage_processes(project)
    started.process.wait()
    trial = Trial(what, epochs=last_epoch(log.read_text()))
    if not wait_until_gone(running, timeout=2):
        trial.lose(CONTINUES)
        return trial
    struck = struck and not experiments(project)
    trial.fault = way_back(project)
    again = dvc(project, *command, check=False)
    log.with_suffix(".again.log").write_text(again.stdout)
    trial.saved = resumed_epoch(again.stdout)
    if not trial.fault:
        judge_experiment(project, trial, command, again, entry, started.killed_at_work)
    if not trial.fault:
        judge_training(trial, project, STAGE, runs, again.stdout)
    trial.fault = trial.fault or way_back(project)
    git(project, "restore", EDITED)
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
