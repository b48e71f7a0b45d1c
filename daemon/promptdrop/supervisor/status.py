"""Compose the status: what the daemon does, with which engines, and what waits."""

import os
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from promptdrop import clock, names
from promptdrop.intake.intake import Intake
from promptdrop.pool.link import EngineLink
from promptdrop.pool.pool import UNLOADED, Slot
from promptdrop.records import (
    VERSION,
    Status,
    StatusEngine,
    StatusFinished,
    StatusImage,
    StatusJob,
    StatusQueue,
    StatusStuck,
    StatusWaiting,
    Window,
)
from promptdrop.supervisor.gate import Gate
from promptdrop.supervisor.images import Images
from promptdrop.supervisor.jobs import LISTED, Jobs
from promptdrop.supervisor.publishing import Publishing
from promptdrop.supervisor.work import Running, Work
from promptdrop.troubles import Stuck

State = Literal["starting", "ready", "rendering", "paused", "waiting", "stopping"]


class Composer:
    """Gathers the status from the other parts of the supervisor."""

    def __init__(
        self,
        work: Work,
        gate: Gate,
        intake: Intake,
        jobs: Jobs,
        images: Images,
        publishing: Publishing,
    ) -> None:
        self._work, self._gate, self._intake = work, gate, intake
        self._jobs, self._images, self._publishing = jobs, images, publishing
        self._pool = work.pool
        self._started = clock.timestamp()

    def state(self) -> State:
        """Return the daemon's state in a word."""
        if self._gate.stop_at is not None:
            return "stopping"
        if self._gate.paused:
            return "paused"
        if self._gate.why_held() or self._is_stuck():
            return "waiting"
        if self._pool.is_unloaded:
            return "ready"
        if not self._pool.first_warm():
            return "starting"
        return "rendering" if self._work.tickets else "ready"

    def last_end(self) -> StatusFinished | None:
        """Return the end of the job that ended last."""
        return self._jobs.finished[-1] if self._jobs.finished else None

    def key(self, now: float) -> object:
        """Return a value that changes when the status does, the steps of images in engines aside."""
        last = self.last_end()
        stages = [
            (slot.trouble, self._pool.is_unloaded, slot.link and slot.link.stage)
            for slot in self._pool.slots
        ]
        return (
            self.state(),
            self._reason(now),
            self._publishing.published,
            len(self._work.running),
            last.id if last else None,
            stages,
            tuple(self._waiting()),
            tuple(self._stuck()),
        )

    def _reason(self, now: float) -> str | None:
        if (reason := self._gate.reason(now)) or not self._is_stuck():
            return reason
        stuck = next(self._stuck())
        return f"{stuck.name} is stuck: {stuck.why}"

    def compose(self, state: State, now: float) -> Status:
        """Compose the whole status, as of now."""
        window = self._images.window.summary()
        left = len(self._work.queue) + len(self._work.tickets) + self._publishing.set_aside
        engines = [self._engine(slot, now) for slot in self._pool.slots or [Slot(1)]]
        running = self._work.running
        return Status(
            state=state,
            reason=self._reason(now),
            pid=os.getpid(),
            engine=next((e for e in engines if e.state == "ready"), engines[0]),
            engines=engines,
            current=next((e.current for e in engines if e.current), None),
            watch=self._intake.watch,
            queue=StatusQueue(
                jobs=len(running),
                images=left,
                publishing=self._publishing.under_way + self._publishing.stalled,
                behind=self._publishing.set_aside + self._intake.behind,
            ),
            jobs=[_job(one) for one in islice(running.values(), LISTED)],
            waiting=[
                StatusWaiting(file=names.printable(path), why=why) for path, why in self._waiting()
            ],
            stuck=[StatusStuck(file=one.name, why=one.why) for one in self._stuck()],
            finished=list(self._jobs.finished),
            window=window,
            eta_seconds=None if self._is_stuck() else self._eta_seconds(left, window),
            images_published=self._publishing.published,
            started=self._started,
            updated=clock.timestamp(),
            version=VERSION,
        )

    def _stuck(self) -> Iterator[Stuck]:
        return islice(self._gate.stuck(), LISTED)

    def _is_stuck(self) -> bool:
        """Whether all that is left is stuck."""
        has_work = self._work.tickets or len(self._work.queue) or self._publishing.under_way
        return not has_work and any(True for _ in self._stuck())

    def _waiting(self) -> Iterator[tuple[str, str]]:
        return islice(self._intake.waiting.items(), LISTED)

    def _eta_seconds(self, left: int, window: Window) -> float | None:
        warm = sum(slot.warm is not None for slot in self._pool.slots)
        rate = window.images_per_second or (warm * 1e3 / window.p50_ms if window.p50_ms else None)
        return round(left / rate, 1) if rate else None

    def _engine(self, slot: Slot, now: float) -> StatusEngine:
        link, info = slot.link, slot.info
        state: Literal["starting", "ready", "replacing", "stopped"]
        if link is None or self._pool.is_unloaded:
            state = "stopped"
        elif link.is_ready:
            state = "ready"
        else:
            state = "starting" if slot.lives == 1 else "replacing"
        stage = state if link is None or link.is_ready else link.stage
        return StatusEngine(
            name=slot.name,
            state=state,
            stage=UNLOADED if self._pool.is_unloaded else stage,
            reason=slot.trouble,
            pid=link.pid if link else None,
            host=link.host if link else None,
            model=info.model if info else self._work.config.model.id,
            device=info.device if info else None,
            dtype=info.dtype if info else None,
            current=self._image(link, now) if link else None,
        )

    def _image(self, link: EngineLink, now: float) -> StatusImage | None:
        """Return the first image that an engine works on."""
        for ticket, held in link.in_hand.items():
            if held.began is not None and ticket in self._work.tickets:
                job = self._work.tickets[ticket].job
                return StatusImage(
                    job=job.id,
                    file=names.printable(job.path),
                    image=held.spec.image,
                    images=job.images,
                    step=held.step,
                    steps=held.spec.evaluations,
                    seconds=round(now - held.began, 1),
                )
        return None


def one_line(status: Status) -> str:
    """Write the state in one line, for `systemctl status`."""
    if status.reason:
        return f"{status.state}: {status.reason}"
    if status.state == "starting":
        return f"{status.engine.stage}; {status.queue.images} images queued"
    parts: list[str] = [UNLOADED if status.engine.stage == UNLOADED else status.state]
    if status.current:
        parts.append(f"{status.current.file} {status.current.image}/{status.current.images}")
    parts.append(f"{status.queue.images} images queued")
    if status.window.images_per_second:
        parts.append(f"{status.window.images_per_second:.2f} images/s")
    return ", ".join(parts)


def _job(running: Running) -> StatusJob:
    job = running.job
    return StatusJob(
        id=job.id,
        file=names.printable(job.path),
        inode=job.inode,
        folder=job.folder,
        images=job.images,
        done=job.images - running.left,
    )
