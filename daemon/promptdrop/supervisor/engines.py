"""Decide what follows from the answers and deaths of engines, and when to unload them."""

import time

from promptdrop import log
from promptdrop.loop import Loop
from promptdrop.nouns import EngineInfo
from promptdrop.pool.link import EngineLink, Held
from promptdrop.pool.messages import (
    Answer,
    Began,
    Cancelled,
    CannotStart,
    Failed,
    Placed,
    Ready,
    Rendered,
    Stage,
    Tokens,
)
from promptdrop.pool.pool import Ended, Slot
from promptdrop.sdnotify import Notifier
from promptdrop.supervisor.gate import Gate
from promptdrop.supervisor.images import Images
from promptdrop.supervisor.measuring import Measuring
from promptdrop.supervisor.work import Running, Work

REST_SECONDS = 30.0  # until an engine that could not be started, while others work, is tried again
IDLE_DEATHS = 5  # deaths in a row without an image in hand after which the engine is given up


class Engines:
    """Hears every engine and decides what follows."""

    def __init__(
        self,
        work: Work,
        gate: Gate,
        loop: Loop,
        images: Images,
        measuring: Measuring,
        notifier: Notifier,
    ) -> None:
        self._work, self._gate, self._loop = work, gate, loop
        self._images, self._measuring, self._notifier = images, measuring, notifier
        self._pool = work.pool
        self._needed_at = 0.0  # when the engines were last needed, monotonic seconds

    def hear(self, now: float) -> None:
        """Take in what engines have said and which have ended; start those that are due."""
        for slot, link, news in self._pool.hear(now, may_start=self._gate.lets_engines_begin):
            if isinstance(news, Ended):
                self._bury(slot, link, now)
            else:
                self._heed(slot, link, news, now)

    def _heed(self, slot: Slot, link: EngineLink, answer: Answer, now: float) -> None:
        if isinstance(answer, Stage):
            log.get().info("engine.stage", engine=slot.name, stage=answer.text)
        elif isinstance(answer, Placed):
            log.get().info("engine.placed", engine=slot.name, host=answer.host, pid=answer.pid)
        elif isinstance(answer, Ready):
            self._ready(slot, link, answer.info, now)
        elif isinstance(answer, CannotStart):
            self._cannot_start(slot, answer.error, answer.exit_status)
        elif isinstance(answer, Tokens):
            self._measuring.answered(answer)
        elif isinstance(answer, Began):
            job = self._work.tickets[answer.ticket].job
            self._images.begun(job, link.in_hand[answer.ticket].spec)
        elif isinstance(answer, Rendered):
            slot.idle_deaths = 0
            running, held = self._work.tickets.pop(answer.ticket), link.take(answer)
            self._images.rendered(slot, running, held, answer, now)
        elif isinstance(answer, (Failed, Cancelled)):
            held = link.take(answer)
            self._not_rendered(self._take_back(answer.ticket, held), held, answer)

    def _not_rendered(self, running: Running, held: Held, answer: Failed | Cancelled) -> None:
        if isinstance(answer, Cancelled):
            self._images.put_back(running, held.spec)
        elif answer.images > 1:
            self._images.batch_failed(running, held.spec, answer.error)
        else:
            self._images.failed(running, held.spec, answer.error, answer.timed_out)

    def _take_back(self, ticket: int, held: Held) -> Running:
        """Take an image without a picture back from its engine. Returns its job."""
        running = self._work.tickets.pop(ticket)
        held.pixels.close()
        running.busy -= 1
        return running

    def _ready(self, slot: Slot, link: EngineLink, info: EngineInfo, now: float) -> None:
        slot.info = info
        log.get().info(
            "engine.ready",
            engine=slot.name,
            model=info.model,
            host=link.host,
            device=info.device,
            dtype=info.dtype,
            seconds=round(now - link.started, 1),
        )
        self._notifier.ready()
        self._measuring.ask()

    def _cannot_start(self, slot: Slot, reason: str, exit_status: int) -> None:
        """End the daemon without waiting for the engine's end, unless other engines can work."""
        slot.rest(reason, time.monotonic() + REST_SECONDS)
        if self._pool.is_hopeless():
            self._gate.end(exit_status, reason)
        else:
            log.get().error(
                "engine.not_started", engine=slot.name, reason=reason, retry_seconds=REST_SECONDS
            )

    # --- death --------------------------------------------------------------------------------

    def _bury(self, slot: Slot, link: EngineLink, now: float) -> None:
        """Charge the image that an engine died of. The pool starts the engine's next life."""
        if slot.is_unloading:
            log.get().info("engine.unloaded", engine=slot.name, pid=link.pid)
            return
        how = link.killed or link.how_it_ended()
        error = link.killed or f"the engine died: {how}"
        log.get().error(
            "engine.lost" if link.is_lost else "engine.died",
            engine=slot.name,
            host=link.host,
            pid=link.pid,
            how=how,
            in_hand=len(link.in_hand),
        )
        died_loading = not (link.is_ready or link.is_lost or slot.trouble)
        if died_loading and self._gate.lets_engines_begin:
            self._cannot_start(slot, f"while {link.stage}: {error}", 1)
        for ticket, held in link.in_hand.items():
            self._charge(link, self._take_back(ticket, held), held, error)
        self._measuring.ask_again(link.questions)
        if link.is_lost and not link.is_ready and self._gate.lets_engines_begin:
            slot.due = time.monotonic() + self._work.config.watch.rescan_seconds
        self._count_idle_death(slot, link, how)

    def _charge(self, link: EngineLink, running: Running, held: Held, error: str) -> None:
        """Decide about an image that a dead engine held."""
        if held.began is None:
            self._images.put_back(running, held.spec)
        elif link.is_lost:
            self._images.lost(running, held.spec, counts=link.gone is not None)
        elif held.batch > 1 or held.is_shared:
            self._images.batch_failed(running, held.spec, error)
        else:
            self._images.failed(running, held.spec, error, link.timed_out)

    def _count_idle_death(self, slot: Slot, link: EngineLink, how: str) -> None:
        """Give up an engine that dies again and again without an image to blame."""
        began = any(held.began is not None for held in link.in_hand.values())
        was_good = began or (link.is_lost and link.is_ready)
        slot.idle_deaths = 0 if was_good else slot.idle_deaths + 1
        if slot.idle_deaths >= IDLE_DEATHS and self._gate.exit_status is None:
            slot.idle_deaths = 0
            reason = f"the engine died {IDLE_DEATHS} times in a row without an image in hand: {how}"
            self._cannot_start(slot, reason, 1)

    # --- idle ---------------------------------------------------------------------------------

    def maybe_unload(self, now: float) -> None:
        """Unload engines that were not needed for a while, and load them when they are needed again."""
        if (after := self._work.config.engine.unload_after_seconds) is None:
            return
        waits = bool(len(self._work.queue) or self._measuring.waiting)
        if (waits and self._gate.lets_images_begin) or self._work.tickets or self._measuring.asked:
            self.load()
            self._needed_at = now
        elif not self._pool.are_loaded:
            self._needed_at = now
        elif now >= self._needed_at + after and not self._pool.is_unloaded:
            self._pool.unload(now)

    def load(self) -> None:
        """Load engines that were unloaded."""
        self._needed_at = time.monotonic()
        if self._pool.is_unloaded:
            self._pool.is_unloaded = False
            self._loop.wake()

    def next_deadline(self, now: float) -> float:
        """Return when `hear` or `maybe_unload` may next have something to do, monotonic seconds."""
        due = self._pool.next_deadline()
        after = self._work.config.engine.unload_after_seconds
        if after and not self._pool.is_unloaded:
            due = min(due, max(now, self._needed_at + after))
        return due
