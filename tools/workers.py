"""Where a search runs its trials: each place gives submit(commit, name, stage, settings).

Its Future has the line that says why the trial failed, or nothing.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "stages"), str(ROOT)]

from tracking.store import StoreError, connect

Submit = Callable[[str, str, str, dict[str, str]], Future]


@contextmanager
def here(jobs: int) -> Iterator[Submit]:
    """Run trials on this machine, `jobs` at once; those that still run at the end are stopped."""
    try:
        connect()
    except StoreError as error:
        print(f"{error}; the trials are kept as experiments, and `make sync` sends them later")
    processes: list[subprocess.Popen] = []
    starting, is_over = Lock(), False

    def attempt(commit: str, name: str, stage: str, settings: dict[str, str]) -> str:
        changes = [f"{path}={value}" for path, value in settings.items()]
        command = [sys.executable, str(ROOT / "tools/trial.py"), str(ROOT), commit, name, stage, *changes]
        with starting:
            if is_over:
                return "stopped"
            # As long as this thread waits, the kernel ends the trial with it. In a session of its own, so
            # that Ctrl-C comes once, from here.
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], start_new_session=True, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            processes.append(process)
        _, said = process.communicate()
        return "" if process.returncode == 0 else said.strip().removeprefix("error: ") or "killed"

    pool = ThreadPoolExecutor(jobs)
    try:
        yield lambda *trial: pool.submit(attempt, *trial)
    finally:
        with starting:
            is_over = True
        for process in processes:
            process.terminate()
        pool.shutdown(cancel_futures=True)
