"""Killing a stage, DVC or both at a moment of choice, and what is there afterwards."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from pipeline import dvc, environment


def outputs(project: Path) -> dict[str, str]:
    """Every output in dvc.lock with its digest."""
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


def stage_processes(project: Path) -> list[psutil.Process]:
    """The processes that run a stage's script in `project`."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command, cwd = process.info["cmdline"] or [], process.info["cwd"]
        if cwd == str(project) and any(part.startswith("stages/") for part in command):
            found.append(process)
    return found


def kill_once(project: Path, stage: str, victim: str, delay: float) -> str:
    """Force `stage`, kill `victim` ("stage", "dvc" or "both") after `delay` seconds of it, and repeat.

    Returns "" when afterwards every output has the digest it had before, or what went wrong.
    """
    before = outputs(project)
    log = (project.parent / "killed.log").open("w")
    started = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", stage],
        cwd=project, env=environment(SHELL="/bin/sh"), stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    while started.poll() is None and not stage_processes(project):
        time.sleep(0.01)
    time.sleep(delay)
    running = stage_processes(project)
    if victim in ("dvc", "both"):
        started.kill()
    if victim in ("stage", "both"):
        for process in running:
            if process.is_running():
                os.kill(process.pid, signal.SIGKILL)
    started.wait()
    log.close()
    _, alive = psutil.wait_procs(running, timeout=2)
    if alive:
        return f"{stage} goes on after its DVC was killed"
    repeated = dvc(project, "repro", "--no-run-cache", check=False)
    if repeated.returncode:
        return f"`dvc repro` after a killed {stage} fails: {repeated.stdout[-300:]}"
    after = outputs(project)
    different = [path for path in before if after.get(path) != before[path]]
    return f"{stage}: {', '.join(different)} differ" if different else ""


def random_kill(project: Path, rng: random.Random, stages: list[str]) -> tuple[str, str]:
    """One kill at a random moment; returns its description and what went wrong."""
    stage, victim = rng.choice(stages), rng.choice(["stage", "dvc", "both"])
    delay = rng.uniform(0, 9)
    return f"{victim} of {stage} after {delay:.1f} s", kill_once(project, stage, victim, delay)
