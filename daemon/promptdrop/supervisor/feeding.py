"""Keep the engines busy: the next image goes to the one with the fewest in hand."""

from functools import partial
from typing import Any

from promptdrop.loop import PUBLISHERS, Loop, Owner
from promptdrop.pool.messages import Render
from promptdrop.pool.pool import Slot
from promptdrop.spool import claim
from promptdrop.spool.job import Job
from promptdrop.supervisor.gate import Gate
from promptdrop.supervisor.holding import Holding
from promptdrop.supervisor.jobs import Jobs
from promptdrop.supervisor.publishing import Publishing
from promptdrop.supervisor.work import Running, Work


class Feeder:
    """Sends queued images to engines."""

    def __init__(
        self,
        work: Work,
        gate: Gate,
        loop: Loop,
        jobs: Jobs,
        holding: Holding,
        publishing: Publishing,
    ) -> None:
        self._work, self._gate, self._loop, self._jobs = work, gate, loop, jobs
        self._holding, self._publishing = holding, publishing

    def feed(self, now: float) -> None:
        """Send as many images as engines and publishers have room for."""
        if self._gate.lets_images_begin:
            self._send_images(now)
            self._work.pool.begin()

    def _send_images(self, now: float) -> None:
        pool, queue = self._work.pool, self._work.queue
        room = max(PUBLISHERS, 2 * len(pool.slots) * self._work.config.engine.batch)
        while self._publishing.under_way < room and (slot := pool.has_room()):
            taken = self._take()
            if taken is None:
                pool.share()
                return
            job, number = taken
            running = self._work.running[job.id]
            try:
                claim.take(job)
            except OSError:
                self._hold(running, number)
                continue
            try:
                self._send(slot, running, number, now)
            except OSError as e:
                queue.put_back(job, number)
                self._gate.disk_failed(e)
                return

    def _hold(self, running: Running, number: int) -> None:
        """Have the clerk take a job that the loop cannot; until then none of its images begins, nor its end."""
        running.busy += 1
        self._holding.stalled(running, begins=True)
        self._holding.set_aside(running, number)
        work = partial(self._take_job, running.job)
        then = partial(self._take_job_done, running)
        self._loop.off("clerk", work, then, owner=Owner(running.job.shown, running.job.lane))

    def _take_job(self, job: Job) -> None:
        """Move a job to the active ones, unless nobody wants it any more.

        Thread: clerk.
        """
        if not job.cancelled:
            claim.take(job)

    def _take_job_done(self, running: Running, _: None) -> None:
        running.busy -= 1
        self._holding.stalled(running, begins=False)
        self._jobs.maybe_finish(running)

    def _take(self) -> tuple[Job, int] | None:
        """Take the next image that nothing holds: (job, number)."""
        while taken := self._work.queue.take():
            job, number = taken
            if not self._holding.is_held(job):
                return taken
            self._holding.set_aside(self._work.running[job.id], number)
        return None

    def _send(self, slot: Slot, running: Running, number: int, now: float) -> None:
        """Send one image to an engine. Raises OSError: out of descriptors or memory."""
        assert slot.link
        job, ticket = running.job, self._work.next_ticket()
        empty_cache = (slot.sent + 1) % self._work.config.engine.empty_cache_every == 0
        kind = _kind(running, number)
        render = Render(ticket, job.specs[number - 1], job.settings.prompt, kind, empty_cache)
        slot.link.render(ticket, render, now)
        running.busy += 1
        slot.sent += 1
        slot.has_news = True
        self._work.tickets[ticket] = running


def _kind(running: Running, number: int) -> tuple[Any, ...] | None:
    """Return the batch key of an image; None if it is rendered alone, as it failed or ended a process."""
    job, state = running.job, running.job.states.get(number)
    if number in running.alone or (state and (state.attempts or state.deaths)):
        return None
    return job.specs[number - 1].kind, job.settings.prompt, job.priority
