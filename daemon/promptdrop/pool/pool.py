"""The daemon's engines: how many, on what device, one life after another.

Where they run is a Backend's business; what to do about their answers and deaths is the supervisor's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from promptdrop import log
from promptdrop.config import Config
from promptdrop.errors import ConfigError
from promptdrop.loop import reason_of
from promptdrop.metrics import gpu_count
from promptdrop.nouns import EngineInfo
from promptdrop.pool import process
from promptdrop.pool.link import EngineLink, InHand, Limits
from promptdrop.pool.messages import Answer

UNLOADED = "unloaded, idle"  # what the status says
FULL_SECONDS = 0.1  # until an engine is begun that its backend could not take in now
DEPTH = 2  # batches in an engine: the one being rendered and the next, so the device never waits


@dataclass(slots=True)
class Slot:
    """The place of one engine."""

    number: int  # from 1
    engine: EngineLink | None = None
    info: EngineInfo | None = None  # of the last life that was warm
    lives: int = 0
    idle_deaths: int = 0  # deaths in a row without an image in hand
    sent: int = 0  # images, for empty_cache_every
    is_unloading: bool = False  # this life was ended to give its device back
    has_news: bool = False  # images were sent that may not be begun yet
    due: float = 0.0  # when its next life begins, on the daemon's monotonic clock
    trouble: str | None = None  # why it has no engine, or one that cannot work

    @property
    def name(self) -> str:
        """What sidecars, status and log call it."""
        return f"engine-{self.number}"

    @property
    def warm(self) -> EngineLink | None:
        """Its engine, if that takes images."""
        alive = self.engine
        return alive if alive and alive.is_ready and not alive.killed else None

    def rest(self, reason: str, until: float) -> None:
        """No life before `until`, for this reason."""
        self.trouble, self.due = reason, until


@dataclass(frozen=True, slots=True)
class Ended:
    """News of an engine: it is dead, and all it said was heard."""


class Backend(Protocol):
    """Where engines run."""

    may_begin: bool  # an engine, now
    trouble: str | None  # why not, if it should be so

    def wanted(self, slots: list[Slot]) -> int:
        """How many slots there shall be; never fewer than there are."""

    def begin(self, slot: Slot, settings: Config) -> EngineLink:
        """A new life. Raises OSError: out of descriptors, processes or memory; BlockingIOError: not
        all at once."""

    def is_hopeless(self, slots: list[Slot]) -> bool:
        """Whether nobody will render, now that no engine of these is warm or on its way there."""

    def readers(self) -> list[int]:
        """What to wait on; then `hear`."""

    def hear(self, now: float) -> None:
        """Take in what happened; begin again what has ended."""

    def next_deadline(self) -> float:
        """When `hear` has something to do unasked, on the daemon's monotonic clock."""

    def close(self) -> None:
        """The daemon ends."""


class ChildProcesses:
    """A Backend: child processes of the daemon, one for each device."""

    may_begin = True
    trouble: str | None = None

    def __init__(self, settings: Config) -> None:
        """Raises ConfigError: more workers than GPUs."""
        model, workers, gpus = settings.model, settings.engine.workers, gpu_count()
        if model.device == "cpu":
            gpus = 0
        if workers == "auto":
            workers = gpus if model.device == "auto" and gpus else 1
        if workers > 1 and model.device.startswith("cuda:"):
            raise ConfigError(
                f"engine.workers: {workers}, but model.device: {model.device} is one device;"
                " expected auto"
            )
        if workers > 1 and gpus and workers > gpus:
            raise ConfigError(
                f"engine.workers: {workers}; expected at most {gpus}, one a GPU of this machine"
            )
        self._workers = workers
        self._has_own_device = workers > 1 and gpus > 0

    def wanted(self, slots: list[Slot]) -> int:
        return self._workers

    def begin(self, slot: Slot, settings: Config) -> EngineLink:
        if self._has_own_device:
            device = {"device": f"cuda:{slot.number - 1}"}
            settings = settings.model_copy(
                update={"model": settings.model.model_copy(update=device)}
            )
        return process.start(settings)

    def is_hopeless(self, slots: list[Slot]) -> bool:
        return all(slot.engine is None or slot.trouble for slot in slots)

    def readers(self) -> list[int]:
        return []

    def hear(self, now: float) -> None:
        pass

    def next_deadline(self) -> float:
        return float("inf")

    def close(self) -> None:
        pass


class Pool:
    """All slots. Never waits; the supervisor's loop does."""

    def __init__(self, settings: Config, backend: Backend) -> None:
        self.settings = settings  # replaced by SIGHUP's
        self.slots: list[Slot] = []
        self.is_unloaded = False  # until there is something to do
        self._backend = backend
        self._may_begin = False  # an engine, at the last look

    @property
    def trouble(self) -> str | None:
        """Why no engine works and none is on its way; one that works is enough."""
        if any(slot.engine and not slot.trouble for slot in self.slots):
            return None
        return self._backend.trouble or next((s.trouble for s in self.slots if s.trouble), None)

    @property
    def outlive_kill(self) -> bool:
        """Whether all there are were killed and do not end."""
        return bool(self.slots) and all(s.engine and s.trouble for s in self.slots)

    def is_hopeless(self) -> bool:
        """Whether no engine is warm, on its way, or can be expected."""
        return self._backend.is_hopeless(self.slots)

    def readers(self) -> list[int]:
        """What to wait on."""
        links = [d for slot in self.slots if slot.engine for d in slot.engine.readers()]
        return [*links, *self._backend.readers()]

    def writers(self) -> list[int]:
        """What to wait on until it takes more."""
        return [d for slot in self.slots if slot.engine for d in slot.engine.writers()]

    @property
    def limits(self) -> Limits:
        """How long an engine may be silent."""
        section = self.settings.engine
        return Limits(
            section.load_timeout_seconds,
            section.kill_grace_seconds,
            section.stall_seconds,
            section.stall_seconds or section.image_timeout_seconds,
        )

    def next_deadline(self) -> float:
        """When `hear` may have something to do unasked, on the daemon's monotonic clock."""
        due, limits = [self._backend.next_deadline()], self.limits
        for slot in self.slots:
            if slot.engine is None:
                due.append(slot.due if self._may_begin else float("inf"))
            elif not slot.trouble:
                due.append(slot.engine.next_deadline(limits))
        return min(due)

    def hear(
        self, now: float, may_start: bool
    ) -> Iterator[tuple[Slot, EngineLink, Answer | Ended]]:
        """What engines have said, and which have ended; starts those that are due."""
        self._backend.hear(now)
        may_start = may_start and not self.is_unloaded
        self._may_begin = may_start and self._backend.may_begin
        while may_start and len(self.slots) < self._backend.wanted(self.slots):
            self.slots.append(Slot(len(self.slots) + 1))
        for slot in self.slots:
            if slot.engine:
                yield from self._hear(slot, slot.engine, now)
            elif self._may_begin and now >= slot.due:
                self._start(slot, now)

    def _hear(
        self, slot: Slot, alive: EngineLink, now: float
    ) -> Iterator[tuple[Slot, EngineLink, Answer | Ended]]:
        alive.flush()
        ended = alive.has_ended()  # before reading: what it said last is heard first
        was_killed = alive.killed
        for answer in alive.answers(now):
            yield slot, alive, answer
        if ended:
            alive.reap()
            slot.engine = None
            if slot.due <= now:  # else it rests
                slot.trouble, slot.due = None, now
            yield slot, alive, Ended()
            return
        if reason := None if alive.killed else alive.overdue(now, self.limits):
            alive.kill(reason, now, timed_out=True)
        if alive.killed and not was_killed:
            log.get().error("engine.killed", engine=slot.name, pid=alive.pid, reason=alive.killed)
        if alive.outlives_kill(now) and not slot.trouble:
            slot.trouble = f"the engine process {alive.pid} was killed and does not end: a driver or disk holds it"
            log.get().error("engine.unkillable", pid=alive.pid, reason=slot.trouble)

    def _start(self, slot: Slot, now: float) -> None:
        """Out of descriptors, processes or memory: tried again, like trouble with a disk."""
        try:
            slot.engine = self._backend.begin(slot, self.settings)
        except BlockingIOError:
            slot.due = now + FULL_SECONDS
            return
        except OSError as e:
            again = "the engine process cannot be started: " + reason_of(e)
            slot.rest(again, now + self.settings.watch.rescan_seconds)
            log.get().error("engine.not_started", engine=slot.name, reason=again)
            return
        slot.trouble, slot.is_unloading = None, False
        slot.lives += 1
        log.get().info("engine.starting", engine=slot.name, pid=slot.engine.pid, life=slot.lives)

    def has_room(self) -> Slot | None:
        """The warm slot with the least in hand, if it takes one more."""
        warm = [(len(slot.warm.in_hand), slot) for slot in self.slots if slot.warm]
        most = DEPTH * self.settings.engine.batch
        least, slot = min(warm, key=lambda pair: pair[0], default=(most, None))
        return slot if least < most else None

    def share(self) -> None:
        """Nothing waits: an engine without work takes what another has not begun yet."""
        idle = sum(1 for slot in self.slots if slot.warm and not slot.warm.in_hand)
        wanted = idle * self.settings.engine.batch
        for _, link, ticket, image in self.in_hand() if idle else ():
            if image.began is None and len(link.in_hand) > 1 and not image.recalled and wanted:
                image.recalled = True
                link.cancel(ticket)
                wanted -= 1

    def begin(self) -> None:
        """All images that were taken now have been sent: they may be rendered together."""
        for slot in self.slots:
            if slot.engine and slot.has_news:
                slot.engine.begin()
                slot.has_news = False

    def unload(self, now: float) -> None:
        """End engines without work, and begin none until told otherwise: others may use the devices."""
        self.is_unloaded = True
        for slot in self.slots:
            if slot.engine:
                slot.is_unloading, slot.lives = True, 0  # the next life replaces none
                slot.engine.kill(UNLOADED, now)

    @property
    def are_loaded(self) -> bool:
        """Whether all there are have been loaded: none is on its way; who waits for a host is not."""
        return any(slot.warm for slot in self.slots) and all(
            slot.warm or slot.engine is None or slot.engine.loads_since is None
            for slot in self.slots
        )

    def first_warm(self) -> EngineLink | None:
        """An engine to ask."""
        return next((slot.warm for slot in self.slots if slot.warm), None)

    def in_hand(self) -> Iterator[tuple[Slot, EngineLink, int, InHand]]:
        """Every image that an engine has been sent: (slot, engine, ticket, image)."""
        for slot in self.slots:
            for ticket, image in list(slot.engine.in_hand.items()) if slot.engine else ():
                if slot.engine:
                    yield slot, slot.engine, ticket, image

    def close(self) -> None:
        """Kill, wait a bounded time, and close everything."""
        for slot, link in [(slot, slot.engine) for slot in self.slots if slot.engine]:
            for image in link.in_hand.values():
                image.pixels.close()
            if not link.reap():
                log.get().error("engine.unkillable", engine=slot.name, pid=link.pid)
        self._backend.close()
