"""How the stages call git: it leaves the user's repository alone, and a line says why it fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fashion_cnn.commands.dvc_state import files_at
from fashion_cnn.project.catalog import TOY
from fashion_cnn.project.repository import code_state, file_at
from fashion_cnn.project.stage_records import open_run
from fashion_cnn.tracking.store import connect
from project import commit_all, git

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow's own warnings
]


@pytest.fixture
def repository(workspace):
    (workspace / "code.py").write_text("one\n")
    commit_all(workspace)
    return workspace


def code_tags() -> dict[str, str]:
    return code_state()[0]


def run_artifacts() -> set[str]:
    store = connect()
    [run] = store.client.search_runs(store.experiments)
    return {file.path for file in store.client.list_artifacts(run.info.run_id)}


def test_git_index_untouched(repository):
    """The user's index is neither locked nor written."""
    index = repository / ".git/index"
    os.utime(repository / "code.py", (0, 0))  # gives `git status` a reason to refresh the index
    before = index.read_bytes()
    assert code_tags()["git_dirty"] == "false"
    (repository / "new.py").write_text("new")
    objects = set((repository / ".git/objects").rglob("*"))
    assert b"+new" in code_state()[1]
    assert index.read_bytes() == before
    assert set((repository / ".git/objects").rglob("*")) == objects
    # The user's own command does write the index, so the comparison above can fail.
    git(repository, "status", "--porcelain")
    assert index.read_bytes() != before


def test_folder_of_another_user(repository, monkeypatch, capsys):
    """A line names a folder of another user and the command that allows it, and the stage continues."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with open_run(TOY, {}, "12" * 32):
        pass
    line, _ = capsys.readouterr().out.splitlines()  # the second is the follower's
    assert line.startswith("the run records no commit: git rev-parse: ")
    assert f"git config --global --add safe.directory {repository}" in line
    store = connect()
    [run] = store.client.search_runs(store.experiments)
    assert (run.info.status, "git_commit" in run.data.tags) == ("FINISHED", False)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: None, "git rev-parse: fatal: not a git repository"),
        (lambda folder: git(folder, "init", "--quiet"), "git rev-parse: fatal: Needed a single revision"),
        (lambda folder: os.environ.update(PATH=""), "git cannot be run: No such file or directory"),
    ],
)
def test_no_commit(workspace, monkeypatch, capsys, spoil, words):
    """Without a commit, one line says why."""
    monkeypatch.setenv("PATH", os.environ["PATH"])  # restored after the test
    spoil(workspace)
    assert code_state() == ({}, b"")
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"the run records no commit: {words}")


def test_damaged_index(repository):
    """A damaged index does not hide a change."""
    (repository / ".git/index").write_bytes(b"damaged")
    assert code_tags()["git_dirty"] == "false"
    (repository / "code.py").write_text("two\n")
    assert code_tags()["git_dirty"] == "true"


def test_failed_diff(repository, capsys):
    """A diff that fails is not recorded as an empty diff."""
    (repository / "code.py").write_text("two\n")
    shutil.rmtree(repository / ".git/objects")
    (repository / ".git/objects").mkdir()
    with open_run(TOY, {}, "12" * 32):
        pass
    assert "the run records no uncommitted changes: git read-tree: fatal: " in capsys.readouterr().out
    assert "uncommitted.diff" not in run_artifacts()
    store = connect()
    [run] = store.client.search_runs(store.experiments)
    command = [sys.executable, "-m", "fashion_cnn", "trace", run.info.run_id, "--json"]
    [trace] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert trace["restore"][1] == "# the run had uncommitted changes, which it does not record"


def test_hook_of_other_repository(repository, tmp_path_factory, monkeypatch):
    """A hook of another repository does not change the tags."""
    plain, other = code_tags(), tmp_path_factory.mktemp("other")
    git(other, "init", "--quiet")
    git(other, "commit", "--quiet", "--allow-empty", "--message", "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert code_tags() == plain


def test_diff_ignores_user_settings(repository):
    """The diff does not depend on the user's settings."""
    (repository / "new.py").write_text("new\n")
    plain = code_state()
    for setting in ("color.ui=always", "diff.noprefix=true", "status.showUntrackedFiles=no"):
        git(repository, "config", *setting.split("="))
    git(repository, "config", "diff.external", "false")
    assert code_state() == plain


def test_git_dirty(repository):
    """Changed settings and results do not make a tree dirty, but changed code does."""
    assert code_tags()["git_dirty"] == "false"
    (repository / "metrics").mkdir()
    for name in ("params.yaml", "dvc.lock", "metrics/a.json"):
        (repository / name).write_text("changed")
    assert code_tags()["git_dirty"] == "false"
    (repository / "code.py").write_text("new")
    assert code_tags()["git_dirty"] == "true"


@pytest.mark.parametrize("how", ["ignored", "skip-worktree", "assume-unchanged"])
def test_code_overlooked_by_git(repository, how):
    """Changed code counts even if git is set to overlook it."""
    (repository / "stages").mkdir()
    code = repository / "stages/a.py"
    if how == "ignored":
        (repository / ".git/info/exclude").write_text("*.py\n")
    else:
        code.write_text("one\n")
        git(repository, "add", "stages")
        git(repository, "commit", "--quiet", "--message", "code")
        git(repository, "update-index", f"--{how}", "stages/a.py")
    assert code_tags()["git_dirty"] == "false"
    code.write_text("two\n")
    tags, diff = code_state()
    assert tags["git_dirty"] == "true"
    assert b"+two" in diff


def test_large_file(repository, capsys):
    """A large file is named and left out."""
    with (repository / "big.bin").open("wb") as file:
        file.truncate(200_000_000)
    (repository / "new.py").write_text("new\n")
    tags, diff = code_state()
    assert (tags["git_dirty"], tags["git_left_out"]) == ("true", "big.bin")
    assert b"+new" in diff
    assert len(diff) < 1000
    assert "no copy of big.bin" in capsys.readouterr().out


def test_diff_restores_dirty_tree(repository):
    """The diff of a dirty tree restores the tree."""
    (repository / "code.py").write_text("two\n\n")
    (repository / "new.bin").write_bytes(b"\x00\xff")
    (repository / "latin.txt").write_bytes("é\r\n".encode("latin-1"))
    (repository / "params.yaml").write_text("changed by -S")
    diff = code_state()[1]
    git(repository, "checkout", "--quiet", "code.py")
    (repository / "new.bin").unlink()
    (repository / "latin.txt").unlink()
    subprocess.run(["git", "apply"], input=diff, check=True)
    assert (repository / "code.py").read_text() == "two\n\n"
    assert (repository / "new.bin").read_bytes() == b"\x00\xff"
    assert (repository / "latin.txt").read_bytes() == "é\r\n".encode("latin-1")
    assert b"changed by -S" not in diff


@pytest.mark.parametrize("what", ["-x", "--all", "no-such-commit"])
def test_trace_refuses_option(repository, what):
    """`trace` does not mistake an option for a commit."""
    command = [sys.executable, "-m", "fashion_cnn", "trace", "--", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {what}: expected a run id, a file, a SHA-256 or a git commit (")
    assert done.stderr.count("\n") == 1


def test_sync_without_repository(workspace, capsys):
    """`sync` says why it did not look for experiments."""
    from fashion_cnn.commands.sync import sync_experiments

    sync_experiments(None)
    assert capsys.readouterr().out.startswith(
        "sync: did not look for experiments: git for-each-ref: fatal: not"
    )


def test_file_at(repository):
    """`file_at` gives None for a file that a commit lacks, and raises an error for any other fault."""
    assert file_at("HEAD", "code.py") == b"one\n"
    assert file_at("HEAD", Path("absent")) is None
    with pytest.raises(Exception, match="git ls-tree: fatal: Not a valid object name refs/exps/gone"):
        file_at("refs/exps/gone", "code.py")


def test_files_at(repository):
    """`files_at` gives each commit's own version of a file."""
    (repository / "code.py").write_text("two\n\nlines")
    git(repository, "commit", "--quiet", "--all", "--message", "two")
    commits = ["HEAD~1", "HEAD", "HEAD~1"]
    assert list(files_at(commits, "code.py")) == [b"one\n", b"two\n\nlines", b"one\n"]
    assert list(files_at(["HEAD"], "absent")) == [None]


def test_summary_without_committed_lock(repository, capsys):
    """The summary says why it compares nothing."""
    from fashion_cnn.commands.summary import committed_lock, compared

    assert compared({}, committed_lock()) == "The pipeline is up to date."
    said = capsys.readouterr().out
    assert said.startswith("no committed results to compare with: git show: fatal: path 'dvc.lock'")
    (repository / "dvc.lock").write_text("stages: {}")
    git(repository, "add", "dvc.lock")
    git(repository, "commit", "--quiet", "--message", "lock")
    assert committed_lock() == {"stages": {}}
