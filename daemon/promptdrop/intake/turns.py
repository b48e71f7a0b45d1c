"""Decide whose file is taken next: lanes take turns, so that a full one does not hold up the others."""

from collections import OrderedDict, deque
from collections.abc import Iterable

from promptdrop.intake.inbox import Offer


class Turns:
    """Offers that wait to be taken: in turn between lanes, within a lane by arrival.

    Somebody who drops ten thousand files does not keep the single file of another waiting.
    """

    def __init__(self) -> None:
        self._lanes: OrderedDict[str, deque[Offer]] = OrderedDict()

    def add(self, lanes: dict[str, list[Offer]]) -> None:
        """Put offers behind those of the same lane."""
        for name, offers in lanes.items():
            self._lanes.setdefault(name, deque()).extend(offers)

    def take(self) -> Offer | None:
        """Take the next offer, or None if nobody waits."""
        if not self._lanes:
            return None
        name, lane = next(iter(self._lanes.items()))
        offer = lane.popleft()
        if lane:
            self._lanes.move_to_end(name)
        else:
            del self._lanes[name]
        return offer


def by_lane(offers: Iterable[Offer], policy: str) -> dict[str, list[Offer]]:
    """Sort offers into lanes: one for each top-level sub-folder (fair), or one for all (fifo).

    It runs off the loop, because there may be very many of them.

    Thread: scanner.
    """
    lanes: dict[str, list[Offer]] = {}
    for offer in offers:
        lane = offer.sub.partition("/")[0] if policy == "fair" else ""
        lanes.setdefault(lane, []).append(offer)
    return lanes
