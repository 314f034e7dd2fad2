"""The boundary of a stage: an expected fault becomes one line and an exit code."""

import signal
import sys
from collections.abc import Callable


class StageError(Exception):
    """A fault that a user can act on; its message names the thing, the value and what was expected."""


def run_stage(main: Callable[[], None]) -> None:
    """Call `main`; on a fault that is not a bug, say so in one line and exit with code 1.

    Ctrl-C and SIGTERM exit with code 130. Anything else is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a KeyboardInterrupt, as Ctrl-C is
    try:
        main()
    except StageError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a missing file, a read-only folder
        sys.exit(f"error: {error.filename or 'output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("stopped on request", file=sys.stderr)
        sys.exit(130)
