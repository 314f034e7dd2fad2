"""The first run of the whole pipeline, killed again and again until it completes."""

import random
import re
import shutil
from pathlib import Path

from crash import VICTIMS, Started, after_start, stage_processes, wait_until_gone
from pipeline import ran
from recovery import (
    CONTINUES,
    Trial,
    contents,
    last_epoch,
    lock_entries,
    make_repro,
    next_log,
    resumed_epoch,
    run_statuses,
)


class FirstRun:
    """fashion_cnn/commands/repro.py in a copy of the project that has run nothing, with its kills so far."""

    def __init__(self, project: Path, seconds: float, rng: random.Random):
        self.project, self.seconds, self.rng = project, seconds, rng
        self.trials: list[Trial] = []
        self.done: set[str] = set()  # the stages that have stood in dvc.lock
        self.stopped: dict[str, tuple[Trial, int]] = {}  # of each training, its last kill, after which epoch
        (project / "dvc.lock").unlink()
        shutil.rmtree(project / "metrics")

    def kill_until_complete(self, expected: dict[str, str], most: int) -> list[Trial]:
        """Kill `most` times, or until it completes; returns the kills, each with what it lost."""
        while len(self.trials) < most and self.killed():
            pass
        log = next_log(self.project).with_suffix(".again.log")
        code = make_repro(self.project, log)
        self.judge(log.read_text())
        for training, (trial, _) in self.stopped.items():
            self.judge_runs(training, trial)
        if self.trials and (code or contents(self.project) != expected):
            self.trials[-1].lose("the run that was not killed fails, or gives other bytes")
        return self.trials

    def killed(self) -> bool:
        """Run until a random moment and kill; False if the pipeline has completed before."""
        log = next_log(self.project).with_suffix(f".{len(self.trials) + 1}.log")
        started = Started(self.project, log, "-m", "fashion_cnn", "repro")
        victim, delay = self.rng.choice(VICTIMS), self.rng.uniform(0, self.seconds / 2)
        struck = after_start(victim, delay)(started)
        running = stage_processes(self.project)
        started.process.wait()
        gone = wait_until_gone(running, timeout=2)
        self.judge(log.read_text())
        if struck:
            trial = Trial(f"{victim} in the pipeline after {delay:.1f} s")
            trial.fault = "" if gone else CONTINUES
            self.note_kill(trial, log.read_text())
        return struck

    def note_kill(self, trial: Trial, printed: str) -> None:
        """Remember which training was killed, and what had finished."""
        self.trials.append(trial)
        left = set(lock_entries(self.project))
        at_work = [stage for stage in ran(printed) if stage not in left]
        trial.what += f", at work on {' and '.join(at_work) or 'none'}"
        # DVC has no run cache of verify_manual_conv, so if the kill cut dvc.lock short, it runs again.
        self.done = (self.done | left) - ({"verify_manual_conv"} - left)
        for stage, text in sections(printed).items():
            if stage.startswith("train_") and stage not in self.done:
                self.stopped[stage] = trial, max(last_epoch(text), resumed_epoch(text))

    def judge(self, printed: str) -> None:
        """Find faults of earlier kills in what a later run printed."""
        for stage in self.done.intersection(ran(printed)):
            self.trials[-1].lose(f"{stage} ran again, though it had finished")
        for stage, text in sections(printed).items():
            if stage in self.stopped:
                trial, epoch = self.stopped[stage]
                saved = resumed_epoch(text)
                trial.saved += saved
                if saved < epoch:
                    trial.lose(f"{stage} killed after epoch {epoch}, resumed after epoch {saved}")

    def judge_runs(self, training: str, trial: Trial) -> None:
        """A fault if a killed training has not exactly one finished run."""
        runs = list(run_statuses(self.project, training).values())
        if runs != ["FINISHED"]:
            trial.lose(f"the runs of {training} are {', '.join(runs)}, expected one that has finished")


def sections(printed: str) -> dict[str, str]:
    """What each stage printed that ran; the lines of two that run at once begin with their images."""
    texts: dict[str, str] = {}
    stages: dict[str, str] = {}  # the last one of these images, and of all under ""
    for line in printed.splitlines():
        if found := re.fullmatch(r"Running stage '(.+)':", line):
            stage = found[1]
            stages |= {stage.partition("@")[2]: stage, "": stage}
            texts[stage] = ""
        elif stages:
            images, colon, rest = line.partition(": ")
            own = colon and images in stages
            texts[stages[images if own else ""]] += f"{rest if own else line}\n"
    return texts
