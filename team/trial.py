"""Run one trial of a search: a DVC experiment of a commit, in a clone of its own, sent back when it ends.

Usage: python -m team.trial REPOSITORY COMMIT NAME STAGE [PATH=VALUE …], on any machine that
has the project's environment: by hand, under Slurm, in a Kubernetes job. REPOSITORY is what `git clone`
takes. If it is a folder of the project, the trial uses that folder's cache, checkpoints and MLflow store.
Otherwise, data comes from DVC's remote and results go there; FASHION_CNN_TRIALS names the folder for what
trials share (default: ~/.cache/fashion-cnn). A trial that REPOSITORY has is not rerun, and one that was
killed resumes after its last epoch.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from fashion_cnn.project.errors import StageError
from fashion_cnn.project.process import DVC, ELSEWHERE, own_path, run_stage

PAUSES = (5, 20, 60)  # seconds between attempts to reach a repository or a remote
# `dvc exp run` and git must not inherit these.
OTHERS = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", *ELSEWHERE)


class TrialError(StageError):
    """A trial that failed; its message is the line that says why."""

    def __init__(self, line: str):
        line = re.sub(r"(\w+://)\S*@", r"\1", line)  # an address may hold a password, or a token
        super().__init__(re.sub(r"(\w+://[^\s?]*)\?\S*", r"\1", line))


def main() -> None:
    """Run the trial that the command line names."""
    if len(sys.argv) < 5 or not all("=" in setting for setting in sys.argv[5:]):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    repository, commit, name, stage, *settings = sys.argv[1:]
    run_trial(repository, commit, name, stage, dict(setting.split("=", 1) for setting in settings))


def run_trial(repository: str, commit: str, name: str, stage: str, settings: dict[str, str]) -> None:
    """Run `stage` and those before it with `settings`, {"train_cnn.epochs": "4", …}, as experiment `name`.

    Raises TrialError if anything fails.
    """
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise TrialError(f"COMMIT: {commit!r}, expected its 40 digits, as `git rev-parse HEAD` prints them")
    if not re.fullmatch(r"\w[\w-]*", name):
        raise TrialError(f"NAME: {name!r}, expected letters, digits, _ and -")
    if repository.startswith("-"):  # git would take it for an option, some of which run programs
        raise TrialError(f"REPOSITORY: {repository!r}, expected a folder or an address")
    if not re.fullmatch(r"\w+(@\w+)?", stage):
        raise TrialError(f"STAGE: {stage!r}, expected a stage of dvc.yaml, such as train_cnn@original")
    if wrong := [path for path in settings if not re.fullmatch(r"\w+(\.\w+)+", path)]:
        raise TrialError(f"PATH: {wrong[0]!r}, expected a param's path, such as train_cnn.epochs")
    repository = str(Path(repository).resolve()) if Path(repository).exists() else repository
    is_here = Path(repository, ".dvc").is_dir()
    home = Path(repository if is_here else os.environ.get("FASHION_CNN_TRIALS", "~/.cache/fashion-cnn"))
    home = home.expanduser().resolve()
    # One folder per host, because locks may not reach other hosts that share it.
    clones = home / (".dvc/tmp/trials" if is_here else f"clones/{socket.gethostname()}")
    clones.mkdir(parents=True, exist_ok=True)
    sweep(clones)
    clone, reference = clones / name, reference_of(commit, name)
    with FileLock(f"{clone}.lock"):  # another search on this machine may run the same trial
        if has(home, repository, reference):
            print(f"{name}: already exists, so it is not rerun")
            return
        shutil.rmtree(clone, ignore_errors=True)  # left by a kill
        try:
            options = ("--quiet", "--no-checkout", "--origin", "origin")
            steadily(home, "git", "clone", *options, "--", repository, clone)
            run(clone, "git", "checkout", "--quiet", "--detach", commit)
            cache = run(home, *DVC, "cache", "dir").strip() if is_here else home / "cache"
            run(clone, *DVC, "cache", "dir", "--local", cache)
            if not is_here:
                if not run(clone, *DVC, "config", "--project", "core.remote", check=False):
                    what = "no default remote, expected one for data and results"
                    raise TrialError(
                        f".dvc/config of {commit[:10]}: {what} (`dvc remote add --default NAME URL`)"
                    )
                steadily(clone, *DVC, "pull", "--with-deps", "--allow-missing", stage)
            changes = [word for path, value in settings.items() for word in ("-S", f"{path}={value}")]
            run(clone, *DVC, "exp", "run", "--name", name, *changes, stage, FASHION_CNN_ROOT=str(home))
            if not is_here:
                steadily(clone, *DVC, "push", "--with-deps", stage)
            # Pushed last, because a trial counts as done when the repository has it. Not by `dvc exp push`,
            # which also succeeds if the repository has another experiment of this name.
            push = ("git", "push", "--quiet", "origin", f"{reference}:{reference}")
            try:
                run(clone, *push)
            except TrialError:
                if not has(home, repository, reference):  # otherwise another machine has sent it meanwhile
                    steadily(clone, *push)
            print(f"{name}: done")
        finally:
            shutil.rmtree(clone, ignore_errors=True)


def reference_of(commit: str, name: str) -> str:
    """Where git keeps DVC's experiment `name` of a commit."""
    return f"refs/exps/{commit[:2]}/{commit[2:]}/{name}"


def sweep(clones: Path) -> None:
    """Delete the clones that killed trials left behind."""
    for clone in (path.with_suffix("") for path in clones.glob("*.lock")):
        try:
            with FileLock(f"{clone}.lock", timeout=0):
                shutil.rmtree(clone, ignore_errors=True)
        except Timeout:  # still running
            pass


def has(home: Path, repository: str, reference: str) -> bool:
    """Whether a repository has a reference."""
    ask = run if Path(repository).exists() else steadily
    return bool(ask(home, "git", "ls-remote", "--", repository, reference))


def steadily(folder: Path, *command: str | Path) -> str:
    """What a command prints; it is retried after pauses if it fails, because networks do."""
    for pause in PAUSES:
        try:
            return run(folder, *command)
        except TrialError:
            time.sleep(pause)
    return run(folder, *command)


def run(folder: Path, *command: str | Path, check: bool = True, **more: str) -> str:
    """What a command prints in `folder`, with `more` in its environment; it dies with this process.

    Raises TrialError if it fails and `check` is true.
    """
    settings = {name: value for name, value in os.environ.items() if name not in OTHERS}
    settings["PATH"] = own_path()
    # Otherwise, DVC's files about a project would stay in /var/tmp when the clone is gone.
    settings |= {"DVC_SITE_CACHE_DIR": str(folder / ".dvc/tmp/site"), "GIT_TERMINAL_PROMPT": "0", **more}
    # A transfer that stalls for a minute has failed.
    settings |= {"GIT_HTTP_LOW_SPEED_LIMIT": "1000", "GIT_HTTP_LOW_SPEED_TIME": "60"}
    done = subprocess.run(
        ["setpriv", "--pdeathsig", "KILL", *command], cwd=folder, env=settings, check=False, text=True,
        stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip
    if check and done.returncode:
        words = shlex.join(map(str, command))
        raise TrialError(fault_in(f"{done.stdout}\n{done.stderr}") or f"{words}: exit code {done.returncode}")
    return done.stdout


def fault_in(output: str) -> str:
    """The fault in an output: a stage's or DVC's last error, git's first one, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for start, place in (("error: ", -1), ("ERROR: ", -1), ("fatal: ", 0), ("", -1)):
        if found := [line.removeprefix(start) for line in lines if line.startswith(start)]:
            return found[place]
    return ""


if __name__ == "__main__":
    run_stage(main)
