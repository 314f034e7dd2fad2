"""Return from experiments to the committed params and results, without training again.

It restores params.yaml, dvc.lock and metrics/ from the last commit, in the files and in git's index, where
`dvc exp run` stages changes, and reattaches HEAD if a killed experiment left it detached. Code is not
touched. Results stay in DVC's cache, so going back to an experiment is just as quick: `dvc exp apply NAME`.
"""

import subprocess
import sys

from fashion_cnn.commands import repair
from fashion_cnn.commands.dvc_state import run_dvc
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.repository import GitError, git

SETTINGS_AND_RESULTS = ("params.yaml", "dvc.lock", "metrics")
QUEUED = "refs/exps/stash"  # an experiment that was killed before its first stage


def main() -> None:
    """Restore the files, then let DVC restore the outputs."""
    repair.mend_rwlock()
    repair.refuse_while_dvc_works()
    try:
        repair.return_to_branch()
        git("update-ref", "-d", QUEUED)  # otherwise DVC runs it before the next experiment
        git("rm", "-r", "--cached", "--quiet", "--ignore-unmatch", "--", ".dvc/tmp")  # DVC's own files
        git("restore", "--source=HEAD", "--staged", "--worktree", "--", *SETTINGS_AND_RESULTS)
    except GitError as error:
        raise StageError(f"params, dvc.lock and metrics cannot be restored: {error}") from None
    print(f"restored from the last commit: {', '.join(SETTINGS_AND_RESULTS)}", flush=True)
    repair.drop_unknown_results()
    # DVC restores stages that it has seen with these params from its cache, and runs the rest.
    if run_dvc("repro").returncode:
        raise StageError("`dvc repro` failed, expected it to restore the outputs; its message is above")
    repair.say_where_changes_are()


def commit_results() -> None:
    """Commit the results of this tree, so that later ones are compared with them."""
    message = "Take this machine's results as the baseline"
    commit = ["git", "commit", "--message", message, "--", *SETTINGS_AND_RESULTS]
    sys.exit(subprocess.run(commit, check=False).returncode)
