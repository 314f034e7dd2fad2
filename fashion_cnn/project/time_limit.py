"""A time limit for a block of code."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: int, fault: Exception) -> Iterator[None]:
    """Raise `fault` in a block that takes longer, whatever library call it waits in."""

    def stop(*_):
        raise fault

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # repeated: Python drops what a destructor raises
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
