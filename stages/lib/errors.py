"""The boundary of a stage: an expected fault becomes one line and an exit code."""

import atexit
import io
import os
import signal
import sys
from collections.abc import Callable


class StageError(Exception):
    """A fault that a user can act on; its message names the thing, the value and what was expected."""


class Output(io.FileIO):
    """Standard output or error of a stage, which never stops its work.

    A reader that has closed the pipe is no fault. Any other, such as a full disk, is kept in `fault`,
    to be reported when the work is done.
    """

    fault: OSError | None = None

    def write(self, content) -> int | None:
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
    output = sys.stdout.buffer.raw
    fault, code = None, 0
    try:
        main()
    except StageError as error:
        fault, code = f"error: {error}", 1
    except OSError as error:  # a full disk, a missing file, a read-only folder
        fault, code = f"error: {error.filename or 'output'}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        fault, code = "stopped on request", 130
    except SystemExit as stop:  # argparse has said why
        code = stop.code or 0
    if fault:
        print(fault, file=sys.stderr)
    # Ends at once: Python would first take torch and MLflow apart, which takes two seconds.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if output.fault and not code:
        print(f"error: standard output: {output.fault.strerror}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code)


def _for_work(stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """`stream` as an Output, each line written at once; one that was closed at the start goes nowhere."""
    # Nowhere is opened, too: the number would else go to the next file, and print would write there.
    raw = Output(stream.fileno(), "w", closefd=False) if stream else Output(os.devnull, "w")
    encoding = stream.encoding if stream else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
