"""Measure the project against the lesson's own loops, and write benchmarks/results.md.

Usage, after `make repro`: make bench. It takes one to two hours; the two sides run in turn, A B A B,
so that a drift of the machine's speed affects both. --quick takes a few steps, to try the script.
"""

import argparse
import json
import subprocess
import sys
from contextlib import contextmanager

import ladder
from report import ROOT, Report, conditions, spread

from pipeline import first_run_rows, pipeline_times

RESULTS = ROOT / "benchmarks/results.md"
SAME_RESULT = ("augment", "load")  # the result is a shape or a count
FIRST = {"steps": ("steps", 5), "epoch": ("steps", 5), "toy": ("toy", 5), "augment": ("augment", 100)}
BUSY = [sys.executable, "-c", "while True: pass"]


class Side:
    """A worker process for one side of a comparison."""

    def __init__(self, name: str):
        command = [sys.executable, str(ROOT / "benchmarks/worker.py"), name]
        # What the worker's libraries print before it is ready is skipped; after that, each answer is a line.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while self._line() != "ready\n":
            pass

    def ask(self, case: str, argument=None) -> tuple[float, object]:
        """Run one case; returns (seconds, result)."""
        self.process.stdin.write(json.dumps([case, argument]) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self._line()))

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("error: a worker of the benchmark died, expected an answer")
        return line

    def close(self) -> None:
        """End the worker."""
        self.process.stdin.close()
        self.process.wait()


def compare(lesson: Side, project: Side, case: str, argument, rounds: int) -> tuple[list, list]:
    """Run a case on both sides in turn; returns the seconds of each."""
    times = ([], [])
    for _ in range(rounds):
        answers = [side.ask(case, argument) for side in (lesson, project)]
        if case in SAME_RESULT and answers[0][1] != answers[1][1]:
            sys.exit(f"error: {case}: the lesson did {answers[0][1]}, the project {answers[1][1]}")
        for seconds, (took, _) in zip(times, answers, strict=True):
            seconds.append(took)
    return times


@contextmanager
def a_core_taken():
    """Keep one core busy with another process."""
    process = subprocess.Popen(BUSY)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def comparison_rows(report: Report, quick: bool) -> None:
    """Sections a to d, quiet and with a core taken."""
    steps, epochs, images = (5, 20, 1000) if quick else (150, 2000, 60_000)
    rounds = 2 if quick else 5
    # name, case, argument, rounds, unit, what to divide seconds by
    cases = [
        ("training step, batch 32", "steps", steps, 2 * rounds, "ms", steps / 1000),
        ("training epoch, 55,000 images", "epoch", None, 3, "s", 1),
        ("toy, 2,000 epochs of 2 images", "toy", epochs, rounds, "s", 1),
        ("imgaug over 60,000 images", "augment", images, 3, "s", 1),
        ("reading the data, and batches of 60,000 images", "load", None, 3, "s", 1),
    ]
    if quick:
        cases = [case for case in cases if case[1] != "epoch"]
    for title, busy in (("Machine otherwise quiet", False), ("Another process holds one core", True)):
        report.heading(title)
        rows = []
        for name, case, argument, count, unit, divisor in cases:
            if busy and case == "epoch":
                continue  # the steps show it in a twentieth of the time
            lesson, project = Side("lesson"), Side("project")
            for side in (lesson, project):  # one-time work: imports, first allocations
                side.ask(*FIRST.get(case, (case, argument)))
            if busy:
                with a_core_taken():
                    times = compare(lesson, project, case, argument, count)
            else:
                times = compare(lesson, project, case, argument, count)
            lesson.close()
            project.close()
            theirs, ours = ([value / divisor for value in side] for side in times)
            ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
            digits = 1 if unit == "ms" else 2
            rows.append(
                f"{name} | {spread(theirs, digits)} {unit} | {spread(ours, digits)} {unit} "
                f"| {spread(ratios)}× | {count}"
            )
        report.table("what | lesson | project | lesson ÷ project | rounds", rows)


def pipeline_rows(report: Report, rounds: int) -> None:
    """Section e."""
    report.heading("The pipeline around the training", "Seconds, median (min-max).")
    quiet = pipeline_times(rounds)
    with a_core_taken():
        busy = pipeline_times(rounds)
    report.table("what | quiet | a core taken", [f"{what} | {quiet[what]} | {busy[what]}" for what in quiet])


def grown(times: int) -> tuple[float, float]:
    """Seconds and peak MiB on `times` times the images, in a process of its own."""
    project = Side("project")
    seconds, memory = project.ask("growth", times)
    project.close()
    return seconds, memory


def growth_rows(report: Report, quick: bool) -> None:
    """Section f."""
    report.heading("Growth", "Data set tiled; 200 steps of batch 32; peak memory of the whole process.")
    rows = []
    for times in (1, 2) if quick else (1, 2, 5, 10):
        quiet, memory = grown(times)
        with a_core_taken():
            busy, _ = grown(times)
        size = f"{60_000 * times:,} | {47.04 * times:.0f} MB"
        rows.append(f"{times}× | {size} | {quiet:.1f} s | {busy:.1f} s | {memory:.0f} MiB")
    report.table("size | images | as uint8 | tiling and 200 steps | with a core taken | peak memory", rows)


def accuracy_rows(report: Report) -> None:
    """Section g: the accuracy for a given time."""
    report.heading(
        "Time to accuracy",
        "Seed 0, one run each: the whole stage train_cnn, with imports and validation, against only the five "
        "epochs of the lesson's own loop, estimated from steps before and after.",
    )
    known, rows = ladder.rungs(), []
    for name in (ladder.OWN_LOOP, "fast", "long"):
        row = ladder.run(name, known[name], seed=0)
        rows.append(f"{name} | {row['seconds']:.0f} | {ladder.share(row):.2f} | {row['test_accuracy']:.2%}")
    report.table("rung | seconds | share of the lesson's | test accuracy", rows)


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to try the script")
    quick = parser.parse_args().quick
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--quiet"], cwd=ROOT, capture_output=True, check=False
    )
    if status.returncode:
        sys.exit("error: the pipeline is not up to date, expected a finished `make repro`")
    report = Report()
    report.note(conditions())
    comparison_rows(report, quick)
    pipeline_rows(report, rounds=1 if quick else 5)
    growth_rows(report, quick)
    if quick:
        print("\n--quick: results.md is unchanged")
        return
    accuracy_rows(report)
    first_run_rows(report)
    RESULTS.write_text("\n".join(report.lines).rstrip() + "\n")
    print(f"\nwrote {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
