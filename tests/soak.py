"""The long form of the tests on trust: prints a table of what was tried, survived and lost.

Usage: make soak, or python tests/soak.py [--kills 50] [--mutations 500]. Takes about an hour.
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
from crash import outputs, random_kill
from pipeline import SMALL, dvc, set_params


def prepared(folder: Path) -> Path:
    """A copy of the project with small params, run to the end."""
    folder.mkdir()
    copy_of_project(folder)
    set_params(folder, SMALL)
    git(folder, "commit", "--quiet", "--all", "--message", "small params")
    dvc(folder, "repro", "--force")
    return folder


def main() -> None:
    """Try everything; exit with code 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--mutations", type=int, default=500)
    arguments = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        first, second = prepared(folder / "first"), prepared(folder / "second")
        same = sum(outputs(first)[path] == digest for path, digest in outputs(second).items())
        table.append(("outputs of two clones, same bytes", len(outputs(first)), same))

        stages = list(yaml.safe_load((first / "dvc.lock").read_text())["stages"])
        rng, survived = random.Random(0), 0
        for number in range(arguments.kills):
            what, fault = random_kill(first, rng, stages)
            survived += not fault
            print(f"kill {number + 1}/{arguments.kills}: {what}: {fault or 'survived'}", flush=True)
        table.append(("kills at random moments, all stages", arguments.kills, survived))

        inputs = folder / "inputs"
        inputs.mkdir()
        kinds = (mutations.params, mutations.idx, mutations.weights)
        fine = sum(mutations.survives(kinds[n % 3], n, inputs) for n in range(arguments.mutations))
        table.append(("mutated params, IDX and weights", arguments.mutations, fine))
    print("\n| what | tried | survived | lost |\n|---|---|---|---|")
    for what, tried, kept in table:
        print(f"| {what} | {tried} | {kept} | {tried - kept} |")
    sys.exit(any(tried != kept for _, tried, kept in table))


if __name__ == "__main__":
    main()
