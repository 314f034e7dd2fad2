"""The long form of the tests on trust: prints a table of what was tried, survived and lost.

Usage: make soak, or python tests/soak.py [--kills 50] [--mutations 500]. Takes about a quarter of an hour.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "stages")]

import mutations
import yaml
from conftest import copy_of_project, git
from crash import lose_server, outputs, random_kill, seconds_of
from pipeline import SMALL, dvc, run_queued, set_params, tracked_runs


def prepared(folder: Path) -> Path:
    """A copy of the project with small params, run to the end."""
    folder.mkdir(parents=True)
    copy_of_project(folder)
    set_params(folder, SMALL)
    git(folder, "commit", "--quiet", "--all", "--message", "small params")
    dvc(folder, "repro", "--force")
    return folder


def two_clones(first: Path, second: Path) -> tuple[str, int, int]:
    mine, other = outputs(first), outputs(second)
    same = sum(mine[path] == digest for path, digest in other.items())
    return "outputs of two clones side by side, the same bytes", len(mine), same


def kills(project: Path, count: int) -> tuple[str, int, int]:
    stages = list(yaml.safe_load((project / "dvc.lock").read_text())["stages"])
    seconds = {stage: seconds_of(project, stage) for stage in stages}
    rng, survived = random.Random(0), 0
    for number in range(1, count + 1):
        what, fault = random_kill(project, rng, seconds)
        survived += not fault
        print(f"kill {number}/{count}: {what}: {fault or 'survived'}", flush=True)
    return "kill -9 of a stage, of DVC or of both, at random moments of all stages", count, survived


def lost_servers(project: Path) -> tuple[str, int, int]:
    lost = [lose_server(project, epoch) for epoch in (1, 2, 2)]
    print(f"MLflow servers: {lost}", flush=True)
    return "MLflow servers killed during a training", len(lost), lost.count("")


def queue_workers(project: Path) -> tuple[str, int, int]:
    failed = run_queued(project, 4, "train_toy_cnn", [f"train_toy_cnn.seed={seed}" for seed in range(1, 9)])
    print(f"queued experiments that failed: {failed}", flush=True)
    found = tracked_runs(project, "tags.dvc_exp_name LIKE 'queued-%' and attributes.status = 'FINISHED'")
    return "experiments of 4 queue workers at once, each a finished run", 8, len(found)


def mutated_inputs(folder: Path, count: int) -> tuple[str, int, int]:
    folder.mkdir()
    kinds = (mutations.params, mutations.idx, mutations.weights)
    fine = sum(mutations.survives(kinds[number % 3], number, folder) for number in range(count))
    return "mutated params.yaml, IDX and safetensors: read, or refused in one line", count, fine


def main() -> None:
    """Try everything; exit with code 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--mutations", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first, second = prepared(folder / "one" / "clone"), prepared(folder / "two" / "clone")
        table = [
            two_clones(first, second),
            kills(first, arguments.kills),
            lost_servers(first),
            queue_workers(second),
            mutated_inputs(folder / "inputs", arguments.mutations),
        ]
    print("\n| what | tried | survived | lost |\n|---|---|---|---|")
    for what, tried, kept in table:
        print(f"| {what} | {tried} | {kept} | {tried - kept} |")
    sys.exit(any(tried != kept for _, tried, kept in table))


if __name__ == "__main__":
    main()
