"""The long form of the tests on trust: prints a table of what was tried, recovered and lost.

Usage: make soak, or python tests/helpers/soak.py [--stage-kills 24] [--folder FOLDER] …; --help lists all
counts. Takes about half an hour on 2 cores. Exits with code 1 if anything is lost.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import crash
import experiments
import mutations
from first_run import FirstRun
from pipeline import SMALL, dvc, outputs, run_queued, set_params, tracked_runs
from project import copy_of_project, git
from recovery import Trial, contents, kill_stage, lock_entries
from servers import lose_server

# More epochs than the tests take, so that kills find some that are done.
PARAMS = SMALL | {"train_cnn": SMALL["train_cnn"] | {"epochs": 6}}
TRAININGS = ("train_toy_cnn", "train_cnn@original", "train_cnn@augmented")


def main() -> None:
    """Try everything; exit with code 1 if anything is lost."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        rows = table(Path(arguments.folder or scratch).resolve(), arguments)
    print("\n| what | tried | recovered | lost |\n|---|---|---|---|")
    for what, trials in rows.items():
        lost = sum(bool(trial.fault) for trial in trials)
        print(f"| {what} | {len(trials)} | {len(trials) - lost} | {lost} |")
    trials = [trial for trials in rows.values() for trial in trials]
    print_notes(trials)
    sys.exit(any(trial.fault for trial in trials))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage-kills", type=int, default=24, help="of a stage, of DVC or of both")
    parser.add_argument(
        "--window-kills", type=int, default=8, help="of DVC, between a stage's end and dvc.lock"
    )
    parser.add_argument("--lock-kills", type=int, default=6, help="of DVC, while it writes dvc.lock")
    parser.add_argument("--pipeline-kills", type=int, default=10, help="of the whole first run")
    parser.add_argument(
        "--experiment-kills", type=int, default=6, help="in the workspace, and as many with --temp"
    )
    parser.add_argument("--servers", type=int, default=3, help="MLflow servers to kill")
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the moments, the stages and the victims")
    parser.add_argument("--folder", help="an empty folder to work in, which is kept with all logs")
    return parser.parse_args()


def table(folder: Path, arguments: argparse.Namespace) -> dict[str, list[Trial]]:
    """Every row's trials, by its text; the order leaves each clone as the next row needs it."""
    rng = random.Random(arguments.seed)
    first, second = prepared(folder / "one" / "clone"), prepared(folder / "two" / "clone")
    expected = contents(first)
    seconds = {stage: crash.seconds_of(first, stage) for stage in lock_entries(first)}
    return {
        "outputs of two clones, the same bytes": two_clones(first, second),
        "`dvc exp run` killed, then the way back": experiment_kills(
            second, experiments.IN_WORKSPACE, rng, arguments.experiment_kills
        ),
        "`dvc exp run --temp` killed": experiment_kills(
            second, experiments.IN_COPY, rng, arguments.experiment_kills
        ),
        "stage, DVC or both killed at a random moment of a stage": stage_kills(
            first, seconds, rng, arguments.stage_kills
        ),
        "DVC killed between a training's end and dvc.lock": window_kills(first, rng, arguments.window_kills),
        "the same, with results that are not the committed ones": window_kills(
            other_results(first), rng, arguments.window_kills
        ),
        "DVC killed while it writes dvc.lock, which is not the committed one": lock_kills(
            first, rng, arguments.lock_kills
        ),
        "`make repro` of everything killed at random moments": pipeline_kills(
            folder, expected, sum(seconds.values()), rng, arguments.pipeline_kills
        ),
        "MLflow servers killed during a training": lost_servers(first, arguments.servers),
        "experiments of 4 queue workers at once, each a finished run": queue_workers(second),
        "mutated params.yaml, IDX and safetensors: read, or refused in one line": mutated_inputs(
            folder / "inputs", arguments.mutations
        ),
    }


def prepared(folder: Path) -> Path:
    """A copy of the project with small params, run to the end, results committed."""
    unrun(folder)
    dvc(folder, "repro", "--force")
    git(folder, "commit", "--quiet", "--all", "--message", "results")
    return folder


def other_results(project: Path) -> Path:
    """The same project after an edit of params and `dvc repro`, so that its dvc.lock is not committed."""
    set_params(project, {"train_toy_cnn": {"seed": 1}, "train_cnn": {"seed": 1}})
    dvc(project, "repro")
    return project


def unrun(folder: Path) -> Path:
    """A copy of the project with small params, committed."""
    folder.mkdir(parents=True)
    copy_of_project(folder)
    set_params(folder, PARAMS)
    git(folder, "commit", "--quiet", "--all", "--message", "small params")
    return folder


def repeat(count: int, attempt: Callable[[], Trial | None]) -> list[Trial]:
    """`count` kills, without those that came too early or too late to cost anything; prints each."""
    trials, attempts = [], 0
    while len(trials) < count:
        attempts += 1
        if attempts > 5 * count + 5:
            raise SystemExit(f"error: {len(trials)} of {attempts} kills hit, expected {count}")
        if trial := attempt():
            trials.append(trial)
            print_trial(trial)
    print(f"{count} of {attempts} kills hit", flush=True)
    return trials


def print_trial(trial: Trial) -> None:
    epochs = f", {trial.saved} epochs saved" if trial.saved else ""
    print(f"{trial.what}: {f'LOST: {trial.fault}' if trial.fault else 'recovered'}{epochs}", flush=True)


def print_notes(trials: list[Trial]) -> None:
    stopped = [trial for trial in trials if trial.epochs and not trial.fault]
    resumed = [trial for trial in stopped if trial.saved]
    print(f"\n{len(resumed)} killed trainings resumed, and saved {sum(t.saved for t in resumed)} epochs.")


def two_clones(first: Path, second: Path) -> list[Trial]:
    mine, other = outputs(first), outputs(second)
    return [Trial(path, "" if mine[path] == digest else "other bytes") for path, digest in other.items()]


def moment(
    rng: random.Random, after: Callable, victim: str, seconds: float, has_epochs: bool
) -> tuple[crash.Strike, str]:
    """A random moment, in half of the trainings the end of an epoch: most of their time is their start."""
    if has_epochs and rng.random() < 0.5:
        epoch = rng.randint(1, PARAMS["train_cnn"]["epochs"])
        return crash.after_text(victim, f"epoch {epoch}/"), f"after epoch {epoch}"
    delay = rng.uniform(0, seconds)
    return after(victim, delay), f"after {delay:.1f} s"


def stage_kills(project: Path, seconds: dict[str, float], rng: random.Random, count: int) -> list[Trial]:
    def attempt() -> Trial | None:
        stage, victim = rng.choice(list(seconds)), rng.choice(crash.VICTIMS)
        strike, when = moment(rng, crash.after_seconds, victim, seconds[stage], stage.startswith("train_cnn"))
        return kill_stage(project, stage, strike, f"{victim} of {stage} {when}")

    return repeat(count, attempt)


def window_kills(project: Path, rng: random.Random, count: int) -> list[Trial]:
    def attempt() -> Trial | None:
        stage, delay = rng.choice(TRAININGS), rng.uniform(0, 0.2)
        what = f"dvc {delay:.3f} s after the end of {stage}"
        return kill_stage(project, stage, crash.after_stage(delay), what)

    return repeat(count, attempt)


def lock_kills(project: Path, rng: random.Random, count: int) -> list[Trial]:
    def attempt() -> Trial | None:
        stage, delay = rng.choice(["build_toy_tensors", *TRAININGS]), rng.uniform(0, 0.03)
        what = f"dvc {delay:.3f} s into its write of dvc.lock after {stage}"
        return kill_stage(project, stage, crash.in_lock_write(delay), what)

    return repeat(count, attempt)


def pipeline_kills(
    folder: Path, expected: dict[str, str], seconds: float, rng: random.Random, count: int
) -> list[Trial]:
    trials = []
    while len(trials) < count:
        project = unrun(folder / f"first-run-{len(trials)}" / "clone")
        killed = FirstRun(project, seconds, rng).kill_until_complete(expected, count - len(trials))
        for trial in killed:
            print_trial(trial)
        trials += killed
    return trials


def experiment_kills(project: Path, command: tuple, rng: random.Random, count: int) -> list[Trial]:
    if not count:
        return []
    entry, seconds = experiments.undisturbed(project)

    def attempt() -> Trial | None:
        victim = rng.choice(crash.VICTIMS)
        strike, when = moment(rng, crash.after_start, victim, seconds, has_epochs=True)
        what = f"{victim} of `dvc {' '.join(command)}` {when}"
        return experiments.kill_experiment(project, command, strike, what, entry)

    return repeat(count, attempt)


def lost_servers(project: Path, count: int) -> list[Trial]:
    trials = [Trial("MLflow server", lose_server(project, epoch)) for epoch in (1, 2, 5)[:count]]
    for trial in trials:
        print_trial(trial)
    return trials


def queue_workers(project: Path) -> list[Trial]:
    failed = run_queued(project, 4, "train_toy_cnn", [f"train_toy_cnn.seed={seed}" for seed in range(1, 9)])
    print(f"queued experiments that failed: {failed}", flush=True)
    found = tracked_runs(project, "tags.dvc_exp_name LIKE 'queued-%' and attributes.status = 'FINISHED'")
    finished = Counter(run.data.tags["dvc_exp_name"] for run in found)
    names = [f"queued-{number}" for number in range(8)]
    return [Trial(name, "" if finished[name] == 1 else f"{finished[name]} finished runs") for name in names]


def mutated_inputs(folder: Path, count: int) -> list[Trial]:
    folder.mkdir()
    kinds = (mutations.params, mutations.idx, mutations.weights)
    return [
        Trial(
            f"mutation {number}", "" if mutations.survives(kinds[number % 3], number, folder) else "not told"
        )
        for number in range(count)
    ]


if __name__ == "__main__":
    main()
