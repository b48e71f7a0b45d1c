"""Say whose turn it is: owners take turns, and within an owner his lanes do."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

GENERATE = "generate-"  # begins the names under which `promptdrop generate` drops its jobs

Waiting = TypeVar("Waiting")


class Lane(NamedTuple):
    """One lane of one owner; its jobs go by arrival."""

    owner: int  # uid of the dropped files
    name: str  # a top-level sub-folder of the inbox; "" for its root, "/generate" for `generate`


EVERYBODY = Lane(-1, "")  # the one lane where nobody takes turns (queue.policy: fifo)


def lane_of(owner: int, sub: str, file: str) -> Lane:
    """Return the lane of the file SUB/FILE, which belongs to the uid `owner`.

    Anybody may give a file at the root a name of `generate`; it is only one more lane of his own.

    Thread: any.
    """
    is_generated = not sub and file.startswith(GENERATE)
    return Lane(owner, "/generate" if is_generated else sub.partition("/")[0])


class Rounds(Generic[Waiting]):
    """What waits in each lane, in the order of their turns. An empty lane is removed by who empties it."""

    def __init__(self) -> None:
        self._owners: OrderedDict[int, OrderedDict[str, Waiting]] = OrderedDict()

    def __len__(self) -> int:
        """Count the owners with work."""
        return len(self._owners)

    def lane(self, lane: Lane, make: Callable[[], Waiting]) -> Waiting:
        """Return what waits in a lane; a new lane is behind its owner's others, a new owner behind all."""
        lanes = self._owners.setdefault(lane.owner, OrderedDict())
        if lane.name not in lanes:
            lanes[lane.name] = make()
        return lanes[lane.name]

    def first(self) -> tuple[Lane, Waiting]:
        """Return the lane whose turn it is, and what waits there. At least one lane must be there."""
        owner, lanes = next(iter(self._owners.items()))
        name, waiting = next(iter(lanes.items()))
        return Lane(owner, name), waiting

    def has_had_its_turn(self, lane: Lane) -> None:
        """Put a lane behind its owner's others, and the owner behind all others."""
        self._owners[lane.owner].move_to_end(lane.name)
        self._owners.move_to_end(lane.owner)

    def remove(self, lane: Lane) -> None:
        """Forget a lane; with his last one its owner. The owner's others wait for his next turn."""
        lanes = self._owners[lane.owner]
        del lanes[lane.name]
        if not lanes:
            del self._owners[lane.owner]
