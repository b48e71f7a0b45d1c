"""Which image is next: by priority, then in turn between lanes (fair) or by arrival (fifo).

A lane is a top-level sub-folder of the inbox; each job at the root is a lane of its own.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from promptdrop.spool import DEATHS_BEHIND, Job

_BEHIND = -1_000_000  # below every priority: images that daemon deaths make suspicious


@dataclass(slots=True)
class Waiting:
    """A job with images to render."""

    job: Job
    images: deque[int]


@dataclass(slots=True)
class Queue:
    """The images that are neither rendered nor being rendered, in memory only."""

    policy: str = "fair"
    _levels: dict[int, OrderedDict[str, deque[Waiting]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(
            len(w.images)
            for lanes in self._levels.values()
            for lane in lanes.values()
            for w in lane
        )

    def add(self, job: Job, images: list[int]) -> None:
        """Queue a job's images; those in hand at several daemon deaths go behind everything."""
        for priority in (job.priority, _BEHIND):
            numbers = deque(i for i in images if self._priority(job, i) == priority)
            if numbers:
                self._lane(priority, job).append(Waiting(job, numbers))

    def put_back(self, job: Job, image: int, behind: bool = False) -> None:
        """An image that was taken and not rendered is the next of its job, or, `behind`, its last."""
        lane = self._lane(self._priority(job, image), job)
        for waiting in lane:
            if waiting.job is job:
                if behind:
                    waiting.images.append(image)
                else:
                    waiting.images.appendleft(image)
                return
        lane.appendleft(Waiting(job, deque([image])))

    def take(self) -> tuple[Job, int] | None:
        """The next image, or None."""
        for priority in sorted(self._levels, reverse=True):
            lanes = self._levels[priority]
            while lanes:
                name, lane = next(iter(lanes.items()))
                if not lane:
                    del lanes[name]
                    continue
                return self._take_from(lanes, name, lane)
            del self._levels[priority]
        return None

    def peek(self) -> Job | None:
        """The job of the next image, or None."""
        for priority in sorted(self._levels, reverse=True):
            for lane in self._levels[priority].values():
                if lane:
                    return lane[0].job
        return None

    def drop(self, job: Job) -> None:
        """Forget a job's images."""
        for lanes in self._levels.values():
            for lane in lanes.values():
                for waiting in [w for w in lane if w.job is job]:
                    lane.remove(waiting)

    def _take_from(
        self, lanes: "OrderedDict[str, deque[Waiting]]", name: str, lane: deque[Waiting]
    ) -> tuple[Job, int]:
        waiting = lane[0]
        image = waiting.images.popleft()
        if not waiting.images:
            lane.popleft()
        if not lane:
            del lanes[name]
        elif self.policy == "fair":
            lanes.move_to_end(name)
        return waiting.job, image

    def _priority(self, job: Job, image: int) -> int:
        return _BEHIND if job.deaths(image) >= DEATHS_BEHIND else job.priority

    def _lane(self, priority: int, job: Job) -> deque[Waiting]:
        lanes = self._levels.setdefault(priority, OrderedDict())
        return lanes.setdefault(self._lane_of(job), deque())

    def _lane_of(self, job: Job) -> str:
        if self.policy == "fifo":
            return ""
        top = job.sub.partition("/")[0]
        return f"folder {top}" if top else f"job {job.id}"
