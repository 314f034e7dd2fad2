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

DVC = (sys.executable, "-m", "dvc")  # this environment's, whatever is on the path
# What a git hook sets, and may name another repository than that of the current folder.
ELSEWHERE = (
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
)  # fmt: skip
OTHER_CODE = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONHOME", "BASH_ENV", "ENV")  # with which other code runs
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h

# What these libraries read from the environment changes the last bits of results, or the speed, or, as
# Jupyter's backend for matplotlib, stops a stage. No setting of the user's reaches them, because neither
# params nor tags would know of it.
LIBRARIES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "OPENCV_", "NPY_", "MPLBACKEND")


def start(*checks: Callable[[], object]) -> None:
    """Set what must be set before torch is imported, which reads its environment then.

    Ends the process with one line if one of `checks` raises StageError.
    """
    # Before the imports that take seconds, in which DVC can be killed.
    if "DVC_STAGE" in os.environ:
        die_with_parent()
    for name in [name for name in os.environ if name.startswith(LIBRARIES)]:
        del os.environ[name]
    # A thread that waits for the others spins for a moment, then sleeps. By default it keeps spinning,
    # and a training step takes 100 ms if another process holds a core; if it sleeps at once, a step takes
    # 30 ms there but 16.3 on a quiet machine. This takes 33 and 14.4.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
    # Imports make some 300,000 objects that stay, and Python's collector would search them again and again.
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
    os.environ |= {"SHELL": "/bin/sh", "PATH": own_path()}  # DVC runs a stage's command in the first


def own_path() -> str:
    """The PATH on which `python`, as stages are called, is this one: nobody need activate the environment."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def usable_threads(most: int | None = None) -> int:
    """As many as FASHION_CNN_THREADS says, or else as the cores this process may use, at most `most`.

    Affinity and a cgroup's CPU limit count. Raises StageError if the variable is not a whole number.
    """
    if wanted := os.environ.get("FASHION_CNN_THREADS"):
        if not wanted.isascii() or not wanted.isdecimal() or not int(wanted):
            raise StageError(f"FASHION_CNN_THREADS is {wanted}, expected a whole number of 1 or more")
        return int(wanted)
    from joblib import cpu_count  # here, since it takes 0.3 s that most stages need not spend

    cores = cpu_count(only_physical_cores=True)
    return min(cores, most) if most else cores


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies.

    Killing DVC would otherwise leave its stage at work, writing outputs beside those of the next one.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # If the parent died before the call, another process, such as init, is the parent, in another session.
    if os.getsid(os.getppid()) != os.getsid(0):
        os.kill(os.getpid(), signal.SIGKILL)


class Output(io.FileIO):
    """Standard output or error of a stage, which never stops its work.

    A reader that has closed the pipe is no fault. Any other, such as a full disk, is kept in `fault`,
    to be reported when the work is done.
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
    """Call `main` and end the process; on a fault that is not a bug, say so in one line, with code 1.

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
    # End at once: Python would first take torch apart, which takes a second.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if output.fault and not code:
        print(f"error: standard output: {output.fault.strerror}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _for_work(stream: TextIO | None) -> io.TextIOWrapper:
    """`stream` as an Output, each line written at once; one that was closed at the start goes nowhere."""
    # Nowhere is opened, too: the number would else go to the next file, and print would write there.
    raw = Output(stream.fileno(), "w", closefd=False) if stream else Output(os.devnull, "w")
    encoding = stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
