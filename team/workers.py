"""Where a search runs its trials: on this machine, or on a Ray cluster."""

import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from fashion_cnn.project.errors import StageError, StoreError
from fashion_cnn.project.process import KEEP_CHECKPOINT
from fashion_cnn.project.repository import git
from fashion_cnn.tracking.store import CONNECT, connect
from team.trial import reference_of, run, steadily

ROOT = Path(__file__).resolve().parents[1]
RETRIES = 3  # of a trial whose node was lost


class Workers(NamedTuple):
    """What runs trials."""

    # Takes an experiment's name, its params, and whether a longer training will resume it. The result is the
    # reason why it failed, or "".
    submit: Callable[[str, dict[str, str], bool], Future]
    room: Callable[[], int]  # how many trials may run at once, now
    fetch: Callable[[], object]  # fetches the experiments of trials


@contextmanager
def here(commit: str, stage: str, jobs: int, threads: int) -> Iterator[Workers]:
    """Run trials on this machine, `jobs` at once; those still running at the end are stopped."""
    try:
        connect()
    except StoreError as error:
        print(f"{error}; the trials are kept as experiments, and `fashion-cnn sync` sends them later")
    processes: list[subprocess.Popen] = []
    starting, is_over = Lock(), False

    def attempt(name: str, settings: dict[str, str], is_resumed: bool) -> str:
        with starting:
            if is_over:
                return "stopped"
            # The kernel kills the trial if this waiting thread dies. The trial has its own session, so that
            # Ctrl-C reaches it once, from here.
            process = subprocess.Popen(
                command(str(ROOT), commit, name, stage, settings), cwd=ROOT,
                start_new_session=True, text=True, env=environment(threads, is_resumed),
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
def on_ray(commit: str, stage: str, address: str, threads: int, gpus: float) -> Iterator[Workers]:
    """Run trials on a Ray cluster whose nodes clone `origin`; those still running at the end are stopped.

    Raises StageError if the cluster cannot be used, or `origin` lacks the commit.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # otherwise endless
    import ray

    repository = address_of_origin()
    if not git("branch", "--remotes", "--list", "origin/*", "--contains", commit):
        raise StageError(
            f"{commit[:10]}: not in origin, from which the nodes clone; `git push` sends it there"
        )
    # The code is sent with each trial, so that a node needs only the project's environment.
    code = git("archive", commit, "fashion_cnn", "team")

    def attempt(name: str, settings: dict[str, str], is_resumed: bool) -> str:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["tar", "--extract", "--directory", folder], input=code, check=True)
            done = subprocess.run(
                command(repository, commit, name, stage, settings), cwd=folder,
                check=False, text=True, stdin=subprocess.DEVNULL, capture_output=True,
                env=environment(threads, is_resumed),
            )  # fmt: skip
        return fault(done.returncode, done.stderr)

    addresses: dict[str, str] = {}  # of the nodes that were alive at the last look, by their ids

    def room() -> int:
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for node in addresses.keys() - alive.keys():
            print(f"node {addresses.pop(node)} lost; its trials run again on another one", flush=True)
        addresses.update({node: one["NodeManagerAddress"] for node, one in alive.items()})
        nodes = [node["Resources"] for node in alive.values()]
        enough = 1e-9  # 1 / 0.2 may be a little less than 5
        return sum(
            int(min(one.get("CPU", 0) / threads, one.get("GPU", 0) / gpus + enough if gpus else math.inf))
            for one in nodes
        )

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    expected = "expected HOST:PORT of a cluster; this machine must be a node of it and have its token"
    stop = signal.getsignal(signal.SIGTERM)
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=CONNECT).close()  # Ray takes minutes to fail
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise StageError(f"RAY_ADDRESS {address}: {' '.join(str(error).split())}; {expected}") from None
    signal.signal(signal.SIGTERM, stop)  # Ray has replaced it
    # Private, but otherwise Ray prints two dozen coloured lines when a node is lost; room() prints one.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    # Ray reruns a trial if its node or its process is lost.
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)(attempt)
    names = reference_of(commit, "trial-*")
    # No pruning, whatever git's settings are: trials that ran only here are kept.
    fetch = ("git", "fetch", "--quiet", "--no-prune", "--no-tags", "origin", f"+{names}:{names}")
    try:
        yield Workers(lambda *trial: task.remote(*trial).future(), room, lambda: steadily(Path.cwd(), *fetch))
    finally:
        ray.shutdown()  # also ends the trials
        run(Path.cwd(), *fetch, check=False)  # what has ended since the last fetch


def address_of_origin() -> str:
    """What nodes clone. Raises StageError if origin has no address, or one that shows them a password."""
    found = git("config", "--default", "", "--get", "remote.origin.url").decode().strip()
    if not found:
        raise StageError("git has no remote origin, expected the repository that nodes clone")
    if re.match(r"https?://[^/]*@", found):
        what = "has a user or a password, expected none, because it is sent to all nodes"
        raise StageError(f"the address of origin {what}; a node's git takes them from a credential helper")
    return str(Path(found).resolve()) if Path(found).exists() else found


def command(repository: str, commit: str, name: str, stage: str, settings: dict) -> list[str]:
    """The command of a trial. The kernel kills it when the process that waits for it ends."""
    changes = [f"{path}={value}" for path, value in settings.items()]
    trial = [sys.executable, "-m", "team.trial", repository, commit, name, stage, *changes]
    return ["setpriv", "--pdeathsig", "KILL", *trial]


def environment(threads: int, is_resumed: bool) -> dict[str, str]:
    """This process's environment, for a trial with `threads` threads."""
    keep = {KEEP_CHECKPOINT: "1"} if is_resumed else {}
    return os.environ | {"FASHION_CNN_THREADS": str(threads)} | keep


def fault(code: int, said: str) -> str:
    """The line that says why a trial failed; empty if it did not."""
    return "" if code == 0 else ("killed", *said.strip().splitlines())[-1].removeprefix("error: ")
