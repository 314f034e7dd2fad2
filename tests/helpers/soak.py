"""The long form of the trust tests: prints a table of what was tried, recovered and lost.

Usage: make soak, or python tests/helpers/soak.py [--stage-kills 24] [--folder FOLDER] …; --help lists all
counts. It takes about half an hour on 2 cores, and exits with code 1 if anything is lost.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mutations
import recovery
from crash import LOCK_WRITE, STAGE_END, STAGE_START, START, VICTIMS, Strike, seconds_of
from fashion_cnn.project.catalog import TRAININGS
from pipeline import SMALL, dvc, outputs, run_queued, set_params, tracked_runs
from project import copy_of_project, git
from recovery import Trial
from servers import lose_server

# More epochs than in the tests, so that some are done when a kill comes.
PARAMS = SMALL | {"train_cnn": SMALL["train_cnn"] | {"epochs": 6}}


def main() -> None:
    """Try everything; exit with code 1 if anything is lost."""
    counts = parse_arguments()
    random.seed(counts.seed)
    with tempfile.TemporaryDirectory() as scratch:
        rows = table(Path(counts.folder or scratch).resolve(), counts)
    print("\n| what | tried | recovered | lost |\n|---|---|---|---|")
    for what, trials in rows.items():
        recovered = sum(not trial.fault for trial in trials)
        print(f"| {what} | {len(trials)} | {recovered} | {len(trials) - recovered} |")
    trials = [trial for trials in rows.values() for trial in trials]
    saved = [trial.saved for trial in trials if trial.saved and not trial.fault]
    print(f"\n{len(saved)} killed trainings resumed, and saved {sum(saved)} epochs.")
    lost = [trial for trial in trials if trial.fault]
    print(*lost, sep="\n")
    sys.exit(bool(lost))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument, type=int)
    add("--stage-kills", default=24, help="kills of a stage, DVC or both")
    add("--window-kills", default=8, help="kills of DVC between a stage's end and dvc.lock")
    add("--lock-kills", default=6, help="kills of DVC while it writes dvc.lock")
    add("--pipeline-kills", default=10, help="kills of the whole first run")
    add("--experiment-kills", default=6, help="kills in the workspace, and as many with --temp")
    add("--servers", default=3, help="MLflow servers to kill")
    add("--mutations", default=500)
    add("--seed", default=0, help="seed for the moments, stages and victims")
    parser.add_argument("--folder", help="an empty folder to work in; it is kept, with all logs")
    return parser.parse_args()


def table(folder: Path, counts: argparse.Namespace) -> dict[str, list[Trial]]:
    """Every row's trials, by its text; the order leaves each clone as the next row needs it."""
    first, second = prepared(folder / "one" / "clone"), prepared(folder / "two" / "clone")
    expected, trainings = recovery.contents(first), list(TRAININGS)
    force = ("repro", "--force", "--single-item")
    seconds = {stage: seconds_of(first, STAGE_START, *force, stage) for stage in recovery.lock_entries(first)}
    experiment_seconds = seconds_of(second, START, *recovery.IN_COPY)
    [entry] = recovery.experiments(second)
    dvc(second, "exp", "remove", "--all-commits")
    rows = {
        "outputs of two clones, the same bytes": two_clones(first, second),
        "`dvc exp run` killed, then `fashion-cnn back`": repeat(
            counts.experiment_kills, experiment_kill, second, recovery.IN_WORKSPACE, experiment_seconds, entry
        ),
        "`dvc exp run --temp` killed": repeat(
            counts.experiment_kills, experiment_kill, second, recovery.IN_COPY, experiment_seconds, entry
        ),
        "stage, DVC or both killed at a random moment of a stage": repeat(
            counts.stage_kills, stage_kill, first, seconds
        ),
        "DVC killed between a training's end and dvc.lock": repeat(
            counts.window_kills, dvc_kill, first, trainings, STAGE_END, 0.2
        ),
    }
    set_params(first, {"train_toy_cnn": {"seed": 1}, "train_cnn": {"seed": 1}})
    dvc(first, "repro")
    return rows | {
        "the same, with results that are not the committed ones": repeat(
            counts.window_kills, dvc_kill, first, trainings, STAGE_END, 0.2
        ),
        "DVC killed while it writes dvc.lock, which is not the committed one": repeat(
            counts.lock_kills, dvc_kill, first, ["build_toy_tensors", *trainings], LOCK_WRITE, 0.03
        ),
        "`make repro` of everything killed at random moments": pipeline_kills(
            counts.pipeline_kills, folder, sum(seconds.values()), expected
        ),
        "MLflow servers killed during a training": lost_servers(counts.servers, first),
        "experiments of 4 queue workers at once, each a finished run": queue_workers(second),
        "mutated params.yaml, IDX and safetensors: read, or refused in one line": mutated_inputs(
            counts.mutations, folder / "inputs"
        ),
    }


def prepared(folder: Path) -> Path:
    """A copy of the project with small params, run to the end, results committed."""
    unrun(folder)
    dvc(folder, "repro", "--force")
    git(folder, "commit", "--quiet", "--all", "--message", "results")
    return folder


def unrun(folder: Path) -> Path:
    """A copy of the project with small params, committed."""
    folder.mkdir(parents=True)
    copy_of_project(folder)
    set_params(folder, PARAMS)
    git(folder, "commit", "--quiet", "--all", "--message", "small params")
    return folder


def two_clones(first: Path, second: Path) -> list[Trial]:
    mine, other = outputs(first), outputs(second)
    return [Trial(path, "" if mine[path] == digest else "other bytes") for path, digest in other.items()]


def repeat(count: int, attempt: Callable[..., Trial | None], *arguments: object) -> list[Trial]:
    """`count` kills, not counting those too early or too late to cost anything; prints each."""
    trials, attempts = [], 0
    while len(trials) < count:
        attempts += 1
        if attempts > 5 * count + 5:
            raise SystemExit(f"error: {len(trials)} of {attempts} kills hit, expected {count}")
        if trial := attempt(*arguments):
            trials.append(trial)
            print(trial, flush=True)
    print(f"{count} of {attempts} kills hit", flush=True)
    return trials


def experiment_kill(project: Path, command: tuple, seconds: float, entry: dict) -> Trial | None:
    return recovery.kill_experiment(project, command, random_strike(START, seconds, has_epochs=True), entry)


def stage_kill(project: Path, seconds: dict[str, float]) -> Trial | None:
    stage = random.choice(list(seconds))
    strike = random_strike(STAGE_START, seconds[stage], has_epochs=stage.startswith("train_cnn"))
    return recovery.kill_stage(project, stage, strike)


def dvc_kill(project: Path, stages: list[str], moment: str, seconds: float) -> Trial | None:
    strike = Strike("dvc", moment, random.uniform(0, seconds))
    return recovery.kill_stage(project, random.choice(stages), strike)


def random_strike(moment: str, seconds: float, has_epochs: bool = False) -> Strike:
    """Up to `seconds` after a moment; for trainings, half at an epoch's end, because start-up dominates."""
    victim = random.choice(VICTIMS)
    if has_epochs and random.random() < 0.5:
        return Strike(victim, f"epoch {random.randint(1, PARAMS['train_cnn']['epochs'])}/")
    return Strike(victim, moment, random.uniform(0, seconds))


def pipeline_kills(count: int, folder: Path, seconds: float, expected: dict[str, str]) -> list[Trial]:
    trials: list[Trial] = []
    while more := count - len(trials):
        project = unrun(folder / f"first-run-{len(trials)}" / "clone")
        strikes = [random_strike(START, seconds / 2) for _ in range(more)]
        killed = recovery.kill_first_run(project, strikes, expected)
        print(*killed, sep="\n", flush=True)
        trials += killed
    return trials


def lost_servers(count: int, project: Path) -> list[Trial]:
    epochs = (1, 2, 5)[:count]
    return [Trial(f"MLflow server, after epoch {epoch}", lose_server(project, epoch)) for epoch in epochs]


def queue_workers(project: Path) -> list[Trial]:
    failed = run_queued(project, 4, "train_toy_cnn", [f"train_toy_cnn.seed={seed}" for seed in range(1, 9)])
    print(f"queued experiments that failed: {failed}", flush=True)
    found = tracked_runs(project, "tags.dvc_exp_name LIKE 'queued-%' and attributes.status = 'FINISHED'")
    finished = Counter(run.data.tags["dvc_exp_name"] for run in found)
    names = [f"queued-{number}" for number in range(8)]
    return [Trial(name, "" if finished[name] == 1 else f"{finished[name]} finished runs") for name in names]


def mutated_inputs(count: int, folder: Path) -> list[Trial]:
    folder.mkdir()
    kinds = (mutations.params, mutations.idx, mutations.weights)
    told = [mutations.survives(kinds[number % 3], number, folder) for number in range(count)]
    return [Trial(f"mutation {number}", "" if one else "not reported") for number, one in enumerate(told)]


if __name__ == "__main__":
    main()
