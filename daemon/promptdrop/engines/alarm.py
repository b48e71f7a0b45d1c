"""The time limit of images, by the time in which this process could work on them.

The kernel's timer goes on while a process is stopped or frozen (SIGSTOP, a cgroup's freezer). So it rings
several times a second, and what counts is how many rings came through: a process that stands still gets
one for all of them (signal(7): standard signals do not queue). They are counted without the GIL, by
signal.set_wakeup_fd, so that a long C call is no excuse.
"""

import math
import os
import signal
import time

from promptdrop.clock import AWAY_SECONDS
from promptdrop.errors import ImageTimeout

_RING_SECONDS = 0.25  # the longest time between two rings
_FEWEST = 4  # rings, however short the limit


class Alarm:
    """Raises ImageTimeout after `seconds` of its block, in Python code; a C call delays it.

    Thread: the main thread, as Python runs signal handlers there.
    """

    def __init__(self, seconds: float) -> None:
        self.is_over = False  # it was raised, which a destructor or a bare except may swallow
        self._seconds = seconds
        self._every = seconds / max(_FEWEST, math.ceil(seconds / _RING_SECONDS))
        self._lived = self._counted = 0.0
        self._is_set = False

    def __enter__(self) -> "Alarm":
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGALRM, self._rung)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._counted, self._is_set = time.monotonic(), True
        signal.setitimer(signal.ITIMER_REAL, self._every, self._every)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_set = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(self._before)
        os.close(self._read)
        os.close(self._write)

    def _rung(self, number: int, frame: object) -> None:
        """Signal handler: count the time since the last call, or the rings if we stood still between."""
        if not self._is_set:
            return
        rings = self._rings() * self._every
        now = time.monotonic()
        since, self._counted = now - self._counted, now
        self._lived += since if since < rings + AWAY_SECONDS else rings
        if self._lived > self._seconds - self._every / 2:
            self._is_set, self.is_over = False, True
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise ImageTimeout

    def _rings(self) -> int:
        """Count the rings since the last call; each has left a byte."""
        try:
            return len(os.read(self._read, 1 << 16))
        except BlockingIOError:
            return 0
