"""Go on after a start with the jobs of the daemon's last life."""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from promptdrop import log
from promptdrop.intake.intake import Intake
from promptdrop.loop import Loop, Owner
from promptdrop.outbox import publish
from promptdrop.spool import record, recovery
from promptdrop.spool.job import DEATHS_FAILED, Job, Unresolved
from promptdrop.spool.recovery import Left
from promptdrop.spool.spool import Spool

ACCEPT_SECONDS = 0.02  # of one turn, for jobs of the daemon's last life


class Recovery:
    """Finds the jobs that are left on the disk, then hands on one after another."""

    def __init__(
        self, loop: Loop, spool: Spool, intake: Intake, accept: Callable[[Job], None]
    ) -> None:
        self.is_looking = True  # at the disk: nobody knows yet which jobs there are
        self.troubled = 0  # jobs that cannot be recovered now, because of a disk of their own
        self._loop, self._spool, self._intake, self._accept = loop, spool, intake, accept
        self._left_over: deque[Job] = deque()

    @property
    def is_over(self) -> bool:
        """Whether every job of the last life was handed on that could be recovered."""
        return not (self.is_looking or self._left_over)

    def start(self) -> None:
        """Look at the disk."""
        self._loop.off("clerk", self._recover, self._recover_done)

    def _recover(self) -> tuple[list[Left], list[Path]]:
        """Complete what was half-done, and give up images that daemons have died of.

        Thread: clerk.
        """
        found, troubled = recovery.recover(self._spool)
        left = []
        for one in found:
            try:
                self._complete(one)
            except OSError:
                troubled.append(one.home)
            else:
                left.append(one)
        return left, troubled

    def _recover_one(self, home: Path) -> Left | None:
        """Do the same for one job.

        Thread: clerk.
        """
        self._spool.folders.require()
        one = recovery.recover_one(self._spool, home)
        if one:
            self._complete(one)
        return one

    def _complete(self, one: Left) -> None:
        """Complete what a job has half-published.

        Thread: clerk.
        """
        if isinstance(one, Unresolved) or (one.is_fresh and one.place == "pending"):
            return  # none of its images was ever begun
        self._spool.folders.require_inner("outbox", one.folder)
        publish.recover(one, self._spool.outbox)
        for number in one.todo():
            if one.deaths(number) >= DEATHS_FAILED:
                reason = f"the daemon died {DEATHS_FAILED} times with this image in hand"
                record.fail_image(one, number, reason)

    def _recover_done(self, found: tuple[list[Left], list[Path]]) -> None:
        self.is_looking = False
        left, troubled = found
        claims = [one for one in left if isinstance(one, Unresolved)]
        jobs = [one for one in left if isinstance(one, Job)]
        if left:
            log.get().info("spool.recovered", jobs=len(jobs), unresolved=len(claims))
        for claimed in claims:
            self._intake.resolve_again(claimed)
        self._left_over.extend(jobs)
        self.troubled = len(troubled)
        for home in troubled:
            owner = Owner(home.name, lane=home.name)
            work = partial(self._recover_one, home)
            self._loop.off("clerk", work, self._recover_one_done, owner=owner)
        self._intake.wake()

    def _recover_one_done(self, one: Left | None) -> None:
        self.troubled -= 1
        if isinstance(one, Unresolved):
            self._intake.resolve_again(one)
        elif one:
            self._accept(one)
        self._intake.wake()

    def go_on(self, now: float) -> None:
        """Hand on as many jobs as one turn has time for, so that it stays short."""
        if not self._left_over:
            return
        while self._left_over and time.monotonic() < now + ACCEPT_SECONDS:
            self._accept(self._left_over.popleft())
        if self._left_over:
            self._loop.wake()
        else:
            self._intake.wake()  # commands have waited until every job was known
