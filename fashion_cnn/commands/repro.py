"""Run the pipeline, both CNNs at once.

A single `dvc repro` gives the same results, one stage after the other. Both CNNs at once, with half the cores
each, take two thirds of the time. So this starts a `dvc repro` for each of them, as DVC's documentation
proposes, and then one for the rest. If it is stopped halfway, run this or `dvc repro` again.
"""

import ctypes
import fcntl
import json
import os
import pty
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress

from tqdm import tqdm

from fashion_cnn.commands import summary
from fashion_cnn.commands.dvc_state import run_dvc
from fashion_cnn.commands.repair import mend_lock, mend_rwlock
from fashion_cnn.project.catalog import CNNS
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.process import DVC, die_with_parent, usable_threads

BEFORE = "augment_images"  # the trainings read only this stage's inputs and outputs


def main() -> None:
    """Bring everything up to date, and print a summary."""
    mend_rwlock()
    mend_lock()
    cores = usable_threads()
    if cores > 1 and not has_gpu() and both_change():
        dvc("repro", BEFORE)
        train_both(cores // 2)
    dvc("repro")
    sync_runs()
    summary.main()


def sync_runs() -> None:
    """Bring MLflow's runs in line: DVC may have restored results without running their stages."""
    from fashion_cnn.commands import sync  # here: it takes a second, which would delay DVC

    try:
        sync.main_if_new()
    except (StageError, OSError) as error:  # no result is lost
        print(f"MLflow: {error}; `fashion-cnn sync` tries again")


def dvc(*arguments: str) -> None:
    """Run DVC; exit with its code if it fails, because DVC has printed why."""
    if code := run_dvc(*arguments).returncode:
        sys.exit(code)


def both_change() -> bool:
    """Whether both CNNs may have to be trained or evaluated: a change before them counts for both."""
    chains = [training.evaluation for training in CNNS.values()]
    done = run_dvc("status", "--json", "--with-deps", *chains, text=True, capture_output=True)
    if done.returncode:  # `dvc repro` says why
        return False
    changed = json.loads(done.stdout)
    own = [{training.stage, training.evaluation} & changed.keys() for training in CNNS.values()]
    return all(own) or any("@" not in stage for stage in changed)


def has_gpu() -> bool:
    """Whether NVIDIA's driver is installed: one training fills a GPU, and its evaluation uses it, too."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def train_both(threads: int) -> None:
    """Train and evaluate both CNNs at once; if one fails or this is stopped, stop both and exit."""
    chains = [Chain(position, images, threads) for position, images in enumerate(CNNS)]
    try:
        code = follow(chains)
    except KeyboardInterrupt:
        for chain in chains:
            chain.stop()
        follow(chains)
        raise
    finally:
        for chain in reversed(chains):
            chain.bar.close()
    if code:
        sys.exit(code)


def follow(chains: list["Chain"]) -> int:
    """Show what the chains print until all have ended; stop the others if one fails, and return its code."""
    code = 0
    with selectors.DefaultSelector() as selector:
        for chain in chains:
            if not chain.ended:
                selector.register(chain.output, selectors.EVENT_READ, chain)
        while selector.get_map():
            for key, _ in selector.select():
                key.data.show()
                if key.data.ended:
                    selector.unregister(key.fileobj)
                    code = code or key.data.process.wait()
            if code:
                for chain in chains:
                    chain.stop()
    return code


class Chain:
    """A `dvc repro` that trains and evaluates one CNN; its progress has its own line on a terminal."""

    def __init__(self, position: int, images: str, threads: int):
        training = CNNS[images]
        self.prefix, self.text, self.last = f"{images}: ", "", ""
        self.advice = self.ended = self.stopped = False
        self.bar = tqdm(position=position, bar_format="{desc}", leave=False, disable=None)
        self.output, theirs = os.pipe() if self.bar.disable else terminal(len(self.prefix))
        # It gets its own process group, or Ctrl-C would reach it twice: from the terminal and from here.
        self.process = subprocess.Popen(
            [*DVC, "--wait-for-lock", "repro", "--single-item", training.stage, training.evaluation],
            stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, process_group=0,
            preexec_fn=begin, env=os.environ | {"FASHION_CNN_THREADS": str(threads)},
        )  # fmt: skip
        os.close(theirs)

    def show(self) -> None:
        """Show what it has printed since the last call, and note its end."""
        new = b""
        with suppress(OSError):  # a terminal raises it when its last writer is gone
            new = os.read(self.output, 1 << 16)
        self.ended = not new
        *lines, self.text = (self.text + new.decode(errors="replace")).split("\n")
        for line in lines:
            self.show_line(line.rstrip("\r").rpartition("\r")[2].strip())
        self.bar.set_description_str(self.prefix + self.text.rpartition("\r")[2])

    def show_line(self, line: str) -> None:
        """Show a line, unless it is DVC's final advice, or repeats that the stage has failed."""
        self.advice = self.advice or line.startswith("To track the changes with git")
        again = self.last.startswith(("error: ", "stopped on request")) and "failed to reproduce" in line
        if line and not self.advice and not again:
            tqdm.write(line if line.startswith("Running stage") else self.prefix + line)
            self.last = line

    def stop(self) -> None:
        """Stop the running stage, once; DVC itself waits for it, and prints how it ended."""
        if not self.ended and not self.stopped:
            self.stopped = True
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGINT)


def begin() -> None:
    """Set up a chain's process: it ends with this one, and can be stopped even in the background."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a process started with & ignores it


def terminal(margin: int) -> tuple[int, int]:
    """The two ends of a terminal, `margin` columns narrower than the one this runs in."""
    ours, theirs = pty.openpty()
    columns, rows = shutil.get_terminal_size()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, max(20, columns - margin), 0, 0))
    return ours, theirs
