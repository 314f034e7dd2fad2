"""Killing the first run of a stage, running it again, and what that recovered and what it lost."""

import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import yaml

from crash import Started, Strike, stage_processes, wait_until_gone
from pipeline import environment, ran
from project import ROOT

CONTINUES = "the stage continues after its DVC was killed"


@dataclass
class Trial:
    """One kill: what it was, what it lost for good ("" for nothing), and how many epochs were saved.

    `epochs` are those finished before the kill.
    """

    what: str
    fault: str = ""
    epochs: int = 0
    saved: int = 0

    def lose(self, fault: str) -> None:
        self.fault = fault


def lock_entries(project: Path) -> dict[str, dict]:
    """The stages in dvc.lock; none if it is missing or cut short."""
    try:
        return yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    except (FileNotFoundError, yaml.YAMLError, TypeError, KeyError):
        return {}


def contents(project: Path) -> dict[str, str]:
    """Every file below the outputs in dvc.lock with the MD5 of its bytes, as they are on disk."""
    found = {}
    for entry in lock_entries(project).values():
        for out in entry["outs"]:
            path = project / out["path"]
            for file in [path, *path.rglob("*")]:
                if file.is_file():
                    found[str(file.relative_to(project))] = hashlib.md5(file.read_bytes()).hexdigest()
    return found


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
    kept = set().union(*(blobs(project, other) for other in others))
    for digest in blobs(project, entry) - kept:
        blob_path(project, digest).unlink(missing_ok=True)
    digests = {out["md5"] for out in entry["outs"]}
    for path in list((project / ".dvc/cache/runs").rglob("*")):
        if path.is_file() and {out["md5"] for out in yaml.safe_load(path.read_text())["outs"]} == digests:
            path.unlink()
            path.parent.rmdir()  # one result for one set of deps; DVC expects no empty folder
    shutil.rmtree(project / ".checkpoints", ignore_errors=True)


def blobs(project: Path, entry: dict) -> set[str]:
    """The digests of all files in DVC's cache that hold an entry's outputs."""
    found = {out["md5"] for out in entry["outs"]}
    for digest in [digest for digest in found if digest.endswith(".dir")]:
        if blob_path(project, digest).exists():
            found |= {file["md5"] for file in json.loads(blob_path(project, digest).read_text())}
    return found


def blob_path(project: Path, digest: str) -> Path:
    return project / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def make_repro(project: Path, log: Path) -> int:
    """Run `make repro` as the Makefile has it, but with this Python; returns its exit code."""
    activate = f'PATH="{Path(sys.executable).parent}:$$PATH"'
    command = ["make", "-f", ROOT / "Makefile", "-o", ".venv/ready", f"ACTIVATE={activate}", "repro"]
    with log.open("w") as output:
        return subprocess.run(
            command, cwd=project, env=environment(), stdout=output, stderr=output, check=False
        ).returncode


def run_statuses(project: Path, training: str) -> dict[str, str]:
    """The status of every MLflow run of a training, by its id.

    From SQLite itself: MLflow's client would complete a store that a kill has left half made.
    """
    store = project / "mlflow.db"
    if not store.exists():
        return {}
    query = (
        "SELECT run_uuid, status FROM runs JOIN tags USING (run_uuid) WHERE key = 'dvc_stage' AND value = ?"
    )
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=rw", uri=True)) as database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE name IN ('runs', 'tags')").fetchall()
        return dict(database.execute(query, [training])) if len(tables) == 2 else {}


def last_epoch(printed: str) -> int:
    return max(map(int, re.findall(r"^epoch (\d+)/", printed, re.MULTILINE)), default=0)


def resumed_epoch(printed: str) -> int:
    """After which epoch a training went on; 0 if it started over."""
    found = re.search(r"^.*\bafter epoch (\d+)$", printed, re.MULTILINE)
    return int(found[1]) if found else 0


def kill_stage(project: Path, stage: str, strike: Strike, what: str = "") -> Trial | None:
    """Kill the first run of a stage, run `make repro`, and compare; None if there was nothing to recover."""
    before, runs, entries = contents(project), run_statuses(project, stage), set(lock_entries(project))
    forget(project, stage)
    log = next_log(project)
    started = Started(project, log, "-m", "dvc", "repro", "--single-item", stage)
    struck = strike(started)
    running = stage_processes(project)
    started.process.wait()
    if not wait_until_gone(running, timeout=2):
        return Trial(what, CONTINUES)
    left = set(lock_entries(project))
    struck = struck and left != entries
    again = log.with_suffix(".again.log")
    code = make_repro(project, again)
    if not struck:
        assert code == 0, again.read_text()
        return None
    trial = Trial(what, epochs=last_epoch(log.read_text()), saved=resumed_epoch(again.read_text()))
    if code:
        trial.lose(f"`make repro` fails: {again.read_text()[-300:]}")
    elif contents(project) != before:
        trial.lose("other bytes than those of the undisturbed run")
    else:
        judge_reruns(trial, stage, left, again.read_text(), started.killed_at_work)
        if stage.startswith("train_") and not trial.fault:
            judge_training(trial, project, stage, runs, again.read_text())
    return trial


def judge_reruns(trial: Trial, stage: str, left: set[str], again: str, killed_at_work: bool) -> None:
    """A fault if more ran again than what was killed, or nothing did; `left` is what dvc.lock still had."""
    # DVC has no run cache of verify_manual_conv, so it runs again if its entry in dvc.lock is cut off.
    replaced = "the committed one replaces it" in again
    has_no_entry = {"verify_manual_conv"} - (set() if replaced else left)
    reran = set(ran(again)) - (has_no_entry - {stage})
    if reran - {stage}:
        trial.lose(f"stages ran again that had finished: {sorted(reran)}")
    elif not reran and not killed_at_work and f"Stage '{stage}' is cached" in again:
        trial.what += ", when DVC's run cache had it"
    elif not reran and not killed_at_work and replaced:
        trial.what += ", when the committed dvc.lock had it"
    elif not reran:
        trial.lose("nothing had to be recovered")


def judge_training(trial: Trial, project: Path, stage: str, before: dict[str, str], again: str) -> None:
    """A fault if a training lost epochs, or has not one finished run; `before` are its runs of earlier."""
    runs = run_statuses(project, stage)
    if set(runs.values()) != {"FINISHED"} or len(runs) != max(1, len(before)):
        trial.lose(f"its runs are {', '.join(runs.values())}, expected {max(1, len(before))} finished")
    elif trial.saved < trial.epochs and stage in ran(again):
        trial.lose(f"killed after epoch {trial.epochs}, resumed after epoch {trial.saved}")


def next_log(project: Path) -> Path:
    """A new name for what a killed command prints, numbered, beside the project."""
    folder = project.parent / "logs"
    folder.mkdir(exist_ok=True)
    return folder / f"{len(list(folder.glob('*.again.log'))) + 1:03}.log"
