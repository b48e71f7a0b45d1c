"""Choose the next image: by priority, then in turn between owners and their lanes (fair) or by arrival (fifo).

A lane is one owner's top-level sub-folder of the inbox, its root, or his `generate`. The cost of each
call is the same with a hundred thousand jobs as with one, and what has been taken leaves nothing behind.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from promptdrop.spool.job import DEATHS_BEHIND, Job
from promptdrop.spool.lanes import EVERYBODY, Lane, Rounds

IN_A_ROW = 50  # images of one job, after which the other jobs of its lane come first
_BEHIND = -1_000_000  # below every priority: images that daemon deaths make suspicious


@dataclass(slots=True)
class Waiting:
    """A job with images that wait."""

    job: Job
    lane: Lane
    numbers: list[int]  # of its images; the next one stands last
    in_a_row: int = 0  # images taken since its lane came to it


_Jobs = OrderedDict[str, Waiting]  # the jobs of one lane by id, in the order in which they finish


@dataclass(slots=True)
class _Level:
    """The jobs of one priority."""

    waiting: dict[str, Waiting] = field(default_factory=dict)  # by job id
    rounds: Rounds[_Jobs] = field(default_factory=Rounds)

    def add(self, waiting: Waiting, first: bool) -> None:
        """Put a job behind those of its lane, or in front of them."""
        jobs = self.rounds.lane(waiting.lane, OrderedDict)
        self.waiting[waiting.job.id] = jobs[waiting.job.id] = waiting
        if first:
            jobs.move_to_end(waiting.job.id, last=False)

    def take(self, policy: str) -> tuple[Job, int]:
        """Take the next image, of which there must be one."""
        lane, jobs = self.rounds.first()
        waiting = next(iter(jobs.values()))
        number = waiting.numbers.pop()
        waiting.in_a_row += 1
        if policy == "fair":
            self.rounds.has_had_its_turn(lane)
            if waiting.in_a_row == IN_A_ROW:
                waiting.in_a_row = 0
                jobs.move_to_end(waiting.job.id)
        if not waiting.numbers:
            self.remove(waiting)
        return waiting.job, number

    def remove(self, waiting: Waiting) -> None:
        """Forget a job, and its lane if that has no other."""
        del self.waiting[waiting.job.id]
        jobs = self.rounds.lane(waiting.lane, OrderedDict)
        del jobs[waiting.job.id]
        if not jobs:
            self.rounds.remove(waiting.lane)


@dataclass(slots=True)
class Queue:
    """The images that wait for an engine; in memory only."""

    policy: str = "fair"
    _levels: dict[int, _Level] = field(default_factory=dict)  # by priority; none is empty
    _length: int = 0  # images

    def __len__(self) -> int:
        return self._length

    def add(self, job: Job, numbers: list[int]) -> None:
        """Queue images of a job; those that were in hand at several daemon deaths go last of all."""
        for priority in (job.priority, _BEHIND):
            some = [n for n in reversed(numbers) if self._priority(job, n) == priority]
            if some:
                self._add(priority, job, some, first=False)

    def put_back(self, job: Job, number: int, behind: bool = False) -> None:
        """Queue an image that was taken and not rendered, as its job's next one or `behind` the others."""
        priority = self._priority(job, number)
        level = self._levels.get(priority)
        if level and (waiting := level.waiting.get(job.id)):
            waiting.numbers.insert(0 if behind else len(waiting.numbers), number)
            self._length += 1
        else:
            self._add(priority, job, [number], first=True)

    def take(self) -> tuple[Job, int] | None:
        """Take the next image: (job, number), or None if none waits."""
        if not self._levels:
            return None
        priority = max(self._levels)
        taken = self._levels[priority].take(self.policy)
        self._length -= 1
        self._remove_if_empty(priority)
        return taken

    def drop(self, job: Job) -> list[int]:
        """Forget a job's images, and return their numbers."""
        dropped: list[int] = []
        for priority in (job.priority, _BEHIND):
            level = self._levels.get(priority)
            if level and (waiting := level.waiting.get(job.id)):
                self._length -= len(waiting.numbers)
                dropped += waiting.numbers
                level.remove(waiting)
                self._remove_if_empty(priority)
        return dropped

    def _add(self, priority: int, job: Job, numbers: list[int], first: bool) -> None:
        is_fair = self.policy == "fair"
        lane = job.lane if is_fair else EVERYBODY
        level = self._levels.setdefault(priority, _Level())
        level.add(Waiting(job, lane, numbers), first)
        self._length += len(numbers)

    def _remove_if_empty(self, priority: int) -> None:
        if not self._levels[priority].waiting:
            del self._levels[priority]

    def _priority(self, job: Job, number: int) -> int:
        return _BEHIND if job.deaths(number) >= DEATHS_BEHIND else job.priority
