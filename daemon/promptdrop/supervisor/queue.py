"""Which image is next: by priority, then in turn between lanes (fair) or by arrival (fifo).

A lane is a top-level sub-folder of the inbox; each job at the root is a lane of its own. Nothing
here grows with what waits: a turn with a hundred thousand jobs costs what it costs with one.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from promptdrop.spool.job import DEATHS_BEHIND, Job

_BEHIND = -1_000_000  # below every priority: images that daemon deaths make suspicious


@dataclass(slots=True)
class Waiting:
    """A job with images to render; without, it is passed over."""

    job: Job
    images: list[int]  # the next one stands last


@dataclass(slots=True)
class _Level:
    """The jobs of one priority."""

    waiting: dict[str, Waiting] = field(default_factory=dict)  # by job id
    # By whose turn it is. None: the lane is one job's own, and its name the job's id.
    lanes: OrderedDict[str, deque[Waiting] | None] = field(default_factory=OrderedDict)

    def first(self) -> tuple[str, Waiting] | None:
        """The lane whose turn it is, and its first job; lanes that ran empty go."""
        while self.lanes:
            name, lane = next(iter(self.lanes.items()))
            while lane and not lane[0].images:
                lane.popleft()
            first = self.waiting.get(name) if lane is None else lane[0] if lane else None
            if first is not None:
                return name, first
            del self.lanes[name]
        return None


@dataclass(slots=True)
class Queue:
    """The images that are neither rendered nor being rendered, in memory only."""

    policy: str = "fair"
    _levels: dict[int, _Level] = field(default_factory=dict)
    _images: int = 0

    def __len__(self) -> int:
        return self._images

    def add(self, job: Job, images: list[int]) -> None:
        """Queue a job's images; those in hand at several daemon deaths go behind everything."""
        for priority in (job.priority, _BEHIND):
            numbers = [i for i in reversed(images) if self._priority(job, i) == priority]
            if numbers:
                self._add(priority, job, numbers, first=False)

    def put_back(self, job: Job, image: int, behind: bool = False) -> None:
        """An image that was taken and not rendered is the next of its job, or, `behind`, its last."""
        priority = self._priority(job, image)
        level = self._levels.get(priority)
        if level and (waiting := level.waiting.get(job.id)):
            waiting.images.insert(0 if behind else len(waiting.images), image)
            self._images += 1
        else:
            self._add(priority, job, [image], first=True)

    def take(self) -> tuple[Job, int] | None:
        """The next image, or None."""
        for priority in sorted(self._levels, reverse=True):
            level = self._levels[priority]
            if (first := level.first()) is None:
                del self._levels[priority]
                continue
            name, waiting = first
            image = waiting.images.pop()
            self._images -= 1
            if not waiting.images:
                del level.waiting[waiting.job.id]
            if self.policy == "fair":
                level.lanes.move_to_end(name)
            return waiting.job, image
        return None

    def drop(self, job: Job) -> None:
        """Forget a job's images."""
        for level in self._levels.values():
            if waiting := level.waiting.pop(job.id, None):
                self._images -= len(waiting.images)
                waiting.images.clear()

    def _add(self, priority: int, job: Job, images: list[int], first: bool) -> None:
        level = self._levels.setdefault(priority, _Level())
        waiting = level.waiting[job.id] = Waiting(job, images)
        self._images += len(images)
        name = self._lane_of(job)
        lane = level.lanes.setdefault(name, None if name == job.id else deque())
        if lane is not None:
            (lane.appendleft if first else lane.append)(waiting)

    def _priority(self, job: Job, image: int) -> int:
        return _BEHIND if job.deaths(image) >= DEATHS_BEHIND else job.priority

    def _lane_of(self, job: Job) -> str:
        if self.policy == "fifo":
            return ""
        top = job.sub.partition("/")[0]
        return f"folder {top}" if top else job.id
