"""Decide whose file is taken next: owners and their lanes take turns, so that nobody holds up the others."""

from collections import Counter, deque
from collections.abc import Iterable

from promptdrop.intake.inbox import Offer
from promptdrop.spool.lanes import EVERYBODY, Lane, Rounds

# Claimed files of one lane that wait for a disk of their own, from which on its other files wait, too.
STUCK = 4


class Turns:
    """Offers that wait to be taken: in turn between owners and their lanes, within a lane by arrival.

    Somebody who drops ten thousand files, or makes three hundred folders, does not keep the single file
    of another waiting.
    """

    def __init__(self) -> None:
        self.behind = 0  # offers that lie behind stuck files of their lane
        self._rounds: Rounds[deque[Offer]] = Rounds()
        self._stuck: Counter[Lane] = Counter()
        self._behind: dict[Lane, list[tuple[Lane, Offer]]] = {}

    def add(self, lanes: dict[Lane, list[Offer]]) -> None:
        """Put offers behind those of the same lane."""
        for lane, offers in lanes.items():
            self._rounds.lane(lane, deque).extend(offers)

    def take(self) -> Offer | None:
        """Take the next offer, or None if nobody waits whose lane is not stuck."""
        while self._rounds:
            place, waiting = self._rounds.first()
            offer = waiting.popleft()
            self._rounds.has_had_its_turn(place)
            if not waiting:
                self._rounds.remove(place)
            if self._stuck[offer.lane] < STUCK:
                return offer
            self._behind.setdefault(offer.lane, []).append((place, offer))
            self.behind += 1
        return None

    def stalled(self, lane: Lane, begins: bool) -> None:
        """Note that a claimed file of a lane begins, or ends, to wait for a disk of its own."""
        self._stuck[lane] += 1 if begins else -1
        if self._stuck[lane] < STUCK:
            for place, offer in self._behind.pop(lane, ()):
                self._rounds.lane(place, deque).append(offer)
                self.behind -= 1
        if not self._stuck[lane]:
            del self._stuck[lane]


def by_lane(offers: Iterable[Offer], policy: str) -> dict[Lane, list[Offer]]:
    """Sort offers into lanes (fair), or into the one of everybody (fifo).

    It runs off the loop, because there may be very many of them.

    Thread: scanner.
    """
    lanes: dict[Lane, list[Offer]] = {}
    for offer in offers:
        is_fair = policy == "fair"
        lane = offer.lane if is_fair else EVERYBODY
        lanes.setdefault(lane, []).append(offer)
    return lanes
