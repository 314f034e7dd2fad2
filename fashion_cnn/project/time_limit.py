"""A limit on the time that a block of code may wait."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: int, fault: Exception) -> Iterator[None]:
    """Raise `fault` in a block that takes longer, whichever call of whichever library it waits in."""

    def stop(*_):
        raise fault

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # and again: Python drops what a destructor raises
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
