"""The parts of the supervisor on their own spool, without a daemon: a test turns the loop by hand."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import FAST, PATIENCE_SECONDS, merged
from promptdrop import config
from promptdrop.errors import RequestError
from promptdrop.intake.intake import Intake, Survey
from promptdrop.intake.taking import settings_of
from promptdrop.loop import Loop
from promptdrop.nouns import Request
from promptdrop.pool.messages import Ready
from promptdrop.pool.pool import Pool
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
from promptdrop.supervisor.holding import Holding
from promptdrop.supervisor.images import Images
from promptdrop.supervisor.jobs import Jobs
from promptdrop.supervisor.publishing import Publishing
from promptdrop.supervisor.recovery import Recovery
from promptdrop.supervisor.status import Composer
from promptdrop.supervisor.work import Work
from scripted import INFO, ScriptedBackend, ScriptedEngine
from specs import spec
from spools import claimed, put


class Parts:
    """The real parts of a supervisor, with a real spool and loop; only the engines are scripted."""

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
        self.holding = Holding(work.queue)
        self.jobs = jobs = Jobs(work, loop, self.spool, intake, self.holding)
        self.recovery = Recovery(loop, self.spool, intake, self.accept)
        self.commands = Commands(loop, self.spool, jobs, intake)
        self.cancels = Cancels(work, self.gate, loop, self.spool, jobs, intake)
        self.publishing = Publishing(loop, self.spool, self.holding, jobs.image_ended)
        self.images = Images(work, loop, jobs, self.publishing)
        self.feeder = Feeder(work, self.gate, loop, jobs, self.holding, self.publishing)
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
        self.intake.close()
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
        """Let the gate know what a look found, which may be the first. Returns whether a pause began or ended."""
        self.gate.open()
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
        """Send waiting images to the engines."""
        self.feeder.feed(time.monotonic())

    def hear(self) -> None:
        """Take in what the engines have said and done."""
        self.engines.hear(time.monotonic())
