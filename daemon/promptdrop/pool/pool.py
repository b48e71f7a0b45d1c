"""The daemon's engines: start as many as are wanted, and begin a new life of each that ends.

A Backend decides where they run; the supervisor decides what follows from their answers and deaths.
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
from promptdrop.pool.link import EngineLink, Held, Limits
from promptdrop.pool.messages import Answer

UNLOADED = "unloaded, idle"  # in status and log
FULL_SECONDS = 0.1  # until another try where the backend's queue was full
DEPTH = 2  # batches in an engine: the one being rendered and the next, so the device never waits


@dataclass(slots=True)
class Slot:
    """The place of one engine, which may have several lives, one after another."""

    number: int  # from 1
    link: EngineLink | None = None  # to this life of its engine; None between two lives
    info: EngineInfo | None = None  # of the last life that was warm
    lives: int = 0
    idle_deaths: int = 0  # deaths in a row without an image in hand
    sent: int = 0  # images sent, for empty_cache_every
    is_unloading: bool = False  # this life was ended to give its device back
    has_news: bool = False  # images were sent and no Begin yet
    due: float = 0.0  # when its next life begins, on the daemon's monotonic clock
    trouble: str | None = None  # why it has no engine, or one that cannot work

    @property
    def name(self) -> str:
        """Its name in sidecars, status and log."""
        return f"engine-{self.number}"

    @property
    def warm(self) -> EngineLink | None:
        """The link to its engine, if the engine takes images."""
        link = self.link
        return link if link and link.is_ready and not link.killed else None

    def rest(self, reason: str, until: float) -> None:
        """Begin no life before `until`, for this reason."""
        self.trouble, self.due = reason, until


@dataclass(frozen=True, slots=True)
class Ended:
    """News of an engine: it is dead, and all its answers have been heard."""


class Backend(Protocol):
    """Starts engines, as child processes or on the hosts of a cluster."""

    may_begin: bool  # whether an engine may begin now
    trouble: str | None  # why none may begin, if that is not as it should be

    def wanted(self, slots: list[Slot]) -> int:
        """Return how many slots there shall be; never fewer than there are now."""

    def begin(self, slot: Slot, settings: Config) -> EngineLink:
        """Begin a new life of a slot's engine.

        Raises OSError: out of descriptors, processes or memory. BlockingIOError: the backend's queue is
        full; retried after FULL_SECONDS.
        """

    def is_hopeless(self, slots: list[Slot]) -> bool:
        """Whether no engine of these slots is warm, on its way, or can be expected."""

    def readers(self) -> list[int]:
        """Descriptors that become readable when something has happened; then `hear`."""

    def hear(self, now: float) -> None:
        """Take in what has happened, and begin again what has ended."""

    def next_deadline(self) -> float:
        """Return when `hear` is to be called at the latest, on the daemon's monotonic clock."""

    def move_deadlines(self, seconds: float) -> None:
        """Let every limit pass so much later: the daemon stood still."""

    def close(self) -> None:
        """Let go of everything, because the daemon ends."""


class ChildProcesses:
    """A Backend whose engines are child processes of the daemon, one for each device."""

    may_begin = True
    trouble: str | None = None

    def __init__(self, settings: Config) -> None:
        """Count the workers. Raises ConfigError: there are more workers than devices."""
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
        return all(slot.link is None or slot.trouble for slot in slots)

    def readers(self) -> list[int]:
        return []

    def hear(self, now: float) -> None:
        pass

    def next_deadline(self) -> float:
        return float("inf")

    def move_deadlines(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass


class Pool:
    """All engines of the daemon. It never waits; the supervisor's loop does."""

    def __init__(self, settings: Config, backend: Backend) -> None:
        self.settings = settings  # replaced at SIGHUP
        self.slots: list[Slot] = []
        self.is_unloaded = False  # engines were ended because there was nothing to do
        self._backend = backend
        self._may_begin = False  # whether an engine might begin at the last `hear`

    @property
    def trouble(self) -> str | None:
        """Why no engine works and none is on its way; None if one does."""
        if any(slot.link and not slot.trouble for slot in self.slots):
            return None
        return self._backend.trouble or next((s.trouble for s in self.slots if s.trouble), None)

    @property
    def outlive_kill(self) -> bool:
        """Whether every engine was killed and does not end."""
        return bool(self.slots) and all(s.link and s.trouble for s in self.slots)

    def is_hopeless(self) -> bool:
        """Whether no engine is warm, on its way, or can be expected."""
        return self._backend.is_hopeless(self.slots)

    def readers(self) -> list[int]:
        """Descriptors that become readable when there is something to `hear`."""
        links = [d for slot in self.slots if slot.link for d in slot.link.readers()]
        return [*links, *self._backend.readers()]

    def writers(self) -> list[int]:
        """Descriptors that become writable when an engine takes more of what was sent to it."""
        return [d for slot in self.slots if slot.link for d in slot.link.writers()]

    @property
    def limits(self) -> Limits:
        """How long an engine may be silent, by the current configuration."""
        section = self.settings.engine
        return Limits(
            section.load_timeout_seconds,
            section.kill_grace_seconds,
            section.stall_seconds,
            section.stall_seconds or section.image_timeout_seconds,
        )

    def next_deadline(self) -> float:
        """Return when `hear` is to be called at the latest, on the daemon's monotonic clock."""
        due, limits = [self._backend.next_deadline()], self.limits
        for slot in self.slots:
            if slot.link is None:
                due.append(slot.due if self._may_begin else float("inf"))
            elif not slot.trouble:
                due.append(slot.link.next_deadline(limits))
        return min(due)

    def move_deadlines(self, seconds: float) -> None:
        """Let every limit of an engine pass so much later: the daemon stood still."""
        self._backend.move_deadlines(seconds)
        for slot in self.slots:
            if slot.link:
                slot.link.move_deadlines(seconds)

    def hear(
        self, now: float, may_start: bool
    ) -> Iterator[tuple[Slot, EngineLink, Answer | Ended]]:
        """Yield what engines have said, and which have ended; start those that are due."""
        self._backend.hear(now)
        may_start = may_start and not self.is_unloaded
        self._may_begin = may_start and self._backend.may_begin
        while may_start and len(self.slots) < self._backend.wanted(self.slots):
            self.slots.append(Slot(len(self.slots) + 1))
        for slot in self.slots:
            if slot.link:
                yield from self._hear(slot, slot.link, now)
            elif self._may_begin and now >= slot.due:
                self._start(slot, now)

    def _hear(
        self, slot: Slot, link: EngineLink, now: float
    ) -> Iterator[tuple[Slot, EngineLink, Answer | Ended]]:
        """Yield what one engine has said, and whether it has ended; kill it if it is overdue."""
        link.flush()
        ended = (
            link.has_ended()
        )  # asked first, so that its last answers are read before its end is told
        was_killed = link.killed
        for answer in link.answers(now):
            yield slot, link, answer
        if ended:
            link.reap()
            slot.link = None
            if slot.due <= now:  # otherwise it rests until then
                slot.trouble, slot.due = None, now
            yield slot, link, Ended()
            return
        if reason := None if link.killed else link.overdue(now, self.limits):
            link.kill(reason, now, timed_out=True)
        if link.killed and not was_killed:
            log.get().error("engine.killed", engine=slot.name, pid=link.pid, reason=link.killed)
        if link.outlives_kill(now) and not slot.trouble:
            slot.trouble = f"the engine process {link.pid} was killed and does not end: a driver or disk holds it"
            log.get().error("engine.unkillable", pid=link.pid, reason=slot.trouble)

    def _start(self, slot: Slot, now: float) -> None:
        """Begin a slot's next life. What cannot begin now is tried again later."""
        try:
            slot.link = self._backend.begin(slot, self.settings)
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
        log.get().info("engine.starting", engine=slot.name, pid=slot.link.pid, life=slot.lives)

    def has_room(self) -> Slot | None:
        """Return the warm slot with the fewest images in hand, if it takes one more."""
        warm = [(len(slot.warm.in_hand), slot) for slot in self.slots if slot.warm]
        most = DEPTH * self.settings.engine.batch
        least, slot = min(warm, key=lambda pair: pair[0], default=(most, None))
        return slot if least < most else None

    def share(self) -> None:
        """Give idle engines the images that others have not begun yet; called when no image waits.

        The images are asked back here; the supervisor sends them again once they have come.
        """
        idle = sum(1 for slot in self.slots if slot.warm and not slot.warm.in_hand)
        wanted = idle * self.settings.engine.batch
        for _, link, ticket, held in self.in_hand() if idle else ():
            if held.began is None and len(link.in_hand) > 1 and not held.recalled and wanted:
                held.recalled = True
                link.cancel(ticket)
                wanted -= 1

    def begin(self) -> None:
        """Let engines begin the images that were sent to them since the last call."""
        for slot in self.slots:
            if slot.link and slot.has_news:
                slot.link.begin()
                slot.has_news = False

    def unload(self, now: float) -> None:
        """End all engines, and begin none until `is_unloaded` is reset: others may use the devices."""
        self.is_unloaded = True
        for slot in self.slots:
            if slot.link:
                slot.is_unloading, slot.lives = True, 0  # the next life counts as the first
                slot.link.kill(UNLOADED, now)

    @property
    def are_loaded(self) -> bool:
        """Whether an engine is warm and none is loading; one that waits for a host is not loading."""
        return any(slot.warm for slot in self.slots) and all(
            slot.warm or slot.link is None or slot.link.loads_since is None for slot in self.slots
        )

    def first_warm(self) -> EngineLink | None:
        """Return the link to a warm engine, to ask it something; None if there is none."""
        return next((slot.warm for slot in self.slots if slot.warm), None)

    def in_hand(self) -> Iterator[tuple[Slot, EngineLink, int, Held]]:
        """Yield every image that an engine has been sent: (slot, link, ticket, held)."""
        for slot in self.slots:
            for ticket, held in list(slot.link.in_hand.items()) if slot.link else ():
                if slot.link:
                    yield slot, slot.link, ticket, held

    def close(self) -> None:
        """Kill all engines, wait a bounded time for their end, and close everything."""
        for slot, link in [(slot, slot.link) for slot in self.slots if slot.link]:
            for held in link.in_hand.values():
                held.pixels.close()
            if not link.reap():
                log.get().error("engine.unkillable", engine=slot.name, pid=link.pid)
        self._backend.close()
