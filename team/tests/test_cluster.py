"""Searches on a Ray cluster of one-CPU nodes on this machine, with data and results on a real S3 server."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from crash import Started, stage_processes, wait_until_gone
from pipeline import dvc, ran, tool, tracked_runs
from project import git
from searching import STAGE, WEIGHTS, rates, table_of, trained, trials_of
from servers import free_port, mlflow_server
from team_servers import (
    ADMIN,
    HEAD,
    TOKEN,
    free_ports,
    make_bucket,
    own_network,
    ray_node,
    s3_server,
    wait_for,
)

pytestmark = [
    pytest.mark.team,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs a network of its own, which only root can make"),
    pytest.mark.filterwarnings("ignore"),  # warnings of MLflow and boto
]

RATES = ["--sampler", "grid", "-S"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project with small params and a remote, after its first training; `origin` has its commit."""
    project = trained(tmp_path_factory.mktemp("cluster") / "project")
    dvc(project, "remote", "add", "--force", "--default", "team", "s3://team/cache")
    git(project, "commit", "--quiet", "--all", "--message", "a remote")
    return project


@pytest.fixture(scope="module", autouse=True)
def network(finished) -> Iterator[None]:  # after `finished`: its data may come from the network
    with own_network():
        yield


class Team:
    """What a team's project needs: a repository, an S3 server, a tracking server, a cluster."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.stack = folder, stack
        self.project = folder / "project"
        git(self.project, "clone", "--quiet", "--bare", ".", str(folder / "origin.git"))
        git(self.project, "remote", "add", "origin", str(folder / "origin.git"))
        git(self.project, "fetch", "--quiet", "origin")
        self.commit = git(self.project, "rev-parse", "HEAD").strip()
        [self.s3_port], self.mlflow_port = free_ports(1), free_port()
        self.store = f"http://127.0.0.1:{self.mlflow_port}"
        self.settings = ADMIN | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_port}",
            "MLFLOW_TRACKING_URI": self.store,
            "RAY_ADDRESS": HEAD,
        }
        self.s3 = self.start_s3()
        make_bucket(self.s3_port, "team")
        dvc(self.project, "push", **self.settings)
        self.add_node("head", is_head=True)

    def start_s3(self):
        return self.stack.enter_context(s3_server(self.folder / "s3", self.s3_port))

    def add_node(self, name: str, *, is_head: bool = False):
        return self.stack.enter_context(ray_node(self.folder / name, is_head=is_head, **self.settings))

    def search(self, number: int, *arguments: str) -> Started:
        log = self.folder / f"search-{number}.log"
        command = ["-m", "team.search", *arguments]
        started = Started(self.project, log, *command, **self.settings, **TOKEN)
        self.stack.callback(started.process.kill)
        return started


@pytest.fixture
def team(project, tmp_path) -> Iterator[Team]:
    with ExitStack() as stack:
        yield Team(tmp_path, stack)


def stages_of(node: Path) -> list:
    """The stages running in a node's clones."""
    return [one for clone in node.glob("clones/*/*") if clone.is_dir() for one in stage_processes(clone)]


def test_outages(team, tmp_path):
    """No trial is lost if a node, the remote and the server go away."""
    kill_node = team.add_node("second"), team.add_node("third")
    with mlflow_server(tmp_path, team.mlflow_port):
        search = team.search(0, *RATES, "train_cnn.learning_rate=-1,1e-5,1e-4,0.002")
        wait_for(lambda: stages_of(tmp_path / "third"), search.process, search.log)
        kill_node[1]()
        os.killpg(team.s3.pid, signal.SIGKILL)
    (tmp_path / "origin.git").rename(tmp_path / "away")
    time.sleep(10)
    team.start_s3()
    (tmp_path / "away").rename(tmp_path / "origin.git")
    assert search.process.wait(timeout=400) == 0, search.printed()
    assert "3 of 4 done, 0 running, 1 failed" in search.printed()
    assert "=-1: failed: params.yaml: train_cnn.learning_rate is -1, expected " in search.printed()
    assert re.findall("^node .* lost; its trials run again on another one$", search.printed(), re.MULTILINE)
    assert "raylet" not in search.printed()
    assert rates(team.project) == [1e-5, 1e-4, 0.002]
    # The best comes from the remote, and equals what a training here gives.
    best = table_of(search.printed())[1][0]
    how = rf"(exp pull origin {best}) && git (restore .*{best} .*) && dvc (checkout .*) && make repro\n"
    [(pull, restore, checkout)] = re.findall(how, search.printed())
    dvc(team.project, *pull.split(), **team.settings)
    git(team.project, *restore.split())
    dvc(team.project, *checkout.split())
    assert ran(dvc(team.project, "repro", STAGE).stdout) == []
    bytes_ = (team.project / WEIGHTS).read_bytes()
    dvc(team.project, "repro", "--force", "--single-item", STAGE)
    assert (team.project / WEIGHTS).read_bytes() == bytes_
    # The server later gets what it missed.
    with mlflow_server(tmp_path, team.mlflow_port):
        tool(team.project, "sync", MLFLOW_TRACKING_URI=team.store)
        runs = tracked_runs(team.project, "tags.dvc_exp_name LIKE 'trial-%'", team.store)
    found = {metrics["weights_sha256"][0] for _, metrics in trials_of(team.project).values()}
    assert {run.data.tags["weights_sha256"] for run in runs} == found


def test_stopped_search(team, tmp_path):
    """A stopped search leaves nothing running, and two searches at once continue it."""
    team.add_node("second")
    values = (*RATES, "train_cnn.learning_rate=1e-5,1e-4,0.002", "--jobs", "1")
    reference = f"refs/exps/{team.commit[:2]}/{team.commit[2:]}/trial-of-this-machine"
    git(team.project, "update-ref", reference, team.commit)
    git(team.project, "config", "fetch.prune", "true")  # must not delete what origin lacks
    stopped = team.search(0, *values)

    def at_work() -> list:
        return stages_of(tmp_path / "head") + stages_of(tmp_path / "second")

    wait_for(at_work, stopped.process, stopped.log)
    stages = at_work()
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.process.wait(timeout=100) == 130, stopped.printed()
    assert stopped.printed().endswith("stopped on request\n")
    assert wait_until_gone(stages, timeout=30)
    both = [team.search(number, *values) for number in (1, 2)]
    assert [one.process.wait(timeout=300) for one in both] == [0, 0], both[0].printed() + both[1].printed()
    assert git(team.project, "rev-parse", reference).strip() == team.commit
    git(team.project, "update-ref", "-d", reference)
    assert rates(team.project) == [1e-5, 1e-4, 0.002]
    assert all("3 of 3 done, 0 running, 0 failed" in one.printed() for one in both)
    assert table_of(both[0].printed()) == table_of(both[1].printed())


def test_unusable_cluster(team, tmp_path):
    """The error for a cluster that cannot be used is one line."""

    def said(*arguments: str, **more: str) -> str:
        started = Started(
            team.project, tmp_path / "log", "-m", "team.search", *RATES, "split.seed=1,2",
            *arguments, **(team.settings | TOKEN | more),
        )  # fmt: skip
        try:
            assert started.process.wait(timeout=100) == 1, started.printed()
        finally:
            started.process.kill()
        [line] = [line for line in started.printed().splitlines() if line.startswith("error: ")]
        return line

    nowhere = f"127.0.0.1:{free_port()}"
    assert said(RAY_ADDRESS=nowhere).startswith(f"error: RAY_ADDRESS {nowhere}: ")
    assert said(RAY_ADDRESS="nonsense").startswith("error: RAY_ADDRESS nonsense: ")
    assert "this machine must be a node of it and have its token" in said(
        RAY_AUTH_TOKEN="of-another-cluster-than-this-one"
    )
    assert said("--workers", "ray", RAY_ADDRESS="").startswith("error: RAY_ADDRESS: not set, expected ")
    git(team.project, "commit", "--quiet", "--allow-empty", "--message", "here alone")
    assert "not in origin" in said()
    assert trials_of(team.project) == {}
