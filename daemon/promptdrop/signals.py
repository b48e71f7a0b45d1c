"""Signals that come before anybody can act on them, while the interpreter still imports the rest.

Python's own way would lose them or show a traceback: an exception in the middle of an import.
"""

import os
import signal
import sys

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ours: list[int] = []  # signals that `note` has taken over
_noted: list[int] = []  # those that came


def note() -> None:
    """From now on only note signals that ask for an end or a reload; those that are ignored stay so."""
    _ours[:] = [number for number in _NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
    for number in _ours:
        signal.signal(number, _note)


def noted() -> list[int]:
    """Return the signals that came since `note`, once; the caller handles all that follow."""
    came = _noted[:]
    _noted.clear()
    return came


def act_as_usual() -> None:
    """Let signals end this process again, those that came included. Raises KeyboardInterrupt."""
    for number in _ours:
        is_interrupt = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
    for number in noted():
        signal.raise_signal(number)


def _note(number: int, frame: object) -> None:
    """Signal handler. A second signal ends the process at once: nothing is in hand yet."""
    if _noted and number != signal.SIGHUP:
        os._exit(0 if sys.argv[1:2] == ["run"] else 128 + number)
    _noted.append(number)
