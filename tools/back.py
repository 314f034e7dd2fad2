"""Return from experiments to the committed params and results, without training again. Usage: make back.

Restores params.yaml, dvc.lock and metrics/ from the last commit, also what `dvc exp run` has staged.
Code is left alone. Results stay in DVC's cache, so the way forth is as short: `dvc exp apply NAME`.
"""

import json
import subprocess
import sys
from pathlib import Path

from dvc.utils.serialize import dump_yaml
from mend_lock import LOCK, read_lock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))

from lib.errors import StageError, run_stage
from lib.lineage import GitError, git

SETTINGS_AND_RESULTS = ("params.yaml", "dvc.lock", "metrics")


def main() -> None:
    """Restore the files, then let DVC restore the outputs."""
    try:
        git("restore", "--source=HEAD", "--staged", "--worktree", "--", *SETTINGS_AND_RESULTS)
    except GitError as error:
        raise StageError(f"params, dvc.lock and metrics cannot be restored: {error}") from None
    print(f"restored from the last commit: {', '.join(SETTINGS_AND_RESULTS)}", flush=True)
    drop_unknown_results()
    # Stages that DVC has seen with these params come from its cache; it runs what it has never seen.
    if subprocess.run(["dvc", "repro"], check=False).returncode:
        raise StageError("`dvc repro` failed, expected it to restore the outputs; its message is above")


def drop_unknown_results() -> None:
    """Remove those stages from dvc.lock whose outputs DVC's cache lacks.

    They were made on another machine. DVC would trust the lock, find nothing, and run the stage; without
    its entry, DVC looks for this machine's own results in its run cache.
    """
    done = subprocess.run(["dvc", "data", "status", "--json"], check=False, capture_output=True, text=True)
    if done.returncode:
        raise StageError(f"`dvc data status` failed: {' '.join(done.stderr.split())[-300:]}")
    unknown = set(json.loads(done.stdout).get("not_in_cache", []))
    lock = read_lock()
    kept = {
        name: stage
        for name, stage in lock["stages"].items()
        if unknown.isdisjoint(out["path"].rstrip("/") for out in stage["outs"])
    }
    if len(kept) < len(lock["stages"]):
        print(f"not in the cache, so not of this machine: {', '.join(sorted(unknown))}", flush=True)
        dump_yaml(LOCK, lock | {"stages": kept})


if __name__ == "__main__":
    run_stage(main)
