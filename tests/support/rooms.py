"""The supervisor's rooms on a spool of their own, without a daemon: a test turns the loop by hand."""

import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

from harness import FAST, PATIENCE_SECONDS, merged
from promptdrop import config
from promptdrop.config import Config
from promptdrop.errors import RequestError
from promptdrop.intake.intake import Intake, Survey
from promptdrop.intake.taking import settings_of
from promptdrop.loop import Loop
from promptdrop.nouns import Request
from promptdrop.pool.link import EngineLink
from promptdrop.pool.messages import Answer, Began, Ready, Render
from promptdrop.pool.pool import Pool, Slot
from promptdrop.sdnotify import Notifier
from promptdrop.spool import claim
from promptdrop.spool.detail import Settled
from promptdrop.spool.job import Job, Unresolved
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.cancels import Cancels
from promptdrop.supervisor.commands import Commands
from promptdrop.supervisor.engines import Engines
from promptdrop.supervisor.feeding import Feeder
from promptdrop.supervisor.gate import Gate
from promptdrop.supervisor.images import Images
from promptdrop.supervisor.jobs import Jobs
from promptdrop.supervisor.publishing import Publishing
from promptdrop.supervisor.recovery import Recovery
from promptdrop.supervisor.status import Composer
from promptdrop.supervisor.work import Work
from specs import spec
from spools import INFO, claimed, put


class ScriptedEngine:
    """The far end of a link, and its life: it says and does what a test tells it to."""

    is_lost = False

    def __init__(self) -> None:
        self.socket, end = socket.socketpair()
        self.socket.setblocking(False)
        self._end = Connection(end.detach())
        self._is_dead = False

    def say(self, *answers: Answer) -> None:
        """Send answers to the daemon."""
        for answer in answers:
            self._end.send(answer)

    def heard(self) -> list[Any]:
        """Every message since the last call."""
        messages = []
        while self._end.poll():
            messages.append(self._end.recv())
            if isinstance(messages[-1], Render):
                os.close(recv_handle(self._end))
        return messages

    def renders(self) -> list[Render]:
        """Every image that was sent since the last call."""
        return [message for message in self.heard() if isinstance(message, Render)]

    def begin(self, images: int | None = None) -> list[int]:
        """Begin the first `images` of those that were sent, as one batch. Returns their tickets."""
        tickets = [render.ticket for render in self.renders()][:images]
        self.say(*(Began(ticket, len(tickets)) for ticket in tickets))
        return tickets

    def die(self) -> None:
        """End without a word."""
        self._is_dead = True

    # --- what the link asks of a life ---

    def ends(self) -> list[int]:
        return []

    def has_ended(self) -> bool:
        return self._is_dead

    def how_it_ended(self) -> str:
        return "exit status 3"

    def kill(self) -> None:
        self._is_dead = True

    def reap(self, seconds: float) -> bool:
        self.socket.close()
        self._end.close()
        return True


class ScriptedBackend:
    """Starts scripted engines; the last life of each slot stands in `engines`."""

    may_begin = True
    trouble: str | None = None

    def __init__(self, slots: int) -> None:
        self.engines: dict[int, ScriptedEngine] = {}  # by number of the slot
        self.begun = 0
        self._slots = slots

    def wanted(self, slots: list[Slot]) -> int:
        return self._slots

    def begin(self, slot: Slot, settings: Config) -> EngineLink:
        self.begun += 1
        life = self.engines[slot.number] = ScriptedEngine()
        now = time.monotonic()
        return EngineLink(life, now, now, self.begun)

    def is_hopeless(self, slots: list[Slot]) -> bool:
        return all(slot.link is None or slot.trouble for slot in slots)

    def readers(self) -> list[int]:
        return []

    def hear(self, now: float) -> None:
        pass

    def next_deadline(self) -> float:
        return float("inf")

    def close(self) -> None:
        pass


class Rooms:
    """Real rooms, a real spool and a real loop; only the engines are scripted."""

    def __init__(self, home: Path, changes: dict[str, Any] | None = None, slots: int = 1) -> None:
        document = merged(FAST, {"root": str(home / "spool"), "watch": {"rescan_seconds": 0.05}})
        self.config = config.parse(merged(document, changes or {}))
        self.spool = Spool(self.config)
        self.spool.folders.init()
        self.loop = loop = Loop(self.config.watch.rescan_seconds)
        self.intake = intake = Intake(loop, self.spool, self)
        self.backend = ScriptedBackend(slots)
        self.pool = Pool(self.config, self.backend)
        self.gate = Gate(loop, self.pool)
        self.work = work = Work(self.pool)
        self.jobs = jobs = Jobs(work, loop, self.spool, intake)
        self.recovery = Recovery(loop, self.spool, intake, self.accept)
        self.commands = Commands(loop, self.spool, jobs, intake)
        self.cancels = Cancels(work, loop, self.spool, jobs, intake)
        self.publishing = Publishing(loop, self.spool, jobs.image_ended)
        self.images = Images(work, loop, jobs, self.publishing)
        self.feeder = Feeder(work, self.gate, self.publishing)
        self.notifier = Notifier({})
        self.engines = Engines(
            work, self.gate, loop, self.images, jobs.measuring, notifier=self.notifier
        )
        self.composer = Composer(work, self.gate, intake, jobs, self.images, self.publishing)

    # --- a desk for the intake ---

    def accept(self, job: Job) -> None:
        self.jobs.accept(job)

    def refuse(self, claimed: Unresolved, error: RequestError) -> None:
        self.cancels.refused(claimed.path)
        self.jobs.refuse(claimed, error)

    def surveyed(self, survey: Survey) -> None:
        self.gate.surveyed(survey)

    # --- what a test does ---

    def close(self) -> None:
        """End the loop's threads and the engines."""
        self.pool.close()
        assert self.loop.close()

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Turn the loop until the condition holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            self.loop.wait([], [], deadline)
            self.loop.run_results()

    def drop(self, path: str) -> Unresolved:
        """Drop SUB/FILE and claim it."""
        put(self.spool, path)
        return claimed(self.spool, path)

    def job(self, path: str = "a.txt", images: int = 1, priority: int = 0, **fields: Any) -> Job:
        """Drop a file and resolve it to a job that nobody has accepted yet."""
        specs = tuple(spec(image=n + 1, **fields) for n in range(images))
        return claim.resolve(
            self.spool,
            self.drop(path),
            Request(specs, priority),
            Settled(0.0, self.spool.boot),
            settings_of(self.config),
        )

    def look(self, paused: str | None = None, trouble: str | None = None) -> bool:
        """Let the gate know what a look found. Returns whether a pause began or ended."""
        return self.gate.surveyed(Survey(None, trouble, paused, (), {}, 0.0))

    def warm(self) -> list[ScriptedEngine]:
        """Start all engines, and have them say that they are warm."""
        self.engines.hear(time.monotonic())
        engines = list(self.backend.engines.values())
        for engine in engines:
            engine.say(Ready(INFO))
        self.engines.hear(time.monotonic())
        return engines

    def feed(self) -> None:
        """Send what waits to the engines."""
        self.feeder.feed(time.monotonic())

    def hear(self) -> None:
        """Take in what the engines have said and done."""
        self.engines.hear(time.monotonic())
