"""Make every daemon late at random, in its loop, its rooms and its log, as on a busy machine.

`make late` puts this folder on PYTHONPATH, so that each Python process runs it at its start. A test
that takes a moment for granted, or a daemon that takes an order of events for granted, fails then.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

DELAYS = (0.0, 0.0, 0.0, 0.02, 0.1, 0.2)  # seconds, before and after what a room does, and a wait
LOG_SECONDS = 0.5  # that a line of the log is late; the next one that is comes LOG_EVERY later
LOG_EVERY = 2.0


def delay(seconds: float) -> None:
    """Sleep, if the clock lets us: libfaketime makes time.sleep EINVAL."""
    try:
        time.sleep(seconds)
    except OSError:
        pass


def make_loop_late(module: ModuleType) -> None:
    """Delay each turn of the loop, and whatever runs in a room."""
    wait, off = module.Loop.wait, module.Loop.off

    def late_wait(self: Any, *arguments: Any) -> None:
        wait(self, *arguments)
        delay(random.choice(DELAYS))

    def late_off(self: Any, room: Any, function: Callable[[], Any], then: Any) -> None:
        def late() -> Any:
            delay(random.choice(DELAYS))
            result = function()
            delay(random.choice(DELAYS))
            return result

        off(self, room, late, then)

    module.Loop.wait, module.Loop.off = late_wait, late_off


def make_log_late(module: ModuleType) -> None:
    """Make some lines of the log late, and with them all that follow."""
    put, due = module._put, 0.0

    def late_put(text: str) -> None:
        nonlocal due
        if time.monotonic() >= due:
            delay(LOG_SECONDS)
            due = time.monotonic() + LOG_EVERY
        put(text)

    module._put = late_put


MAKE_LATE = {"promptdrop.loop": make_loop_late, "promptdrop.log": make_log_late}


class LateFinder(PathFinder):
    """Finds the modules of MAKE_LATE, and changes them once they are imported."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module."""
        if fullname not in MAKE_LATE or not (spec := super().find_spec(fullname, path, target)):
            return None
        assert spec.loader
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            MAKE_LATE[fullname](module)

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, LateFinder)
