"""A stage as a process: it ends with the DVC that started it, and a request to stop is an interrupt."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def behave() -> None:
    """Set up this process; call it before any work."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a KeyboardInterrupt, as Ctrl-C is
    if "DVC_STAGE" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies.

    Killing DVC would otherwise leave its stage at work, writing outputs beside those of the next one.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGKILL)
