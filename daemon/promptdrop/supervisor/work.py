"""The jobs and images in hand, which the modules of the supervisor share."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from promptdrop.config import Config
from promptdrop.pool.link import Held
from promptdrop.pool.pool import Pool
from promptdrop.spool.job import Job
from promptdrop.supervisor.queue import Queue


@dataclass(slots=True)
class Running:
    """A claimed job that has not ended."""

    job: Job
    left: int  # images that are neither published nor given up
    alone: set[int] = field(default_factory=set)  # numbers of images whose batch failed
    busy: int = 0  # images in an engine or on their way to the disk, and a cancel being recorded
    ending: bool = False


class Work:
    """Every job that has not ended, the images that wait, and those that engines hold."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.queue = Queue(pool.settings.queue.policy)
        self.running: dict[str, Running] = {}  # by job id, in the order they were accepted
        self.tickets: dict[int, Running] = {}  # of the images that engines hold
        self._ticket = secrets.randbits(
            40
        )  # not from 0: an engine that outlives the daemon knows its old tickets

    @property
    def config(self) -> Config:
        """The configuration as of the last SIGHUP."""
        return self.pool.settings

    def next_ticket(self) -> int:
        """Return a number that no request to an engine has had."""
        self._ticket += 1
        return self._ticket

    def recall_prefetched(self) -> None:
        """Recall every image that its engine has not begun; each comes back as Cancelled."""
        self._cancel(lambda running, held: held.began is None)

    def recall_less_urgent(self, priority: int) -> None:
        """Recall the prefetched images of lower priorities, so that this priority is rendered next."""
        self._cancel(lambda running, held: held.began is None and running.job.priority < priority)

    def stop(self, job: Running) -> None:
        """Ask the engines to stop a job's images, also those being rendered, at their next step."""
        self._cancel(lambda running, held: running is job)

    def _cancel(self, is_meant: Callable[[Running, Held], bool]) -> None:
        for _, link, ticket, held in self.pool.in_hand():
            if is_meant(self.tickets[ticket], held):
                link.cancel(ticket)
