"""Decide about an image that an engine held: publish it, try again, render it alone, or give it up."""

import time
from functools import partial

from promptdrop import log, picture
from promptdrop.loop import Loop, reason_of
from promptdrop.metrics import RollingWindow
from promptdrop.nouns import EngineInfo, ImageSpec
from promptdrop.outbox.publish import Publication
from promptdrop.pool.link import Held
from promptdrop.pool.messages import Rendered
from promptdrop.pool.pool import Slot
from promptdrop.spool import record
from promptdrop.spool.job import DEATHS_FAILED, Job
from promptdrop.supervisor.jobs import Jobs
from promptdrop.supervisor.publishing import Publishing
from promptdrop.supervisor.work import Running, Work


class Images:
    """Decides what comes of an image, and whom a failure is charged to."""

    def __init__(self, work: Work, loop: Loop, jobs: Jobs, publishing: Publishing) -> None:
        self.window = RollingWindow(work.config.metrics.window)
        self._work, self._loop, self._jobs, self._publishing = work, loop, jobs, publishing

    def begun(self, job: Job, spec: ImageSpec) -> None:
        """Count a death of the daemon in advance; `put_down` takes it back."""
        try:
            record.begin_image(job, spec.image)
        except OSError as e:
            log.get().warning("disk.trouble", reason=reason_of(e))  # a death of ours goes uncounted

    def put_down(self, job: Job, number: int) -> None:
        """Take back the death that was counted in advance; charged attempts stay."""
        try:
            record.end_attempt(job, number)
        except OSError as e:
            log.get().warning("disk.trouble", reason=reason_of(e))  # one death too many is counted

    def put_down_all(self) -> None:
        """Take back, at an orderly stop, the deaths that were counted for the images in hand."""
        for running in self._work.running.values():
            for number, state in running.job.states.items():
                if state.outcome == "todo" and running.job.home.exists():
                    self.put_down(running.job, number)

    def put_back(self, running: Running, spec: ImageSpec, behind: bool = False) -> None:
        """Queue an image that was not rendered once more, unless its job was cancelled."""
        if not running.job.cancelled:
            self._work.queue.put_back(running.job, spec.image, behind)
        self.put_down(running.job, spec.image)
        self._jobs.maybe_finish(running)

    def rendered(
        self, slot: Slot, running: Running, held: Held, answer: Rendered, now: float
    ) -> None:
        """Publish an image."""
        assert slot.info
        assert held.began is not None
        rendering = answer.rendering
        self.window.add(now, rendering.latency_ms.render, rendering.utilization_percent)
        publication = Publication(
            job=running.job,
            spec=held.spec,
            pixels=held.pixels,
            rendering=rendering,
            engine=slot.info,
            engine_name=slot.name,
            attempt=running.job.state(held.spec.image).attempts + 1,
            started=held.began,
            window=self.window.summary(),
        )
        self._publishing.publish(running, publication)

    def failed(self, running: Running, spec: ImageSpec, error: str, timed_out: bool) -> None:
        """Charge one attempt; after engine.max_attempts of them the image is given up."""
        job, state = running.job, running.job.state(spec.image)
        state.attempts += 1
        last = state.attempts >= job.settings.max_attempts
        log.get().warning(
            "image.failed",
            job=job.id,
            image=spec.image,
            attempt=state.attempts,
            error=error,
            last=last,
        )
        if not last or job.cancelled:
            self.put_back(running, spec, behind=True)  # it may be poison: it does not come next
        elif timed_out and job.settings.on_timeout == "placeholder" and (info := self._any_info()):
            running.busy += 1
            self._publishing.publish(running, self._placeholder(job, spec, info, error))
        else:
            text = f"{error} (attempt {state.attempts} of {job.settings.max_attempts})"
            self._give_up_later(running, spec, text)

    def lost(self, running: Running, spec: ImageSpec, counts: bool) -> None:
        """Charge no attempt: its host was lost. After DEATHS_FAILED losses in a row the image fails."""
        state = running.job.state(spec.image)
        state.deaths += counts
        if state.deaths < DEATHS_FAILED or running.job.cancelled:
            self.put_back(running, spec, behind=True)
            return
        text = f"hosts were lost, or the daemon died, {DEATHS_FAILED} times with this image in hand"
        self._give_up_later(running, spec, text)

    def batch_failed(self, running: Running, spec: ImageSpec, error: str) -> None:
        """Charge no attempt: nobody knows which image it was. Each is rendered alone from now on."""
        log.get().warning("image.alone", job=running.job.id, image=spec.image, error=error)
        running.alone.add(spec.image)
        self.put_back(running, spec)

    def _give_up_later(self, running: Running, spec: ImageSpec, error: str) -> None:
        running.busy += 1
        work = partial(self._give_up, running.job, spec.image, error)
        self._loop.off("clerk", work, partial(self._give_up_done, running))

    def _give_up(self, job: Job, number: int, error: str) -> None:
        """Record durably that an image failed.

        Thread: clerk.
        """
        record.fail_image(job, number, error)

    def _give_up_done(self, running: Running, _: None) -> None:
        self._jobs.image_ended(running)

    def _any_info(self) -> EngineInfo | None:
        return next((slot.info for slot in self._work.pool.slots if slot.info), None)

    def _placeholder(self, job: Job, spec: ImageSpec, info: EngineInfo, error: str) -> Publication:
        return Publication(
            job=job,
            spec=spec,
            pixels=picture.placeholder(spec.width, spec.height, error),
            rendering=None,
            engine=info,
            engine_name=None,
            attempt=job.state(spec.image).attempts,
            started=time.monotonic(),
            window=self.window.summary(),
            error=error,
        )
