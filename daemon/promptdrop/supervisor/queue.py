"""Choose the next image: by priority, then in turn between lanes (fair) or by arrival (fifo).

A lane is a top-level sub-folder of the inbox; each job at the top is a lane of its own. The cost of
each call is the same with a hundred thousand jobs as with one.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from promptdrop.spool.job import DEATHS_BEHIND, Job

_BEHIND = -1_000_000  # below every priority: images that daemon deaths make suspicious


@dataclass(slots=True)
class Waiting:
    """A job with images that wait; once it has none, its lane passes it over."""

    job: Job
    numbers: list[int]  # of its images; the next one stands last


@dataclass(slots=True)
class _Level:
    """The jobs of one priority."""

    waiting: dict[str, Waiting] = field(default_factory=dict)  # by job id
    # In the order of their turns. None: the lane has one job, whose id is its name.
    lanes: OrderedDict[str, deque[Waiting] | None] = field(default_factory=OrderedDict)

    def first(self) -> tuple[str, Waiting] | None:
        """Return the name of the lane whose turn it is, and its first job. Removes empty lanes."""
        while self.lanes:
            name, lane = next(iter(self.lanes.items()))
            while lane and not lane[0].numbers:
                lane.popleft()
            first = self.waiting.get(name) if lane is None else lane[0] if lane else None
            if first is not None:
                return name, first
            del self.lanes[name]
        return None


@dataclass(slots=True)
class Queue:
    """The images that wait for an engine; in memory only."""

    policy: str = "fair"
    _levels: dict[int, _Level] = field(default_factory=dict)
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
        for priority in sorted(self._levels, reverse=True):
            level = self._levels[priority]
            if (first := level.first()) is None:
                del self._levels[priority]
                continue
            name, waiting = first
            number = waiting.numbers.pop()
            self._length -= 1
            if not waiting.numbers:
                del level.waiting[waiting.job.id]
            if self.policy == "fair":
                level.lanes.move_to_end(name)
            return waiting.job, number
        return None

    def drop(self, job: Job) -> list[int]:
        """Forget a job's images, and return their numbers."""
        dropped: list[int] = []
        for level in self._levels.values():
            if waiting := level.waiting.pop(job.id, None):
                self._length -= len(waiting.numbers)
                dropped += waiting.numbers
                waiting.numbers.clear()
        return dropped

    def _add(self, priority: int, job: Job, numbers: list[int], first: bool) -> None:
        level = self._levels.setdefault(priority, _Level())
        waiting = level.waiting[job.id] = Waiting(job, numbers)
        self._length += len(numbers)
        name = self._lane_of(job)
        lane = level.lanes.setdefault(name, None if name == job.id else deque())
        if lane is not None:
            (lane.appendleft if first else lane.append)(waiting)

    def _priority(self, job: Job, number: int) -> int:
        return _BEHIND if job.deaths(number) >= DEATHS_BEHIND else job.priority

    def _lane_of(self, job: Job) -> str:
        if self.policy == "fifo":
            return ""
        top = job.sub.partition("/")[0]
        return f"folder {top}" if top else job.id
