"""Hold back the images of jobs whose own folder fails, so that nobody else's wait for the same disk."""

from collections import Counter, defaultdict

from promptdrop.spool.job import Job
from promptdrop.spool.lanes import Lane
from promptdrop.supervisor.queue import Queue
from promptdrop.supervisor.work import Running

# Rendered images of a job that cannot be saved stay in memory. So no more images of such a job begin, and
# with so many such jobs none of their whole lane: they lie in one folder, or one person's.
STUCK_OF_LANE = 4
STUCK_IN_ALL = 64  # ... jobs, from which on one such job holds all lanes of its owner


class Holding:
    """Knows the jobs whose images cannot be saved; it takes what waits of theirs out of the queue."""

    def __init__(self, queue: Queue) -> None:
        self.images = 0  # set aside
        self._queue = queue
        self._stuck: dict[Lane, dict[str, int]] = {}  # by job id: images that cannot be saved
        self._owners: Counter[int] = Counter()  # of the jobs in `_stuck`
        self._aside: defaultdict[Lane, dict[str, tuple[Running, list[int]]]] = defaultdict(dict)

    def stalled(self, running: Running, begins: bool) -> None:
        """Note that an image of a job begins, or ends, to wait for a disk of the job's own."""
        lane = running.job.lane
        stuck = self._stuck.setdefault(lane, {})
        stuck[running.job.id] = stuck.get(running.job.id, 0) + (1 if begins else -1)
        if begins:
            self._owners[lane.owner] += stuck[running.job.id] == 1
            return
        if not stuck[running.job.id]:
            del stuck[running.job.id]
            self._owners[lane.owner] -= 1
        if not stuck:
            del self._stuck[lane]
        self._owners += Counter()  # without the owners of none
        for freed in list(self._aside):
            self._let_go(freed)

    def is_held(self, job: Job) -> bool:
        """Whether no image of this job may begin now."""
        stuck = self._stuck.get(job.lane, {})
        is_crowded = job.lane.owner in self._owners and self._owners.total() >= STUCK_IN_ALL
        return job.id in stuck or len(stuck) >= STUCK_OF_LANE or is_crowded

    def set_aside(self, running: Running, number: int) -> None:
        """Take an image that is next, and all others of its job, out of the queue until it is let go."""
        numbers = [number, *self._queue.drop(running.job)]
        lane = self._aside[running.job.lane]
        lane.setdefault(running.job.id, (running, []))[1].extend(numbers)
        self.images += len(numbers)

    def forget(self, job: Job) -> None:
        """Forget what was set aside of a job that was cancelled."""
        if taken := self._aside.get(job.lane, {}).pop(job.id, None):
            self.images -= len(taken[1])

    def _let_go(self, lane: Lane) -> None:
        """Queue the images of this lane again that are held no more."""
        aside = self._aside.get(lane, {})
        for job_id, (running, numbers) in list(aside.items()):
            if not self.is_held(running.job):
                del aside[job_id]
                self.images -= len(numbers)
                waiting = self._queue.drop(running.job)  # put back meanwhile, and not taken again
                self._queue.add(running.job, sorted([*numbers, *waiting]))
        if not aside:
            self._aside.pop(lane, None)
