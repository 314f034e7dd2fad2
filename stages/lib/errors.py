"""The boundary of a stage: an expected fault becomes one line and an exit code."""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class StageError(Exception):
    """A fault that a user can act on; its message names the thing, the value and what was expected."""


def run_stage(main: Callable[[], None]) -> None:
    """Call `main` and end the process; on a fault that is not a bug, say so in one line, with code 1.

    Ctrl-C and SIGTERM exit with code 130. Anything else is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, as Ctrl-C does
    fault, code = None, 0
    try:
        main()
    except StageError as error:
        fault, code = f"error: {error}", 1
    except OSError as error:  # a full disk, a missing file, a read-only folder
        fault, code = f"error: {error.filename or 'output'}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        fault, code = "stopped on request", 130
    if fault:
        print(fault, file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End at once: Python would first take torch and MLflow apart, which takes two seconds."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
