"""A stage as a process: it ends with the DVC that started it."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies.

    Killing DVC would otherwise leave its stage at work, writing outputs beside those of the next one.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Where the parent died before the call, init or the like has taken its place, in another session.
    if os.getsid(os.getppid()) != os.getsid(0):
        os.kill(os.getpid(), signal.SIGKILL)
