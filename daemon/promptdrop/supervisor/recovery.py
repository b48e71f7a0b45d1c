"""Go on after a start with the jobs of the daemon's last life."""

import time
from collections import deque
from collections.abc import Callable

from promptdrop import log
from promptdrop.intake.intake import Intake
from promptdrop.loop import Loop
from promptdrop.outbox import publish
from promptdrop.spool import record, recovery
from promptdrop.spool.job import DEATHS_FAILED, Job, Unresolved
from promptdrop.spool.spool import Spool

ACCEPT_SECONDS = 0.02  # of one turn, for jobs of the daemon's last life


class Recovery:
    """Finds the jobs that are left on the disk, then hands on one after another."""

    def __init__(
        self, loop: Loop, spool: Spool, intake: Intake, accept: Callable[[Job], None]
    ) -> None:
        self.is_looking = True  # at the disk: nobody knows yet which jobs there are
        self._loop, self._spool, self._intake, self._accept = loop, spool, intake, accept
        self._left_over: deque[Job] = deque()

    @property
    def is_over(self) -> bool:
        """Whether every job of the last life was handed on."""
        return not (self.is_looking or self._left_over)

    def start(self) -> None:
        """Look at the disk."""
        self._loop.off("clerk", self._recover, self._recover_done)

    def _recover(self) -> tuple[list[Job], list[Unresolved]]:
        """Complete what was half-done, and give up images that daemons have died of.

        Thread: clerk.
        """
        jobs, unresolved = recovery.recover(self._spool)
        for job in jobs:
            if job.is_fresh and job.place == "pending":
                continue  # none of its images was ever begun
            publish.recover(job)
            for number in job.todo():
                if job.deaths(number) >= DEATHS_FAILED:
                    reason = f"the daemon died {DEATHS_FAILED} times with this image in hand"
                    record.fail_image(job, number, reason)
        return jobs, unresolved

    def _recover_done(self, found: tuple[list[Job], list[Unresolved]]) -> None:
        self.is_looking = False
        jobs, unresolved = found
        if jobs or unresolved:
            log.get().info("spool.recovered", jobs=len(jobs), unresolved=len(unresolved))
        for claimed in unresolved:
            self._intake.resolve_again(claimed)
        self._left_over.extend(jobs)
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
