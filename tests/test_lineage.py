"""git as the stages call it: it leaves the user's repository alone, and says in a line why it fails."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fashion_cnn.project.catalog import TOY
from fashion_cnn.project.outbox import Outbox, open_run
from fashion_cnn.project.provenance import git_diff, git_tags
from fashion_cnn.tracking.store import connect
from project import git

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # MLflow warns about itself
]


@pytest.fixture
def repository(workspace):
    git(workspace, "init", "--quiet")
    (workspace / "code.py").write_text("one\n")
    git(workspace, "add", "--all")
    git(workspace, "commit", "--quiet", "--message", "t")
    return workspace


def run_artifacts() -> set[str]:
    store = connect()
    [run] = store.client.search_runs(store.experiments)
    return {file.path for file in store.client.list_artifacts(run.info.run_id)}


def test_the_users_index_is_neither_locked_nor_written(repository):
    index = repository / ".git/index"
    os.utime(repository / "code.py", (0, 0))  # for `git status`, a reason to refresh the index
    before = index.read_bytes()
    assert git_tags()["git_dirty"] == "false"
    (repository / "new.py").write_text("new")
    git_diff()
    assert index.read_bytes() == before
    # What the user's own command does with the same file, so that the comparison above can fail.
    git(repository, "status", "--porcelain")
    assert index.read_bytes() != before


def test_a_folder_of_another_user_is_named_with_the_command_and_the_stage_continues(
    repository, monkeypatch, capsys
):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with open_run(TOY, {}, "12" * 32):
        pass
    line, _ = capsys.readouterr().out.splitlines()  # the second is the sender's
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
def test_without_a_commit_one_line_says_why(workspace, monkeypatch, capsys, spoil, words):
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back after the test
    spoil(workspace)
    assert git_tags() == {}
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"the run records no commit: {words}")


def test_a_damaged_index_is_not_a_clean_tree(repository, capsys):
    (repository / ".git/index").write_bytes(b"damaged")
    assert git_tags() == {}
    assert "the run records no commit: git status: fatal: " in capsys.readouterr().out


@pytest.mark.parametrize("made_by", ["training", "stand-in"])
def test_a_diff_that_fails_is_no_empty_diff(repository, capsys, made_by):
    (repository / "code.py").write_text("two\n")
    shutil.rmtree(repository / ".git/objects")
    (repository / ".git/objects").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fashion_cnn.project.outbox.git_tags", lambda: {"git_commit": "ab" * 20, "git_dirty": "true"}
        )
        if made_by == "training":
            with open_run(TOY, {}, "12" * 32):
                pass
        else:
            outbox = Outbox()
            outbox.report("evaluate_cnn", TOY, "ab" * 32, {}, [])
            outbox.close()
    assert "the run records no uncommitted changes: git read-tree: fatal: " in capsys.readouterr().out
    assert "uncommitted.diff" not in run_artifacts()
    command = [sys.executable, "-m", "fashion_cnn", "trace", "ab" * 32, "--json"]
    if made_by == "stand-in":
        [trace] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert trace["restore"][1] == "# the run had uncommitted changes, which it does not record"


def test_a_hook_of_another_repository_changes_no_tag(repository, tmp_path_factory, monkeypatch):
    plain, other = git_tags(), tmp_path_factory.mktemp("other")
    git(other, "init", "--quiet")
    git(other, "commit", "--quiet", "--allow-empty", "--message", "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert git_tags() == plain


def test_the_diff_does_not_depend_on_the_users_settings(repository):
    plain = [git_tags()]
    (repository / "new.py").write_text("new\n")
    plain += [git_tags(), git_diff()]
    (repository / "new.py").unlink()
    for setting in ("color.ui=always", "diff.noprefix=true", "status.showUntrackedFiles=no"):
        git(repository, "config", *setting.split("="))
    git(repository, "config", "diff.external", "false")
    found = [git_tags()]
    (repository / "new.py").write_text("new\n")
    assert [*found, git_tags(), git_diff()] == plain


@pytest.mark.parametrize("what", ["-x", "--all", "no-such-commit"])
def test_trace_takes_no_option_for_a_commit(repository, what):
    command = [sys.executable, "-m", "fashion_cnn", "trace", "--", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {what}: expected a run id, a file, a SHA-256 or a git commit (")
    assert done.stderr.count("\n") == 1


def test_sync_says_why_it_looked_for_no_experiments(workspace, capsys):
    from fashion_cnn.commands.sync import sync_experiments

    sync_experiments(None)
    assert capsys.readouterr().out.startswith(
        "sync: did not look for experiments: git for-each-ref: fatal: not"
    )


def test_sync_skips_an_experiment_that_lacks_a_file_and_no_other_fault(repository):
    from fashion_cnn.commands.history import file_at

    assert file_at("HEAD", "code.py") == b"one\n"
    assert file_at("HEAD", Path("absent")) is None
    with pytest.raises(Exception, match="git ls-tree: fatal: Not a valid object name refs/exps/gone"):
        file_at("refs/exps/gone", "code.py")


def test_the_summary_says_why_it_compares_nothing(repository, capsys):
    from fashion_cnn.commands.summary import committed_lock, compared

    assert compared({}, committed_lock()) == "The pipeline is up to date."
    said = capsys.readouterr().out
    assert said.startswith("no committed results to compare with: git show: fatal: path 'dvc.lock'")
    (repository / "dvc.lock").write_text("stages: {}")
    git(repository, "add", "dvc.lock")
    git(repository, "commit", "--quiet", "--message", "lock")
    assert committed_lock() == {"stages": {}}
