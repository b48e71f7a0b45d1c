"""Decide whose file is taken next: owners and their lanes take turns, so that nobody holds up the others."""

from collections import deque
from collections.abc import Iterable

from promptdrop.intake.inbox import Offer
from promptdrop.spool.lanes import EVERYBODY, Lane, Rounds, lane_of


class Turns:
    """Offers that wait to be taken: in turn between owners and their lanes, within a lane by arrival.

    Somebody who drops ten thousand files, or makes three hundred folders, does not keep the single file
    of another waiting.
    """

    def __init__(self) -> None:
        self._rounds: Rounds[deque[Offer]] = Rounds()

    def add(self, lanes: dict[Lane, list[Offer]]) -> None:
        """Put offers behind those of the same lane."""
        for lane, offers in lanes.items():
            self._rounds.lane(lane, deque).extend(offers)

    def take(self) -> Offer | None:
        """Take the next offer, or None if nobody waits."""
        if not self._rounds:
            return None
        lane, waiting = self._rounds.first()
        offer = waiting.popleft()
        self._rounds.has_had_its_turn(lane)
        if not waiting:
            self._rounds.remove(lane)
        return offer


def by_lane(offers: Iterable[Offer], policy: str) -> dict[Lane, list[Offer]]:
    """Sort offers into lanes (fair), or into the one of everybody (fifo).

    It runs off the loop, because there may be very many of them.

    Thread: scanner.
    """
    lanes: dict[Lane, list[Offer]] = {}
    for offer in offers:
        is_fair = policy == "fair"
        lane = lane_of(offer.owner, offer.sub, offer.file) if is_fair else EVERYBODY
        lanes.setdefault(lane, []).append(offer)
    return lanes
