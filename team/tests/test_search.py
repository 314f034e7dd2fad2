"""Searches on this machine: each trial is a DVC experiment and a run, and none is lost or run twice."""

import json
import os
import re
import signal
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from crash import Started, wait_for_stage, wait_until_gone
from fashion_cnn.commands.dvc_state import Experiment
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.params import PARAMS_PATH
from pipeline import dvc, ran, run_module, set_params, tracked_runs
from project import ROOT, git
from searching import METRICS, STAGE, WEIGHTS, rates, table_of, trained, trials_of
from team import search as search_tool
from team import trial, workers

pytestmark = [
    pytest.mark.team,
    pytest.mark.filterwarnings("ignore"),  # MLflow's own warnings
]

GRID = ["--sampler", "grid", "-S", "train_cnn.learning_rate=1e-5,0.002"]
SIZES = ["-S", "train_cnn.batch_size=25,50"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project with small params, after its first training."""
    return trained(tmp_path_factory.mktemp("a search") / "project")


def clones(project: Path) -> list[Path]:
    return [path for path in (project / ".dvc/tmp/trials").iterdir() if path.is_dir()]


def test_grid_search(project):
    """A grid is searched once, and its best trial can be taken."""
    done = run_module(project, "team.search", *GRID, *SIZES)
    assert done.returncode == 0, done.stdout + done.stderr
    found = trials_of(project)
    values = {name: metrics["val_accuracy"] for name, (_, metrics) in found.items()}
    points = sorted((float(one["learning_rate"]), one["batch_size"]) for one, _ in found.values())
    assert points == [(1e-5, 25), (1e-5, 50), (0.002, 25), (0.002, 50)]
    assert f"4 of 4 done, 0 running, 0 failed; best {max(values.values()):.4f}; 0 minutes left" in done.stdout
    head, *rows = table_of(done.stdout)
    assert head == ["trial", "val_accuracy", "learning_rate", "batch_size"]
    assert {row[0]: row[1] for row in rows} == {name: f"{value:.4f}" for name, value in values.items()}
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)
    assert (project / "search.png").read_bytes().startswith(b"\x89PNG")
    # Each trial has a run with the same weights.
    tracked = tracked_runs(project, "tags.dvc_exp_name LIKE 'trial-%'")
    assert [run.info.status for run in tracked] == ["FINISHED"] * 4
    weights = {run.data.tags["dvc_exp_name"]: [run.data.tags["weights_sha256"]] for run in tracked}
    assert weights == {name: metrics["weights_sha256"] for name, (_, metrics) in found.items()}
    assert clones(project) == []
    assert not list((project / ".records").iterdir())
    assert git(project, "status", "--porcelain") == ""
    # The same command again trains nothing.
    again = run_module(project, "team.search", *GRID, *SIZES)
    assert again.returncode == 0
    assert table_of(again.stdout) == table_of(done.stdout)
    assert "done," not in again.stdout
    # The best comes from the cache, and equals what a training without a search gives.
    [(restore, checkout)] = re.findall(
        r"take the best +git (restore .*) && dvc (checkout .*) && make repro\n", done.stdout
    )
    best = table_of(done.stdout)[1][0]
    assert (values[best], best in restore) == (max(values.values()), True)
    git(project, *restore.split())
    dvc(project, *checkout.split())
    assert ran(dvc(project, "repro", STAGE).stdout) == []
    bytes_ = (project / WEIGHTS).read_bytes()
    dvc(project, "repro", "--force", "--single-item", STAGE)
    assert (project / WEIGHTS).read_bytes() == bytes_


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("REPOSITORY: '--upload-pack=x'", {"repository": "--upload-pack=x"}),
        ("COMMIT: 'HEAD'", {"commit": "HEAD"}),
        ("NAME: '--x'", {"name": "--x"}),
        ("STAGE: '--force'", {"stage": "--force"}),
        ("PATH: '--x'", {"settings": {"--x": "1"}}),
    ],
)
def test_option_injection(words, change, monkeypatch):
    """A value of a trial cannot become an option of a command."""
    monkeypatch.setattr(trial, "run", None)
    good = {"repository": ".", "commit": "0" * 40, "name": "n", "stage": STAGE, "settings": {}}
    with pytest.raises(trial.TrialError, match=f"^{words}, expected "):
        trial.run_trial(**good | change)


def test_trial_sent_meanwhile(tmp_path, monkeypatch, capsys):
    """A trial ends at once if another machine has sent the same one meanwhile."""
    listed = iter(["", "found"])  # before and after the push

    def run(folder, *command, **_) -> str:
        if command[:2] == ("git", "push"):
            raise trial.TrialError("rejected")
        return next(listed) if "ls-remote" in command else "x"

    monkeypatch.setattr(trial, "run", run)
    monkeypatch.setattr(trial.time, "sleep", None)  # no pause
    monkeypatch.setenv("FASHION_CNN_TRIALS", str(tmp_path))
    trial.run_trial("git@example.org:team", "0" * 40, "by-two", STAGE, {})
    assert capsys.readouterr().out == "by-two: done\n"


def test_failed_trial(project):
    """A failed trial is shown with its line, and an unreachable store does not fail a trial."""
    command = ["--sampler", "grid", "-S", "train_cnn.batch_size=0,50"]
    done = run_module(project, "team.search", *command, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [params["batch_size"] for params, _ in trials_of(project).values()] == [50]
    assert re.search(
        r"^MLflow store http://127.0.0.1:9: .* and `fashion-cnn sync` sends them later$", done.stdout, re.M
    )
    assert re.search(
        r"^trial-\w+  .*: failed: params.yaml: train_cnn.batch_size is 0, expected .*$", done.stdout, re.M
    )
    assert "1 of 2 done, 0 running, 1 failed" in done.stdout
    assert table_of(done.stdout)[2][1:] == ["failed", "0"]
    alone = run_module(project, "team.search", "-S", "train_cnn.batch_size=-1,0", "--trials", "1")
    assert alone.returncode == 1
    assert alone.stderr == "error: no trial succeeded (1 failed); the lines above say why\n"


def test_continued_interval_search(project):
    """A search continues with what Optuna proposes in an interval."""
    command = ["-S", "train_cnn.learning_rate=tag(log,interval(1e-4,1e-2))", "-S", "train_cnn.epochs=1"]
    assert run_module(project, "team.search", *command, "--trials", "1").returncode == 0
    [first] = trials_of(project)
    done = run_module(project, "team.search", *command, "--trials", "3", "--metric", "val_loss")
    assert done.returncode == 0
    found = trials_of(project)
    assert first in found
    assert len(found) == len(set(rates(project))) == 3
    assert all(1e-4 <= rate <= 1e-2 for rate in rates(project))
    assert {params["epochs"] for params, _ in found.values()} == {1}
    losses = sorted(metrics["val_loss"] for _, metrics in found.values())
    assert [row[1] for row in table_of(done.stdout)[1:]] == [f"{loss:.4f}" for loss in losses]


ACCURACY = {  # by learning rate and epochs
    0.1: {1: 0.5, 2: 0.55, 4: 0.6},
    0.2: {1: 0.6, 2: 0.65, 4: 0.7},
    0.3: {1: 0.4, 2: 0.99, 4: 0.99},
    0.4: {1: 0.45, 2: 0.56, 4: 0.57},
    0.5: {1: 0.58, 2: 0.7, 4: 0.8},
}


def search_of_a_table(
    monkeypatch, project: Path, *arguments: str, known=()
) -> tuple[search_tool.Search, list]:
    """A search of ACCURACY, one trial at a time, without trainings; also what it asked for, in order.

    `known` are rates and epochs of an earlier search's experiments.
    """
    rates = ",".join(map(str, ACCURACY))
    command = ["--sampler", "grid", "-S", f"train_cnn.learning_rate={rates}", "-S", "train_cnn.epochs=4"]
    monkeypatch.setattr(sys, "argv", ["search.py", *command, *arguments])
    monkeypatch.chdir(project)
    monkeypatch.setattr(search_tool.random, "shuffle", lambda _: None)
    found, asked = search_tool.Search(search_tool.parse()), []

    def name_of(rate: float, epochs: int) -> str:
        return found.names_of({"train_cnn.learning_rate": rate})[[1, 2, 4].index(epochs)]

    def contents(references: list[tuple[float, int]], path: object) -> list[bytes]:
        values = [
            {"train_cnn": {"learning_rate": rate}}
            if path == PARAMS_PATH
            else {"val_accuracy": ACCURACY[rate][epochs]}
            for rate, epochs in references
        ]
        return [json.dumps(one).encode() for one in values]

    listed = [Experiment(name_of(*one), found.commit, one, 0) for one in known]
    monkeypatch.setattr(search_tool, "experiments", lambda: listed)
    monkeypatch.setattr(search_tool, "files_at", contents)

    def submit(name: str, settings: dict, is_resumed: bool) -> Future:
        rate, epochs = float(settings["train_cnn.learning_rate"]), int(settings["train_cnn.epochs"])
        asked.append((rate, epochs, is_resumed))
        found.results[name] = ACCURACY[rate][epochs]
        for one in [*found.trials.values()]:
            found.report_results(one)
        (future := Future()).set_result("")
        return future

    found.run(workers.Workers(submit, lambda: 1, lambda: None))
    return found, asked


def test_asha(project, monkeypatch):
    """ASHA ends the worse half of the trials.

    By hand: after one epoch, 0.3 is the last of three, 0.4 the third of four, 0.5 the second of five.
    """
    found, asked = search_of_a_table(monkeypatch, project)
    whole = [(1, True), (2, True), (4, False)]
    expected = {0.1: whole, 0.2: whole, 0.3: whole[:1], 0.4: whole[:1], 0.5: whole}
    assert asked == [(rate, *one) for rate, rungs in expected.items() for one in rungs]
    states = {one.asked.params["train_cnn.learning_rate"]: one.state for one in found.trials.values()}
    assert states == {0.1: "done", 0.2: "done", 0.3: "pruned", 0.4: "pruned", 0.5: "done"}
    assert [one.values[-1] for one in found.ranked()] == [0.8, 0.7, 0.6, 0.45, 0.4]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--pruner", "none"], None),
        (["-S", "train_cnn.schedule=one-cycle"], "the schedule depends on the number of epochs"),
    ],
)
def test_without_pruning(project, monkeypatch, capsys, arguments, why):
    """A search that cannot prune trains all trials to the end."""
    _, asked = search_of_a_table(monkeypatch, project, *arguments)
    assert asked == [(rate, 4, False) for rate in ACCURACY]
    assert (f"pruning is off: {why}" in capsys.readouterr().out) == bool(why)


@pytest.mark.parametrize("best_first", [False, True])
def test_pruned_trials_stay_pruned(project, monkeypatch, best_first):
    """The same search again runs nothing, in whichever order it reads the results."""
    first, asked = search_of_a_table(monkeypatch, project)
    known = [(rate, epochs) for rate, epochs, _ in asked]
    known.sort(key=lambda one: ACCURACY[one[0]][1], reverse=best_first)
    again, more = search_of_a_table(monkeypatch, project, known=known)
    assert more == []
    assert [one.names for one in again.ranked()] == [one.names for one in first.ranked()]


def test_pruned_search(project):
    """A pruned search can be resumed, and its best trial has the bytes of a whole training."""
    rates = "train_cnn.learning_rate=1e-5,0.002"
    command = ["--sampler", "grid", "-S", rates, "-S", "train_cnn.epochs=4", "-S", "split.train_size=500"]
    done = run_module(project, "team.search", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    head, best, *_ = table_of(done.stdout)
    assert (head, best[3]) == (["trial", "val_accuracy", "learning_rate", "epochs"], "4")
    again = run_module(project, "team.search", *command)
    assert table_of(again.stdout) == table_of(done.stdout)
    assert "started" not in again.stdout
    [(restore, checkout)] = re.findall(
        r"take the best +git (restore .*) && dvc (checkout .*) && make repro\n", done.stdout
    )
    git(project, *restore.split())
    dvc(project, *checkout.split())
    bytes_ = (project / WEIGHTS).read_bytes()
    assert "resuming" not in dvc(project, "repro", "--force", "--single-item", STAGE).stdout
    assert (project / WEIGHTS).read_bytes() == bytes_
    # What optuna-dashboard shows: both searches, with two trials each.
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    journal = JournalStorage(JournalFileBackend(str(project / "search.journal")))
    assert [one.n_trials for one in optuna.get_all_study_summaries(journal)] == [2, 2]


@pytest.mark.parametrize(("schedule", "resumes"), [("constant", True), ("one-cycle", False)])
def test_resume_with_more_epochs(project, schedule, resumes):
    """A training resumes one of fewer epochs if the epochs of both are the same."""

    def train(epochs: int, **more: str) -> tuple[bool, bytes]:
        set_params(project, {"train_cnn": {"epochs": epochs, "schedule": schedule}})
        done = run_module(project, "stages.train_cnn", "original", **more)
        assert done.returncode == 0, done.stderr
        return "resuming after epoch 1\n" in done.stdout, (project / WEIGHTS).read_bytes()

    train(1, FASHION_CNN_KEEP_CHECKPOINT="1")
    resumed, whole = train(2)
    assert resumed == resumes
    assert train(2) == (False, whole)


def search(project: Path, number: int = 0, **more: str) -> Started:
    log = project.parent / f"search-{number}.log"
    return Started(project, log, "-m", "team.search", *GRID, "--jobs", "1", **more)


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_search(project, kind, code):
    """A stopped search leaves nothing running and can be continued."""
    started = search(project)
    while not (before := trials_of(project)) and not started.ended():
        time.sleep(0.05)
    at_work = wait_for_stage(started)
    assert at_work
    started.process.send_signal(kind)
    assert started.process.wait() == code
    assert wait_until_gone(at_work, timeout=10)
    assert trials_of(project) == before
    if kind == signal.SIGINT:
        [(name, (_, metrics))] = before.items()
        assert table_of(started.printed())[1][:2] == [name, f"{metrics['val_accuracy']:.4f}"]
        assert started.printed().endswith("stopped on request\n")
    again = search(project, 1)
    assert again.process.wait() == 0, again.printed()
    assert rates(project) == [1e-5, 0.002]
    assert before.items() <= trials_of(project).items()
    assert clones(project) == []


def test_concurrent_searches(project, tmp_path):
    """Two searches at once share their trials."""
    audit = {"PYTHONPATH": str(ROOT / "tests/audit"), "AUDIT_LOG": str(tmp_path)}
    both = [search(project, number, **audit) for number in range(2)]
    assert [one.process.wait() for one in both] == [0, 0], both[0].printed() + both[1].printed()
    assert rates(project) == [1e-5, 0.002]
    assert [len(table_of(one.printed())) for one in both] == [3, 3]  # the first is the header
    assert "failed" not in both[0].printed().partition("trial ")[2] + both[1].printed().partition("trial ")[2]
    written = [line for line in (tmp_path / STAGE).read_text().splitlines() if line.startswith("w models/")]
    assert len(written) == 2  # each was trained once


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("a.b=1,2", [1, 2]),
        ("a.b=1e-5,0.1", [1e-5, 0.1]),
        ("a.b='lesson',\"residual\"", ["lesson", "residual"]),
        ("a.b=true,false", [True, False]),
        ("a.b=null,100", [None, 100]),
        ("a.b=range(1,4)", [1, 2, 3]),
    ],
)
def test_space_values(setting, values):
    """The values of a space are those that DVC would take."""
    from team.space import read_space

    varied, fixed = read_space([setting, "c.d=residual"])
    assert [(type(one), one) for one in varied["a.b"].choices] == [(type(one), one) for one in values]
    assert fixed == {"c.d": "residual"}


def test_space_intervals():
    """The intervals of a space become Optuna's distributions."""
    from optuna.distributions import FloatDistribution, IntDistribution

    from team.space import read_space

    settings = ["a.a=interval(0.5,2)", "a.b=tag(int,interval(1,5))", "a.c=tag(log,interval(1e-4,1e-2))"]
    assert read_space(settings)[0] == {
        "a.a": FloatDistribution(0.5, 2.0),
        "a.b": IntDistribution(1, 5),
        "a.c": FloatDistribution(1e-4, 1e-2, log=True),
    }


@pytest.mark.parametrize(
    "setting",
    [
        "a.b=[1",
        "a.b=1",
        "a.b=interval(5,2)",
        "a.b=range(5,1)",
        "a.b=range(1,5,0)",
        "a.b=glob(*)",
        "a.b=[1],[2]",
        "a.b=tag(int,interval(1,inf))",
        "a.b=${c},1",
        "a.b='true','false'",
        "a.b=tag(lgo,interval(1,5))",
        "a.b=tag(int,interval(0.5,5))",
        "+a.b=1,2",
        "~a.b",
    ],
)
def test_invalid_space(setting):
    """The error for an invalid space is one line."""
    from team.space import read_space

    with pytest.raises(StageError, match=re.escape(f"-S {setting}: ") + r".*expected .*$"):
        read_space([setting])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-S", "train_cnn.epoch=1,2"], "-S train_cnn.epoch: no param of this name, expected one of "),
        (
            ["-S", "split.seed=tag(int,interval(1,2))", "--sampler", "grid"],
            "-S split.seed: an interval, expected values",
        ),
        (
            ["-S", "train_cnn.epochs=1,2", "--metric", "weights_sha256"],
            "--metric weights_sha256: expected one of ",
        ),
        (
            ["-S", "train_cnn.epochs=1,2", "--metric", "test_accuracy"],
            "--metric test_accuracy: expected one of ",
        ),
        (
            ["-S", "train_cnn.batch_size=interval(16,128)"],
            "with -S: train_cnn.batch_size is ",
        ),
        (
            ["-S", "train_cnn.epochs=1,2", "--metric", "train_loss"],
            "--metric train_loss: expected one of val_",
        ),
        (
            ["-S", "train_cnn.epochs=1,2", "-S", "train_cnn.batch_size=0"],
            "with -S: train_cnn.batch_size is 0, expected ",
        ),
    ],
)
def test_invalid_search(finished, arguments, line):
    """The error for a search that cannot run is one line."""
    done = run_module(finished, "team.search", *arguments)
    assert done.returncode == 1
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert trials_of(finished) == {}


def test_trial_by_hand(project, tmp_path):
    """A trial by hand takes data from the remote and sends its results there."""
    origin, remote, node = tmp_path / "origin.git", tmp_path / "remote", tmp_path / "node"
    dvc(project, "remote", "add", "--default", "shared", str(remote))
    git(project, "commit", "--quiet", "--all", "--message", "a remote")
    dvc(project, "push")
    git(project, "clone", "--quiet", "--bare", ".", str(origin))
    git(project, "remote", "add", "origin", str(origin))
    commit = git(project, "rev-parse", "HEAD").strip()
    audit = {"PYTHONPATH": str(ROOT / "tests/audit"), "AUDIT_LOG": str(tmp_path)}
    settings = {"FASHION_CNN_TRIALS": str(node), **audit}
    command = [os.path.relpath(origin, project), commit, "by-hand", STAGE, "train_cnn.seed=5"]
    done = run_module(project, "team.trial", *command, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "by-hand: done\n"
    assert not [path for path in (node / "clones").glob("*/*") if path.is_dir()]
    assert [path.name for path in tmp_path.iterdir() if "@" in path.name] == [STAGE]  # the data was there
    before = (tmp_path / STAGE).read_text()
    again = run_module(project, "team.trial", *command, **settings)
    assert (again.returncode, again.stdout) == (0, "by-hand: already exists, so it is not rerun\n")
    assert (tmp_path / STAGE).read_text() == before  # no second training
    [run] = tracked_runs(node, store=f"sqlite:///{node / 'mlflow.db'}")
    dvc(project, "exp", "pull", "origin", "by-hand")
    dvc(project, "exp", "apply", "by-hand", check=False)  # as above
    metrics = json.loads((project / METRICS).read_text())
    assert [run.data.tags["weights_sha256"]] == metrics["weights_sha256"]
    weights = (project / WEIGHTS).read_bytes()
    dvc(project, "repro", "--force", "--single-item", STAGE)
    assert (project / WEIGHTS).read_bytes() == weights


@pytest.mark.parametrize(
    ("commit", "name", "words"),
    [
        ("HEAD", "by-hand", "COMMIT: 'HEAD', expected its 40 digits"),
        ("ab" * 20, "", "NAME: '', expected letters"),
        ("ab" * 20, "../..", "NAME: '../..', expected letters"),
    ],
)
def test_invalid_trial_arguments(finished, commit, name, words):
    """A trial with invalid arguments touches nothing."""
    before = sorted((finished / ".dvc/tmp").iterdir())
    done = run_module(finished, "team.trial", ".", commit, name, STAGE)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {words}")
    assert sorted((finished / ".dvc/tmp").iterdir()) == before


@pytest.mark.parametrize(
    "address",
    [
        "https://me:secret@host.example/x",
        "s3://a:se@cret/@host.example/x",
        "https://host.example/x?sig=secret",
    ],
)
def test_secrets_in_errors(address):
    """The lines of a trial do not show secrets."""
    scheme = address.partition(":")[0]
    fault = trial.TrialError(f"fatal: unable to access {address} : refused")
    assert str(fault) == f"fatal: unable to access {scheme}://host.example/x : refused"


def test_trial_without_remote(finished, tmp_path):
    """A trial without a remote ends before it trains."""
    git(finished, "clone", "--quiet", "--bare", ".", str(tmp_path / "origin.git"))
    commit = git(finished, "rev-parse", "HEAD").strip()
    command = [str(tmp_path / "origin.git"), commit, "by-hand", STAGE]
    done = run_module(finished, "team.trial", *command, FASHION_CNN_TRIALS=str(tmp_path / "node"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: .dvc/config of {commit[:10]}: no default remote, expected one ")


def test_trial_threads(monkeypatch):
    """A trial gets as many threads as the search says.

    A stand-in for the trial prints in its last line what it finds in its environment.
    """
    found = "import os, sys; sys.exit('error: threads: ' + os.environ['FASHION_CNN_THREADS'])"
    monkeypatch.setattr(workers, "connect", lambda: None)
    monkeypatch.setattr(workers, "command", lambda *_: [sys.executable, "-c", found])
    monkeypatch.setenv("FASHION_CNN_THREADS", "5")  # the user's setting, in this process
    with workers.here("commit", STAGE, jobs=1, threads=3) as pool:
        assert pool.submit("a-trial", {}, False).result() == "threads: 3"


def test_default_threads(monkeypatch):
    """A trial has one thread unless the arguments say otherwise."""
    for given, threads in ([], 1), (["--threads", "3"], 3):
        monkeypatch.setattr(sys, "argv", ["search.py", "-S", "train_cnn.epochs=1,2", *given])
        assert search_tool.parse().threads == threads


@pytest.mark.parametrize(("more", "jobs"), [([], 3), (["--jobs", "5"], 5), (["--threads", "8"], 1)])
def test_default_jobs(monkeypatch, more, jobs):
    """Trials take all cores.

    There are seven, two for each trial unless the arguments say otherwise.
    """
    monkeypatch.setattr(sys, "argv", ["search.py", "-S", "train_cnn.epochs=1,2", "--threads", "2", *more])
    arguments = search_tool.parse()
    monkeypatch.setattr(search_tool, "usable_threads", lambda: 7)
    monkeypatch.setattr(search_tool, "here", lambda *given: given)
    search = search_tool.Search.__new__(search_tool.Search)
    search.cluster, search.commit, search.training = None, "commit", search_tool.STAGES[STAGE]
    search.jobs, search.threads = arguments.jobs, arguments.threads
    assert search.workers() == ("commit", STAGE, jobs, arguments.threads)
