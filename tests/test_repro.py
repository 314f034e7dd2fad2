"""When `make repro` trains both CNNs at once, and when it leaves everything to one `dvc repro`."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import yaml

from fashion_cnn.commands import repro, sync
from project import ROOT


@pytest.fixture
def done(monkeypatch) -> list:
    """What repro.main() does: the arguments of DVC, and the threads of each of two trainings."""
    calls: list = []
    monkeypatch.setattr(repro, "mend_rwlock", lambda: None)
    monkeypatch.setattr(repro, "mend_lock", lambda: None)
    monkeypatch.setattr(repro, "dvc", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(repro, "train_both", calls.append)
    monkeypatch.setattr(sync, "main_if_new", lambda: calls.append("sync"))
    monkeypatch.setattr(repro.summary, "main", lambda: calls.append("summary"))
    monkeypatch.setattr(repro, "usable_threads", lambda: 5)
    monkeypatch.setattr(repro, "has_gpu", lambda: False)
    monkeypatch.setattr(repro, "both_change", lambda: True)
    return calls


ALONE = [("repro",), "sync", "summary"]


def test_splits_cores(done):
    """Two trainings at once get half of the cores each."""
    repro.main()
    assert done == [("repro", "augment_images"), 2, *ALONE]


@pytest.mark.parametrize(
    ("name", "value"), [("usable_threads", 1), ("has_gpu", True), ("both_change", False)]
)
def test_single_dvc_repro(done, monkeypatch, name, value):
    """One `dvc repro` does all with one thread, with a GPU, or unless both trainings change."""
    monkeypatch.setattr(repro, name, lambda: value)
    repro.main()
    assert done == ALONE


@pytest.mark.parametrize(
    ("users", "stays"),
    [([], True), (["ended"], False), (["at work"], True), (["ended", "at work"], True), (["reused"], False)],
)
def test_removes_stale_rwlock(tmp_path, monkeypatch, users, stays):
    """DVC's list of processes is removed if all of them have ended.

    One has ended but is a zombie, which DVC considers running; the PID of another has been reused.
    """
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        own = " ".join(["dvc", *psutil.Process().cmdline()[1:]])
        known = {
            "ended": {"pid": ended.pid, "cmd": "true"},
            "at work": {"pid": os.getpid(), "cmd": own},
            "reused": {"pid": os.getpid(), "cmd": "dvc repro of another"},
        }
        repro.mend_rwlock()  # there is no list yet
        path = tmp_path / ".dvc/tmp/rwlock"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"read": {"a": [known[user] for user in users]}}))
        assert repro.mend_rwlock() is False
        assert path.exists() is stays


ONE, OTHER = "train_cnn@original", "evaluate_cnn@augmented"


@pytest.mark.parametrize(
    ("changed", "both"),
    [
        ([], False),
        ([ONE], False),
        ([ONE, "evaluate_cnn@original"], False),
        ([ONE, OTHER], True),
        (["augment_images"], True),
    ],
)
def test_both_change(monkeypatch, changed, both):
    """Both trainings change if each one does, or if a stage that both need does."""
    said = json.dumps({stage: ["changed deps"] for stage in changed})
    answer = subprocess.CompletedProcess([], 0, stdout=said)
    monkeypatch.setattr(repro.subprocess, "run", lambda *arguments, **named: answer)
    assert repro.both_change() is both


def test_dvc_exit_code(monkeypatch):
    """If DVC fails, the command exits with DVC's code."""
    monkeypatch.setattr(repro.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 7))
    with pytest.raises(SystemExit) as ended:
        repro.dvc("repro")
    assert ended.value.code == 7


def test_before_makes_all_inputs():
    """The stage that runs before both trainings makes all that they read.

    Otherwise they would train on what an earlier run left.
    """
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    made = {}
    for name, stage in stages.items():
        for out in stage.get("do", stage).get("outs", []):
            made[next(iter(out)) if isinstance(out, dict) else out] = name

    def makers(stage: dict) -> set[str]:
        found = {
            maker for dep in stage["deps"] for out, maker in made.items() if f"{dep}/".startswith(f"{out}/")
        }
        return found | {more for maker in found for more in makers(stages[maker])}

    training = stages["train_cnn"]
    reads = [
        dep.replace("${item}", item)
        for dep in training["do"]["deps"]
        for item in training["foreach"].values()
    ]
    assert makers({"deps": reads}) == {repro.BEFORE} | makers(stages[repro.BEFORE])


def test_dvc_dies_with_command():
    """DVC dies with the command that started it."""
    stand_in = "dvc_state.DVC = (sys.executable, '-c', 'import os; print(os.getpid(), flush=True); input()')"
    code = f"import sys; from fashion_cnn.commands import dvc_state; {stand_in}; dvc_state.run_dvc()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as command:
        dvc = psutil.Process(int(command.stdout.readline()))
        assert dvc.is_running()
        command.kill()
        command.wait()
        assert not psutil.wait_procs([dvc], timeout=10)[1]
