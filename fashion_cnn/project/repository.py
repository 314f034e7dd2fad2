"""The project's git repository: the state of its code, and files of other commits."""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType

from fashion_cnn.project.errors import StageError
from fashion_cnn.project.process import ELSEWHERE

LOCK = Path("dvc.lock")
# Settings and results, which a run records itself; every other change makes a tree dirty.
NOT_CODE = (":!params.yaml", ":!dvc.lock", ":!metrics")
CODE, CODE_ENDS = ("stages/", "fashion_cnn/"), (".py", ".js", ".css", ".html")  # as in .dvcignore
MOST = 10_000_000  # bytes; a run records at most this much in new files


class GitError(StageError):
    """A git command that failed, and what git says."""


def repository_root() -> Path:
    """The project's root; in a copy made by DVC or a trial, the root of the original."""
    if named := os.environ.get("FASHION_CNN_ROOT"):
        return Path(named)
    # DVC_ROOT may name an outer DVC project of which this is a stage.
    root, here = Path(os.environ.get("DVC_ROOT", "/")).resolve(), Path.cwd()
    is_copy = here.is_relative_to(root / ".dvc/tmp") and (root / "fashion_cnn").is_dir()
    return root if is_copy else here


def git(*arguments: str, stdin: bytes = b"", more: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """What git prints. Raises GitError if git or the repository is missing, or the command fails."""
    # Without the option, `git status` locks the index, and a kill leaves a lock that blocks the user's git.
    command = ["git", "--no-optional-locks", *arguments]
    here = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, env={**here, **more}, check=False)
    except OSError as error:
        raise GitError(f"git cannot be run: {error.strerror}") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise GitError(f"git {arguments[0]}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def code_state() -> tuple[dict[str, str], bytes]:
    """Tags for the commit and whether code differs from it, and the diff, which `git apply` accepts.

    New files count, and so does code that git ignores or was set to skip. If git fails, a line says why:
    without a commit there are no tags, and without a diff the code counts as changed.
    """
    tags = {}
    try:
        tags["git_commit"] = git("rev-parse", "--verify", "HEAD").decode().strip()
        with tempfile.TemporaryDirectory() as scratch:
            diff, left_out = _changes(Path(scratch))
    except (GitError, OSError) as error:  # a full disk, or a file that was just deleted
        what = "uncommitted changes" if tags else "commit"
        print(f"the run records no {what}: {error}")
        return tags and tags | {"git_dirty": "true"}, b""
    if left_out:
        few = ", ".join(left_out[:5]) + (f" and {len(left_out) - 5} more" if left_out[5:] else "")
        print(f"the run records no copy of {few}, which git does not have: too large")
        tags["git_left_out"] = few[:4000]
    return tags | {"git_dirty": str(bool(diff or left_out)).lower()}, diff


def _changes(scratch: Path) -> tuple[bytes, list[str]]:
    """The diff from the last commit, and the new files that are too large for it."""
    # The diff gets its own index and objects, because git's are the user's.
    objects = Path(os.fsdecode(git("rev-parse", "--git-path", "objects")).rstrip("\n")).resolve()
    (scratch / "objects/info").mkdir(parents=True)
    (scratch / "objects/info/alternates").write_bytes(os.fsencode(objects) + b"\n")
    own = {"GIT_INDEX_FILE": str(scratch / "index"), "GIT_OBJECT_DIRECTORY": str(scratch / "objects")}
    git("read-tree", "HEAD", more=own)
    git("add", "--update", "--", ".", *NOT_CODE, more=own)
    code = [f"{folder}*{end}" for folder in CODE for end in CODE_ENDS]
    others = ("ls-files", "-z", "--others", "--exclude-standard")
    listed = git(*others, "--", ".", *NOT_CODE, more=own) + git(*others, "--ignored", "--", *code, more=own)
    files = sorted((os.lstat(path).st_size, path) for path in os.fsdecode(listed).split("\0") if path)
    count = sum(total <= MOST for total in accumulate(size for size, _ in files))
    taken, left_out = [path for _, path in files[:count]], [path for _, path in files[count:]]
    if taken:
        names = os.fsencode("\0".join(taken))
        how = ("--force", "--pathspec-from-file=-", "--pathspec-file-nul")
        git("--literal-pathspecs", "add", *how, stdin=names, more=own)
    # diff-index, because the user's settings may colour what `git diff` prints, or change its paths.
    return git("diff-index", "--cached", "--binary", "--no-ext-diff", "HEAD", more=own), left_out


def file_at(reference: str, path: str | Path) -> bytes | None:
    """A file of a commit or an experiment, by its path from the project's folder; None if it does not exist.

    Raises GitError.
    """
    if not git("ls-tree", reference, "--", str(path)):
        return None
    return git("show", f"{reference}:./{path}")
