"""Where a search runs its trials: on this machine, or on a Ray cluster."""

import io
import logging
import math
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "stages"), str(ROOT)]

from lib.reporting.provenance import git
from lib.stage.errors import StageError
from tracking.store import CONNECT, StoreError, connect
from trial import steadily

CODE = ("tools/trial.py", "stages/lib")
RETRIES = 3  # of a trial whose node was lost


class Workers(NamedTuple):
    """What runs trials."""

    submit: Callable[[str, dict[str, str]], Future]  # whose result is the line that says why it failed, or ""
    room: Callable[[], int]  # how many trials may run at once, now
    fetch: Callable[[], object]  # brings the experiments of trials here


@contextmanager
def here(commit: str, stage: str, jobs: int) -> Iterator[Workers]:
    """Run trials on this machine, `jobs` at once; those that still run at the end are stopped."""
    try:
        connect()
    except StoreError as error:
        print(f"{error}; the trials are kept as experiments, and `make sync` sends them later")
    processes: list[subprocess.Popen] = []
    starting, is_over = Lock(), False

    def attempt(name: str, settings: dict[str, str]) -> str:
        with starting:
            if is_over:
                return "stopped"
            # As long as this thread waits, the kernel ends the trial with it. In a session of its own, so
            # that Ctrl-C comes once, from here.
            process = subprocess.Popen(
                command(ROOT / "tools/trial.py", str(ROOT), commit, name, stage, settings),
                start_new_session=True, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            processes.append(process)
        _, said = process.communicate()
        return fault(process.returncode, said)

    pool = ThreadPoolExecutor(jobs)
    try:
        yield Workers(lambda *trial: pool.submit(attempt, *trial), lambda: jobs, lambda: None)
    finally:
        with starting:
            is_over = True
        for process in processes:
            process.terminate()
        pool.shutdown(cancel_futures=True)


@contextmanager
def on_ray(commit: str, stage: str, address: str, cpus: int, gpus: float) -> Iterator[Workers]:
    """Run trials on a Ray cluster, each of whose nodes clones `origin`; those at work at the end are stopped.

    Raises StageError if the cluster cannot be used, or `origin` lacks the commit.
    """
    import ray

    repository = git("remote", "get-url", "origin").decode().strip()
    if not git("branch", "--remotes", "--list", "origin/*", "--contains", commit):
        raise StageError(
            f"{commit[:10]}: not in origin, from which the nodes clone; `git push` brings it there"
        )
    # Sent with each trial, so that a node needs the environment alone.
    code = git("archive", commit, *CODE)

    def attempt(name: str, settings: dict[str, str]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=io.BytesIO(code)) as files:
                files.extractall(folder, filter="data")
            done = subprocess.run(
                command(Path(folder, CODE[0]), repository, commit, name, stage, settings),
                check=False, text=True, stdin=subprocess.DEVNULL, capture_output=True,
            )  # fmt: skip
        return fault(done.returncode, done.stderr)

    def room() -> int:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(
            int(min(one.get("CPU", 0) // cpus, one.get("GPU", 0) // gpus if gpus else math.inf))
            for one in nodes
        )

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    expected = "expected a cluster's HOST:PORT, and its token in RAY_AUTH_TOKEN"
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=CONNECT).close()  # Ray takes minutes to say no
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said = str(error).strip().splitlines()[0]
        raise StageError(f"RAY_ADDRESS {address}: {said}; {expected}") from None
    # Ray runs a trial again if its node or its process is lost.
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(attempt)
    names = f"refs/exps/{commit[:2]}/{commit[2:]}/trial-*"
    try:
        yield Workers(
            lambda *trial: task.remote(*trial).future(),
            room,
            lambda: steadily(Path.cwd(), "git", "fetch", "--quiet", "origin", f"+{names}:{names}"),
        )
    finally:
        ray.shutdown()  # ends the trials, too


def command(script: Path, repository: str, commit: str, name: str, stage: str, settings: dict) -> list[str]:
    """That of a trial, which the kernel ends when the process that waits for it ends."""
    changes = [f"{path}={value}" for path, value in settings.items()]
    trial = [sys.executable, str(script), repository, commit, name, stage, *changes]
    return ["setpriv", "--pdeathsig", "KILL", *trial]


def fault(code: int, said: str) -> str:
    """The line that says why a trial failed; empty if it did not."""
    return "" if code == 0 else said.strip().removeprefix("error: ") or "killed"
