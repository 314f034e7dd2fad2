"""Several machines share DVC's cache through a real S3 server on this machine."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crash import Started
from pipeline import SMALL, dvc, outputs, ran, set_params, tool, tracked_runs
from project import copy_of_project, git
from team_servers import ADMIN, READER, client, free_ports, make_bucket, s3_server, share, steadily, stored

pytestmark = [
    pytest.mark.team,
    pytest.mark.filterwarnings("ignore"),  # boto's own warnings
]

EVALUATE = "evaluate_cnn@original"
WRONG = {"AWS_ACCESS_KEY_ID": "admin", "AWS_SECRET_ACCESS_KEY": "wrong-secret"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project whose first CNN is trained and evaluated."""
    project = copy_of_project(tmp_path_factory.mktemp("team") / "first")
    set_params(project, SMALL)
    (project / "dvc.lock").unlink()
    dvc(project, "repro", EVALUATE)
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "results")
    return project


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    """The port of a server that all tests share."""
    [number] = free_ports(1)
    with s3_server(tmp_path_factory.mktemp("s3"), number):
        yield number


@pytest.fixture
def bucket(project, port, request) -> str:
    """A new bucket, which is the project's remote."""
    name = f"bucket-{hashlib.md5(request.node.name.encode()).hexdigest()}"
    make_bucket(port, name)
    share(project, port, name)
    git(project, "commit", "--quiet", "--all", "--message", "a remote")
    return name


def test_shared_results(project, port, bucket, tmp_path):
    """A machine evaluates what another one has trained."""
    dvc(project, "push", **ADMIN)
    second = tmp_path / "second"
    git(tmp_path, "clone", "--quiet", str(project), str(second))
    share(second, port, bucket)
    dvc(second, "pull", "--allow-missing", **READER)  # other stages never ran
    assert ran(dvc(second, "repro", EVALUATE).stdout) == []
    assert outputs(second) == outputs(project)
    assert tool(second, "sync").count(": made, commit, params, curve, ") == 1
    [here], [there] = tracked_runs(project), tracked_runs(second)
    assert there.data.tags["weights_sha256"] == here.data.tags["weights_sha256"]
    assert there.data.metrics["test_accuracy"] == here.data.metrics["test_accuracy"]
    # The first machine need not repeat what the second evaluates and trains.
    set_params(second, {"evaluate_cnn": {"mistakes": 3}})
    assert ran(dvc(second, "repro", EVALUATE).stdout) == [EVALUATE]
    git(second, "commit", "--quiet", "--all", "--message", "fewer mistakes")
    dvc(second, "exp", "run", "--name", "slower", "-S", "train_cnn.learning_rate=1e-5", EVALUATE)
    dvc(second, "push", **ADMIN)
    dvc(second, "exp", "push", "origin", "slower", **ADMIN)
    git(project, "pull", "--quiet", str(second))
    dvc(project, "pull", "--allow-missing", **READER)
    assert ran(dvc(project, "repro", EVALUATE).stdout) == []
    dvc(project, "exp", "pull", str(second), "slower", **READER)
    dvc(project, "exp", "apply", "slower", check=False)  # as above, some stages never ran
    assert ran(dvc(project, "repro", EVALUATE).stdout) == []
    assert outputs(project) == outputs(second)


@pytest.mark.parametrize(
    ("who", "is_up", "is_there", "words"),
    [
        (WRONG, True, True, "Forbidden"),
        (READER, True, True, "Access Denied"),
        (ADMIN, True, False, "bucket does not exist"),
        (ADMIN, False, True, "Could not connect to the endpoint URL"),
    ],
    ids=["wrong key", "read-only key", "no bucket", "dead server"],
)
def test_failed_push(project, port, bucket, who, is_up, is_there, words):
    """A push that cannot be done ends with a line and stores nothing."""
    [dead] = free_ports(1)
    share(project, port if is_up else dead, bucket if is_there else "absent")
    done = dvc(project, "push", check=False, **who)
    assert done.returncode != 0
    assert words in done.stdout
    assert "Traceback" not in done.stdout
    assert stored(port, bucket) == {}
    assert "absent" not in [one["Name"] for one in client(port).list_buckets()["Buckets"]]


def test_interrupted_upload(project, tmp_path):
    """An interrupted upload leaves whole objects, and the next push stores the rest."""
    [port] = free_ports(1)
    share(project, port, "cut")
    with s3_server(tmp_path / "s3", port) as server:
        make_bucket(port, "cut")
        push = Started(project, tmp_path / "push.log", "-m", "dvc", "push", **ADMIN)
        while not steadily(lambda: stored(port, "cut")) and not push.ended():
            time.sleep(0.02)
        os.killpg(server.pid, signal.SIGKILL)
        assert push.process.wait() != 0
    with s3_server(tmp_path / "s3", port):
        before = steadily(lambda: stored(port, "cut"))
        assert before
        assert all(hashlib.md5(content).hexdigest() == name for name, content in before.items())
        steadily(lambda: client(port).put_object(Bucket="cut", Key="second", Body=b"there"))
        dvc(project, "push", **ADMIN)
        assert len(stored(port, "cut")) > len(before)
        assert "in sync" in dvc(project, "status", "--cloud", **READER).stdout
