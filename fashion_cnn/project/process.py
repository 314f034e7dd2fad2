"""A stage as a process: how it starts, and how it ends."""

import atexit
import ctypes
import gc
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from fashion_cnn.project.errors import StageError

DVC = (sys.executable, "-m", "dvc")  # this environment's DVC, whatever PATH says
# Variables that git hooks set; they may name a repository other than the current folder's.
ELSEWHERE = (
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
)  # fmt: skip
OTHER_CODE = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONHOME", "BASH_ENV", "ENV")  # these make other code run
KEEP_CHECKPOINT = "FASHION_CNN_KEEP_CHECKPOINT"  # set if a training with more epochs will resume this one
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h

# Prefixes of variables that change the last bits of results, or the speed, or, like Jupyter's backend for
# matplotlib, stop a stage. A stage removes them, because neither params nor tags would record them.
LIBRARIES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "OPENCV_", "NPY_", "MPLBACKEND")


def start(*checks: Callable[[], object]) -> None:
    """Prepare the process before torch is imported, because torch reads the environment then.

    Ends the process with one line if one of `checks` raises StageError.
    """
    # This comes before the imports: they take seconds, during which DVC can be killed.
    if "DVC_STAGE" in os.environ:
        die_with_parent()
    for name in [name for name in os.environ if name.startswith(LIBRARIES)]:
        del os.environ[name]
    # A waiting thread spins for a moment, then sleeps. A training step then takes 14.4 ms on a quiet
    # machine and 33 ms if another process keeps a core busy; it takes 16.3 and 30 ms if threads sleep
    # immediately. By default they keep spinning, and with a busy core a step takes 100 ms.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
    # Imports create some 300,000 permanent objects, which Python's collector would scan again and again.
    gc.set_threshold(50_000)
    for check in checks:
        try:
            check()
        except StageError as error:
            sys.exit(f"error: {error}")


def use_own_code() -> None:
    """Let the stages that this process starts run the project's code with this Python, and no other."""
    for name in OTHER_CODE:
        os.environ.pop(name, None)
    os.environ |= {"SHELL": "/bin/sh", "PATH": own_path()}  # DVC runs a stage's command in SHELL


def own_path() -> str:
    """A PATH on which the `python` of stages is this one: nobody needs to activate the environment."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def usable_threads(most: int | None = None) -> int:
    """FASHION_CNN_THREADS if it is set; otherwise the cores this process may use, at most `most`.

    CPU affinity and a cgroup's limit are respected. Raises StageError if the variable is not a whole number.
    """
    if wanted := os.environ.get("FASHION_CNN_THREADS"):
        if not wanted.isascii() or not wanted.isdecimal() or not int(wanted):
            raise StageError(f"FASHION_CNN_THREADS is {wanted}, expected a whole number of 1 or more")
        return int(wanted)
    from joblib import cpu_count  # here: it takes 0.3 s, and most stages do not need it

    cores = cpu_count(only_physical_cores=True)
    return min(cores, most) if most else cores


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies.

    Otherwise, killing DVC would leave its stage running, and writing outputs at the same time as the next.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # If the parent died before the call, another process, such as init, is the parent, in another session.
    if os.getsid(os.getppid()) != os.getsid(0):
        os.kill(os.getpid(), signal.SIGKILL)


class Output(io.FileIO):
    """Standard output or error of a stage; a write error never stops the work.

    A pipe that its reader has closed is not a fault. Any other error, such as a full disk, is kept in
    `fault` and reported when the work is done.
    """

    fault: OSError | None = None

    def write(self, content) -> int:  # type: ignore[override]
        """Write `content`; what cannot be written is dropped."""
        try:
            return super().write(content)
        except BrokenPipeError:
            pass
        except OSError as error:
            self.fault = error
        return len(content)


def run_stage(main: Callable[[], None]) -> None:
    """Call `main` and end the process; a fault that is not a bug prints one line and exits with code 1.

    Ctrl-C and SIGTERM exit with code 130. Anything else is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, as Ctrl-C does
    sys.stdout, sys.stderr = _for_work(sys.stdout), _for_work(sys.stderr)
    output = sys.stdout.buffer.raw  # type: ignore[attr-defined]
    fault, code = None, 0
    try:
        main()
    except StageError as error:
        fault, code = f"error: {error}", 1
    except OSError as error:  # a full disk, a missing file, a read-only folder
        fault, code = f"error: {error.filename or 'output'}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        fault, code = "stopped on request", 130
    except SystemExit as stop:  # the command has said why
        code = int(stop.code or 0)
    if fault:
        print(fault, file=sys.stderr)
    # Exit at once: Python would first tear down torch, which takes a second.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if output.fault and not code:
        print(f"error: standard output: {output.fault.strerror}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _for_work(stream: TextIO | None) -> io.TextIOWrapper:
    """`stream` as a line-buffered Output; one that was closed at the start goes to /dev/null."""
    # Open /dev/null: otherwise the next file would get the free descriptor, and print would write to it.
    raw = Output(stream.fileno(), "w", closefd=False) if stream else Output(os.devnull, "w")
    encoding = stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
