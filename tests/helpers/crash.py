"""Starting DVC in a copy of the project, and killing it or its stage at a moment of choice."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline import environment

VICTIMS = ("stage", "dvc", "both")


class Started:
    """A command at work in a session of its own, with all that it prints in a log."""

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


# Kills something of what was started when its moment has come; False if that had ended before.
Strike = Callable[[Started], bool]


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
    """Whether all of them have ended within `timeout` seconds; those that nobody has waited for count."""
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
    """Kill "stage", "dvc" or "both" with SIGKILL; False if the victim has ended."""
    running = stage_processes(started.project)
    if started.ended() or (victim == "stage" and not running):
        return False
    started.killed_at_work = bool(running)
    if victim in ("dvc", "both"):
        started.process.kill()
    if victim in ("stage", "both"):
        for process in running:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    started.process.wait()
    return True


def wait_for_stage(started: Started) -> list[psutil.Process]:
    """The stage's processes once there are some; none if the command ends without one."""
    while not (running := stage_processes(started.project)) and not started.ended():
        time.sleep(0.01)
    return running


def after_start(victim: str, delay: float) -> Strike:
    """Kill `delay` seconds after the command's own start; DVC if no stage is running then."""

    def strike(started: Started) -> bool:
        with suppress(subprocess.TimeoutExpired):
            started.process.wait(timeout=delay)
        return kill(started, victim if stage_processes(started.project) else "dvc")

    return strike


def after_seconds(victim: str, delay: float) -> Strike:
    """Kill `delay` seconds after the stage's start."""

    def strike(started: Started) -> bool:
        wait_for_stage(started)
        time.sleep(delay)
        return kill(started, victim)

    return strike


def wait_for_text(started: Started, text: str) -> None:
    """Wait until `text` is printed, or the command has ended."""
    while text not in started.printed() and not started.ended():
        time.sleep(0.01)


def after_text(victim: str, text: str) -> Strike:
    """Kill as soon as `text` is printed."""

    def strike(started: Started) -> bool:
        wait_for_text(started, text)
        return kill(started, victim)

    return strike


def after_stage(delay: float) -> Strike:
    """Kill DVC `delay` seconds after the stage's end, while it hashes and caches what the stage wrote."""

    def strike(started: Started) -> bool:
        wait_until_gone(wait_for_stage(started), timeout=600)
        time.sleep(delay)
        return kill(started, "dvc")

    return strike


def in_lock_write(delay: float) -> Strike:
    """Kill DVC `delay` seconds after it has opened dvc.lock to write it, which empties the file."""

    def strike(started: Started) -> bool:
        lock = started.project / "dvc.lock"
        before = lock.stat().st_size
        wait_until_gone(wait_for_stage(started), timeout=600)
        while lock.stat().st_size == before and not started.ended():
            pass  # the write takes a hundredth of a second: sleep would miss it
        time.sleep(delay)
        return kill(started, "dvc")

    return strike


def seconds_of(project: Path, stage: str) -> float:
    """How long a forced stage and DVC's part in it take, from the stage's start."""
    log = project.parent / "logs" / "seconds.log"
    started = Started(project, log, "-m", "dvc", "repro", "--force", "--single-item", stage)
    wait_for_stage(started)
    began = time.monotonic()
    assert started.process.wait() == 0, started.printed()
    return time.monotonic() - began
