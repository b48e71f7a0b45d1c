"""Trouble with disks: what is wrong, and whose trouble it is, everybody's or that of one dropped file."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from promptdrop import log


class Stuck(NamedTuple):
    """A dropped file that waits for trouble of its own."""

    name: str  # SUB/FILE
    why: str


class Troubles:
    """Knows what fails because of a disk. The log says each reason once, and when it is over."""

    def __init__(self) -> None:
        self._shared: dict[object, str] = {}
        self._own: dict[object, Stuck] = {}
        self._reasons: Counter[str] = Counter()

    def note(self, key: object, reason: str, name: str | None = None) -> None:
        """Note why something fails. name: SUB/FILE, if nobody else is affected."""
        if self._reason(key) == reason:
            return
        self.end(key)
        if name is None:
            self._shared[key] = reason
        else:
            self._own[key] = Stuck(name, reason)
        self._reasons[reason] += 1
        if self._reasons[reason] == 1:
            log.get().warning("disk.trouble", reason=reason)

    def end(self, key: object) -> None:
        """Note that this does not fail any more."""
        if (reason := self._reason(key)) is None:
            return
        self._shared.pop(key, None)
        self._own.pop(key, None)
        self._reasons[reason] -= 1
        if not self._reasons[reason]:
            del self._reasons[reason]
            log.get().info("disk.cured", reason=reason)

    def everybodys(self) -> str | None:
        """Say what holds everybody up; None if nothing does."""
        return next(iter(self._shared.values()), None)

    def own(self) -> Iterator[Stuck]:
        """Yield the files with trouble of their own; one with several troubles once."""
        named = {held.name: held for held in self._own.values()}
        yield from named.values()

    def __contains__(self, key: object) -> bool:
        return key in self._shared or key in self._own

    def __bool__(self) -> bool:
        """Whether there is any trouble."""
        return bool(self._reasons)

    def _reason(self, key: object) -> str | None:
        if key in self._shared:
            return self._shared[key]
        return self._own[key].why if key in self._own else None
