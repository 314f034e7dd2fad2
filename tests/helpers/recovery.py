"""Killing the first run of a stage, an experiment or everything, and judging what later runs recover."""

import hashlib
import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import yaml

from crash import Started, Strike, stage_processes, wait_until_gone
from fashion_cnn.project.catalog import TRAININGS
from pipeline import LIMIT, dvc, environment, ran, tool, try_tool
from project import ROOT, git

REPLACED = "the committed one replaces it"  # what `make repro` says of a dvc.lock that was cut short
NOT_IN_RUN_CACHE = "verify_manual_conv"  # so it runs again if dvc.lock has lost it
IN_EXPERIMENT = "train_cnn@original"
IN_WORKSPACE = ("exp", "run", "-S", "train_cnn.seed=1", IN_EXPERIMENT)
IN_COPY = (*IN_WORKSPACE, "--temp")
EDITED = "Makefile"  # has an uncommitted change while an experiment runs, which no kill may lose


@dataclass
class Trial:
    """What was tried, what it lost permanently ("" for nothing), and how many epochs were saved."""

    what: str
    fault: str = ""
    saved: int = 0

    def __str__(self) -> str:
        saved = f", {self.saved} epochs saved" if self.saved else ""
        return f"{self.what}: {f'LOST: {self.fault}' if self.fault else 'recovered'}{saved}"

    def lose(self, fault: str) -> None:
        """Note a fault; the first one stays, because it may be the cause of the others."""
        self.fault = self.fault or fault


class Recovery:
    """The kills of a command so far, and what the runs after each of them repeated or lost."""

    def __init__(self, project: Path, expected: dict[str, str], stage: str = ""):
        """`expected` are the contents() after a run that is not killed.

        `stage` is the only one that the command has to run; "" if it runs all that dvc.lock lacks.
        """
        self.project, self.expected, self.stage = project, expected, stage
        self.trials: list[Trial] = []
        self.finished = set(lock_entries(project)) - {stage}  # what must not run again
        self.stopped: dict[str, tuple[Trial, int]] = {}  # each training's last kill, and its epoch
        trainings = TRAININGS.keys() & {stage} if stage else TRAININGS
        self.runs_before = {training: len(run_statuses(project, training)) for training in trainings}

    def kill(
        self, strike: Strike, *command: str, is_complete: Callable[[], bool] = lambda: False
    ) -> Trial | None:
        """Start a command and kill it; None if it ended first, or everything that it makes exists."""
        log = self.project.parent / "logs" / f"{time.time_ns()}.log"
        self.started = Started(self.project, log, *command)
        hit = strike.hits(self.started)
        running = stage_processes(self.project)
        self.started.process.wait()
        trial = Trial(f"{' '.join(command[1:])}, {strike}")
        if not wait_until_gone(running, timeout=2):
            trial.lose("the stage continues after its DVC was killed")
        if self.trials:
            self.judge_run(self.started.printed())
        if trial.fault or (hit and not is_complete()):
            self.note_kill(trial, self.started.printed())
            return trial
        return None

    def note_kill(self, trial: Trial, printed: str) -> None:
        """Note what had finished, and after which epoch the kill stopped a training."""
        self.trials.append(trial)
        left = set(lock_entries(self.project))
        self.finished |= left - {self.stage}
        self.finished -= {NOT_IN_RUN_CACHE} - left
        _, last = epochs_of(printed)
        unfinished = [stage for stage in last if stage not in self.finished]
        trial.what += f", unfinished: {', '.join(unfinished) or 'none'}"
        for stage in unfinished:
            if stage in self.runs_before and (last[stage] or stage not in self.stopped):
                self.stopped[stage] = (trial, last[stage])

    def judge_run(self, printed: str) -> None:
        """Find what a run repeated that was done before the kills."""
        may_run = {NOT_IN_RUN_CACHE} if REPLACED in printed else set()
        if again := self.finished.intersection(ran(printed)) - may_run:
            self.trials[-1].lose(f"stages ran again that had finished: {sorted(again)}")
        resumed, last = epochs_of(printed)
        for stage in resumed.keys() & self.stopped:
            trial, epoch = self.stopped[stage]
            trial.saved += resumed[stage]
            if resumed[stage] < epoch and last[stage]:  # 0: killed before it said where it resumed
                trial.lose(f"{stage} killed after epoch {epoch}, resumed after epoch {resumed[stage]}")

    def judge_last_run(self, done: subprocess.CompletedProcess) -> None:
        """Find what is lost after a run that was not killed."""
        trial, printed = self.trials[-1], done.stdout
        self.started.log.with_suffix(".again.log").write_text(printed)
        if done.returncode:
            trial.lose(f"the run after it fails: {printed[-300:]}")
        elif contents(self.project) != self.expected:
            trial.lose("other bytes than those of the undisturbed run")
        self.judge_run(printed)
        if self.stage and self.stage not in ran(printed):
            is_cached = f"Stage '{self.stage}' is cached" in printed
            if self.started.killed_at_work or not (is_cached or REPLACED in printed):
                trial.lose("nothing had to be recovered")
            trial.what += ", when DVC's run cache had it" if is_cached else ""
        for training, before in self.runs_before.items():
            found, expected = run_statuses(self.project, training), ["FINISHED"] * max(1, before)
            if found != expected:
                trial.lose(f"the runs of {training} are {found}, expected {expected}")


def kill_stage(project: Path, stage: str, strike: Strike) -> Trial | None:
    """Kill the first run of a stage, and run `make repro`; None if there was nothing to recover."""
    expected, entries = contents(project), lock_entries(project).keys()
    forget(project, stage)
    recovery = Recovery(project, expected, stage)
    command = ("-m", "dvc", "repro", "--single-item", stage)
    trial = recovery.kill(strike, *command, is_complete=lambda: lock_entries(project).keys() == entries)
    if trial:
        recovery.judge_last_run(make_repro(project))
    else:
        tool(project, "repro")
    return trial


def kill_first_run(project: Path, strikes: list[Strike], expected: dict[str, str]) -> list[Trial]:
    """Kill the first run of everything with each of `strikes`, or until it completes; returns the kills."""
    (project / "dvc.lock").unlink()
    shutil.rmtree(project / "metrics")
    recovery = Recovery(project, expected)
    for strike in strikes:
        if not recovery.kill(strike, "-m", "fashion_cnn", "repro"):
            break
    if recovery.trials:
        recovery.judge_last_run(make_repro(project))
    return recovery.trials


def kill_experiment(project: Path, command: tuple, strike: Strike, undisturbed: dict) -> Trial | None:
    """Kill an experiment's first run, go back, and run it again; None if it was complete."""
    forget_caches(project, undisturbed)
    with (project / EDITED).open("a") as edited:
        edited.write("# not committed\n")
    outs = {out["path"]: out["md5"] for out in undisturbed["outs"]} if command == IN_WORKSPACE else {}
    recovery = Recovery(project, contents(project) | outs, IN_EXPERIMENT)
    trial = recovery.kill(strike, "-m", "dvc", *command, is_complete=lambda: bool(experiments(project)))
    wrong = way_back(project)
    if trial:
        trial.lose(wrong)
        recovery.judge_last_run(dvc(project, *command, check=False))
        if [experiment["outs"] for experiment in experiments(project)] != [undisturbed["outs"]]:
            trial.lose("not one experiment with the bytes of the undisturbed one")
        trial.lose(way_back(project))
    git(project, "restore", EDITED)
    dvc(project, "exp", "remove", "--all-commits")
    return trial


def experiments(project: Path) -> list[dict]:
    """What the dvc.lock of each complete experiment says about its training."""
    references = git(project, "for-each-ref", "--format=%(refname)", "refs/exps/??/*/*").split()
    locks = [git(project, "show", f"{reference}:dvc.lock") for reference in references]
    return [yaml.safe_load(lock)["stages"][IN_EXPERIMENT] for lock in locks]


def way_back(project: Path) -> str:
    """Undo what `dvc exp run` leaves in the workspace, killed or not; returns what is still wrong with it."""
    for lock in (project / ".git").glob("*.lock"):
        lock.unlink()  # as git advises; nothing else may do it
    done = try_tool(project, "back")
    if done.returncode:
        return f"`fashion-cnn back` failed: {done.stderr[-300:]}"
    kept = r"^git has changes that your files lack; to restore them: git (.+)$"
    for command in re.findall(kept, done.stdout, re.MULTILINE):
        git(project, *shlex.split(command))
    status = git(project, "status", "--porcelain", "--branch").splitlines()
    if "HEAD (no branch)" in status[0] or status[1:] != [f" M {EDITED}"]:
        return f"not as before: {status}"
    outs = dvc(project, "status").stdout
    return "" if "up to date" in outs else outs


def make_repro(project: Path) -> subprocess.CompletedProcess:
    """Run `make repro` as the Makefile has it, but with this Python."""
    activate = f'PATH="{Path(sys.executable).parent}:$$PATH"'
    return subprocess.run(
        ["make", "-f", ROOT / "Makefile", "-o", ".venv/ready", f"ACTIVATE={activate}", "repro"],
        cwd=project, env=environment(), check=False, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=LIMIT,
    )  # fmt: skip


def lock_entries(project: Path) -> dict[str, dict]:
    """The stages in dvc.lock; none if it is missing or cut short."""
    try:
        return yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    except (FileNotFoundError, yaml.YAMLError, TypeError, KeyError):
        return {}


def contents(project: Path) -> dict[str, str]:
    """Every file below the outputs in dvc.lock with the MD5 of its bytes, as they are on disk."""
    outs = [out for entry in lock_entries(project).values() for out in entry["outs"]]
    paths = [path for out in outs for path in [project / out["path"], *(project / out["path"]).rglob("*")]]
    files = [path for path in paths if path.is_file()]
    return {str(file.relative_to(project)): hashlib.md5(file.read_bytes()).hexdigest() for file in files}


def forget(project: Path, stage: str) -> None:
    """Delete what a stage's first run does not have: its entry in dvc.lock, outputs, caches, checkpoint."""
    entries = lock_entries(project)
    entry = entries.pop(stage)
    (project / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": entries}, sort_keys=False))
    for out in entry["outs"]:
        path = project / out["path"]
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    forget_caches(project, entry)


def forget_caches(project: Path, entry: dict) -> None:
    """Delete the outputs of one entry of dvc.lock from DVC's caches, and all checkpoints."""
    others = [other for other in lock_entries(project).values() if other != entry]
    for path in blobs(project, entry).difference(*(blobs(project, other) for other in others)):
        path.unlink(missing_ok=True)
    digests = {out["md5"] for out in entry["outs"]}
    for path in list((project / ".dvc/cache/runs").rglob("*")):
        if path.is_file() and {out["md5"] for out in yaml.safe_load(path.read_text())["outs"]} == digests:
            path.unlink()
            path.parent.rmdir()  # one result for one set of deps; DVC expects no empty folder
    shutil.rmtree(project / ".checkpoints", ignore_errors=True)


def blobs(project: Path, entry: dict) -> set[Path]:
    """The files in DVC's cache that hold an entry's outputs."""
    cache = project / ".dvc/cache/files/md5"
    found = {cache / out["md5"][:2] / out["md5"][2:] for out in entry["outs"]}
    for folder in [path for path in found if path.suffix == ".dir" and path.exists()]:
        found |= {cache / file["md5"][:2] / file["md5"][2:] for file in json.loads(folder.read_text())}
    return found


def run_statuses(project: Path, training: str) -> list[str]:
    """The status of each MLflow run of a training, from SQLite: MLflow would complete a half-made store."""
    store = f"{(project / 'mlflow.db').as_uri()}?mode=rw"
    query = "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE key = 'dvc_stage' AND value = ?"
    try:
        with closing(sqlite3.connect(store, uri=True)) as database:
            return [status for (status,) in database.execute(query, [training])]
    except sqlite3.OperationalError:  # there is no store yet, or one without tables
        return []


def epochs_of(printed: str) -> tuple[dict[str, int], dict[str, int]]:
    """After which epoch each stage resumed, and the last one that it finished; 0 for none."""
    resumed, last = {}, {}
    stages: dict[str, str] = {}  # the stage that a line is about, by the images at its start; "" for none
    for line in printed.splitlines():
        if line.startswith("Running stage"):
            stage = line.split("'")[1]
            stages |= {stage.partition("@")[2]: stage, "": stage}
            resumed[stage] = last[stage] = 0
        elif found := re.match(r"(?:(\w+): )?(resuming after )?epoch (\d+)", line):
            stage = stages[found[1] or ""]
            last[stage] = int(found[3])
            resumed[stage] = last[stage] if found[2] else resumed[stage]
    return resumed, last
