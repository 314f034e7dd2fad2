"""Starting a command in a copy of the project, and killing it or its stage at a chosen moment."""

import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline import environment

VICTIMS = ("stage", "dvc", "both")
STAGE_END, LOCK_WRITE = "the stage's end", "the opening of dvc.lock to write it"
STAGE_START = "Running stage"  # as DVC prints it
START = ""  # at once, before anything is printed


class Started:
    """A command running in its own session, with its output in a log."""

    def __init__(self, project: Path, log: Path, *command: str, **more: str):
        self.project, self.log = project, log
        self.killed_at_work = False  # whether a stage was running when the kill came
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=project, env=environment(PYTHONUNBUFFERED="1", SHELL="/bin/sh", **more), text=True,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> bool:
        return self.process.poll() is not None

    def printed(self) -> str:
        return self.log.read_text()


def stage_processes(project: Path) -> list[psutil.Process]:
    """The processes that run a stage's script in `project`, or in one of DVC's temporary copies of it."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command, cwd = process.info["cmdline"] or [], process.info["cwd"] or ""
        is_here = cwd == str(project) or cwd.startswith(f"{project}/.dvc/tmp/")
        if is_here and any(part.startswith("stages.") for part in command):
            found.append(process)
    return found


def wait_until_gone(processes: list[psutil.Process], timeout: float) -> bool:
    """Whether all of them have ended within `timeout` seconds; zombies count as ended."""
    deadline = time.monotonic() + timeout
    for process in processes:
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(process.pid)
            ready = select.select([handle], [], [], max(0, deadline - time.monotonic()))[0]
            os.close(handle)
            if not ready:
                return False
    return True


def kill(started: Started, victim: str) -> bool:
    """Kill "stage" (DVC if none is running), "dvc" or "both" with SIGKILL; False if all had ended."""
    running = stage_processes(started.project)
    if started.ended():
        return False
    started.killed_at_work = bool(running)
    if victim != "stage" or not running:
        started.process.kill()
    if victim != "dvc":
        for process in running:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    started.process.wait()
    return True


def wait_for_text(started: Started, text: str) -> None:
    """Wait until `text` is printed, or the command has ended."""
    while text not in started.printed() and not started.ended():
        time.sleep(0.01)


def wait_for_stage(started: Started) -> list[psutil.Process]:
    """The stage's processes once there are some; none if the command ends without one."""
    while not (running := stage_processes(started.project)) and not started.ended():
        time.sleep(0.01)
    return running


def wait_for_stage_end(started: Started) -> None:
    """Wait until DVC hashes and caches what the stage wrote."""
    wait_until_gone(wait_for_stage(started), timeout=600)


def wait_for_lock_write(started: Started) -> None:
    """Wait until DVC has opened dvc.lock to write it, which empties the file."""
    lock = started.project / "dvc.lock"
    before = lock.stat().st_size
    wait_for_stage_end(started)
    while lock.stat().st_size == before and not started.ended():
        pass  # the write takes a hundredth of a second, so sleep would miss it


@dataclass(frozen=True)
class Strike:
    """A kill `delay` seconds after a moment: STAGE_END, LOCK_WRITE, or a text that the command prints."""

    victim: str
    moment: str
    delay: float = 0

    def __str__(self) -> str:
        return f"{self.victim} killed {self.delay:.3f} s after {self.moment or 'the start'}"

    def hits(self, started: Started) -> bool:
        """Wait and kill; False if the command ended first."""
        if self.moment == STAGE_END:
            wait_for_stage_end(started)
        elif self.moment == LOCK_WRITE:
            wait_for_lock_write(started)
        else:
            wait_for_text(started, self.moment)
        with suppress(subprocess.TimeoutExpired):
            started.process.wait(timeout=self.delay)
        return kill(started, self.victim)


def seconds_of(project: Path, since: str, *command: str) -> float:
    """How long DVC takes for an undisturbed command, from when it prints `since`."""
    started = Started(project, project.parent / "logs/undisturbed.log", "-m", "dvc", *command)
    wait_for_text(started, since)
    began = time.monotonic()
    assert started.process.wait() == 0, started.printed()
    return time.monotonic() - began
