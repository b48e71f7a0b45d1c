"""Long errands for the clerk, in turn and a slice at a time, so that other work comes in between."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum, auto
from functools import partial
from typing import Any

from promptdrop import names
from promptdrop.loop import TROUBLE, Loop, Owner
from promptdrop.spool import control

SLICE_SECONDS = 0.1  # that the clerk spends on an errand before others have their turn


class Progress(Enum):
    """What a slice of an errand has come to."""

    MORE = auto()  # there is more to do
    DISK = auto()  # what is left waits for a disk
    LATER = auto()  # something is not known yet: the command stays, to be read again
    DONE = auto()  # all is done, and the command removed


class Errand:
    """What a command asks to be done to each of many things. Those in trouble with a disk come last.

    do: to one thing, on the clerk's thread; repeatable. Returns False if the thing is not known yet.
    remove: removes the command, on that thread. report: called on the loop after each slice. share: the part
    of a slice that it may take, where the clerk has more to do for each thing afterwards.
    """

    def __init__(
        self,
        name: str,
        things: Iterable[Any],
        *,
        do: Callable[[Any], bool],
        remove: Callable[[], None],
        report: Callable[[Progress], None],
        share: float = 1.0,
    ) -> None:
        self.name, self.report = name, report
        self._do, self._remove = do, remove
        self._share = share
        self._left = deque(things)
        self._in_trouble: list[Any] = []
        self._is_early = False  # something is not known yet

    def work(self) -> Progress:
        """Do one slice.

        Raises OSError, DiskTrouble: nothing could be done, as all that is left waits for a disk. Any other
        error ends the daemon; the command is removed before, so that it ends no second life.

        Thread: clerk.
        """
        with control.removed_if_fatal(self.name, self._remove):
            return self._work(time.monotonic() + SLICE_SECONDS * self._share)

    def _work(self, until: float) -> Progress:
        trouble: Exception | None = None
        was_useful = False
        while self._left:
            thing = self._left.popleft()
            try:
                self._is_early |= not self._do(thing)
                was_useful = True
            except TROUBLE as e:
                self._in_trouble.append(thing)
                trouble = e
            if self._left and time.monotonic() >= until:
                return Progress.MORE
        self._left.extend(self._in_trouble)
        self._in_trouble.clear()
        if trouble and not was_useful:
            raise trouble
        if self._left:
            return Progress.MORE
        if self._is_early:
            return Progress.LATER
        self._remove()
        return Progress.DONE


class Errands:
    """Runs errands in turn. One that waits for a disk is out of the others' way."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._turns: deque[Errand] = deque()
        self._is_working = False

    def begin(self, errand: Errand) -> None:
        """Give an errand its turns, until it is done."""
        self._turns.append(errand)
        self._next()

    def _next(self) -> None:
        if self._turns and not self._is_working:
            self._is_working = True
            errand = self._turns.popleft()
            self._loop.off("clerk", partial(_work, errand), partial(self._work_done, errand))

    def _work_done(self, errand: Errand, progress: Progress) -> None:
        self._is_working = False
        if progress is Progress.DISK:
            then = partial(self._work_again_done, errand)
            owner = Owner(names.printable(errand.name), lane=("command", errand.name))
            self._loop.off("clerk", partial(_work_again, errand), then, owner=owner)
        self._go_on(errand, progress)

    def _work_again_done(self, errand: Errand, progress: Progress) -> None:
        self._go_on(errand, progress)

    def _go_on(self, errand: Errand, progress: Progress) -> None:
        if progress is Progress.MORE:
            self._turns.append(errand)
        self._next()
        errand.report(progress)


def _work(errand: Errand) -> Progress:
    """Do one slice of an errand.

    Thread: clerk.
    """
    try:
        return errand.work()
    except TROUBLE:
        return Progress.DISK


def _work_again(errand: Errand) -> Progress:
    """Try what waits for a disk again: raises OSError until that is cured, and is repeated.

    Thread: clerk.
    """
    return errand.work()
