"""The front of the daemon, its intake, on a spool of its own: the real loop, spool and threads."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import PATIENCE_SECONDS
from promptdrop import config
from promptdrop.config import Config
from promptdrop.errors import RequestError
from promptdrop.intake.intake import Intake, Survey
from promptdrop.loop import Loop, Room
from promptdrop.spool.job import Job, Unresolved
from promptdrop.spool.spool import Spool

WATCH = {"mode": "poll", "settle_seconds": 1, "give_up_seconds": 10, "writer_seconds": 0}


class Desk:
    """Records what the intake reports."""

    def __init__(self, settings: Config) -> None:
        self.config = settings
        self.accepted: list[Job] = []
        self.refused: list[tuple[Unresolved, RequestError]] = []
        self.surveys: list[Survey] = []

    def accept(self, job: Job) -> None:
        """Record a new job."""
        self.accepted.append(job)

    def refuse(self, claimed: Unresolved, error: RequestError) -> None:
        """Record a refused file."""
        self.refused.append((claimed, error))

    def surveyed(self, survey: Survey) -> None:
        """Record a look."""
        self.surveys.append(survey)

    @property
    def paths(self) -> list[str]:
        """SUB/FILE of each job, in the order in which they came."""
        return [job.path for job in self.accepted]


class Front:
    """An intake on a spool of its own. A test says when it looks; its clock is an argument."""

    def __init__(self, root: Path, **sections: Any) -> None:
        settings = config.parse({
            "root": str(root), "model": {"id": "gradient"},
            "limits": {"min_free_disk_mib": 0}, "watch": WATCH, **sections,
        })  # fmt: skip
        self.loop, self.spool, self.desk = Loop(1.0), Spool(settings), Desk(settings)
        self.spool.folders.init()
        self.spool.lock.acquire()
        self.spool.folders.prepare()
        self.inbox = self.spool.paths.inbox
        self.intake = Intake(self.loop, self.spool, self.desk)
        self._began = time.monotonic()
        self._held: list[threading.Event] = []

    def drop(self, path: str, text: str = "a cat\n") -> Path:
        """Write a file into the inbox."""
        file = self.inbox / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def jobs_on_disk(self) -> list[Path]:
        """The folders of claimed jobs."""
        return list(self.spool.paths.of_state("pending").iterdir())

    def look(self, at: float) -> None:
        """Look once, `at` seconds after the beginning, and hear what was found."""
        surveys = len(self.desk.surveys)
        self.intake.wake()
        self.intake.look(self._began + at)
        self.until(lambda: len(self.desk.surveys) > surveys)

    def look_twice(self, at: float) -> None:
        """Look `at`, and once more when the files found then have settled."""
        self.look(at)
        self.look(at + 1)

    def until(self, condition: Callable[[], Any]) -> None:
        """Turn the loop until the condition holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            self.loop.wait([], [], deadline)
            self.loop.run_results()

    def through(self, room: Room) -> None:
        """Turn the loop until everything that a room has been given so far is done."""
        done = threading.Event()
        self.off(room, lambda: None, lambda _: done.set())
        self.until(done.is_set)

    def rest(self) -> None:
        """Turn the loop until no file is being read, claimed or resolved."""
        for room in ("reader", "clerk", "clerk"):  # claims come from the reader, jobs from a claim
            self.through(room)

    def hold(self, room: Room) -> Callable[[], None]:
        """Keep a room busy until the returned function is called."""
        gate = threading.Event()
        self._held.append(gate)
        self.off(room, gate.wait, lambda _: None)
        return gate.set

    def off(self, room: Room, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run something else in a room."""
        self.loop.off(room, work, then)

    def close(self) -> None:
        """End the threads."""
        for gate in self._held:
            gate.set()
        self.intake.close()
        self.loop.close()
        self.spool.lock.release()
