"""Decide which files of the inbox are complete. Events only mean "look now"; the scan decides.

A file is complete once it has not changed for a while by our own clock: modification times are old
after rsync or unzip, and
CLOSE_WRITE comes too early (WebDAV, appenders) or never (mv, ln). See proc(5), inotify(7).
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from promptdrop import names
from promptdrop.config import Watch
from promptdrop.intake.files import NOT_OURS, Found, below, job_files
from promptdrop.intake.writers import is_open_for_writing
from promptdrop.loop import delay
from promptdrop.spool.lanes import Lane, lane_of
from promptdrop.untrusted import Signature, signature

LOOKS = 2  # a file must look the same at least this often
WRITER_SECONDS = 0.25  # how often a file that somebody has open for writing is probed again
NEVER = float("inf")  # monotonic seconds: nothing is due


@dataclass(frozen=True, slots=True)
class Offer:
    """A file that is complete; with `give_up`, one to be refused after it has waited long enough."""

    sub: str  # folder below the inbox, "" at the root
    file: str
    signature: Signature
    settled: float  # monotonic seconds
    give_up: str | None = None  # why it is refused
    owner: int = 0  # uid

    @property
    def path(self) -> str:
        """SUB/FILE, below the inbox."""
        return below(self.sub, self.file)

    @property
    def lane(self) -> Lane:
        """Whose turn it waits for."""
        return lane_of(self.owner, self.sub, self.file)


@dataclass(slots=True)
class Seen:
    """One job file that is not taken yet."""

    signature: Signature
    owner: int  # uid
    since: float  # unchanged since, monotonic seconds
    looks: int = 1
    objection: str | None = None  # why it would be refused as it stands
    obstacle: str | None = None  # why it could not be read or moved
    tries: int = 0  # in a row that a disk has failed
    obstacle_until: float = 0.0  # when that is tried again
    offered: bool = False


class Verdict(NamedTuple):
    """Whether a file is offered now; if not, why it waits and when to look at it again."""

    why: str | None  # why it waits, or is refused; None: it is complete
    again: float = NEVER  # monotonic seconds
    give_up: bool = False  # it is offered to be refused


@dataclass(frozen=True, slots=True)
class Scan:
    """The result of one look at the inbox."""

    started: float  # monotonic seconds
    offers: tuple[Offer, ...]
    waiting: dict[str, str]  # SUB/FILE -> why it is not taken yet
    blocked: dict[
        str, str
    ]  # those of `waiting` that time does not cure: no ready marker, or cannot be moved
    next_look: float  # monotonic seconds; inf: nothing is due
    sick: dict[str, str]  # SUB/FILE, or SUB/ of a whole folder, that a disk does not show -> why
    found: int  # job files, taken or not
    cancels: dict[str, float]  # SUB/NAME.cancel whose file is not in the inbox -> first seen


@dataclass(slots=True)
class _Look:
    """What a look has found so far."""

    found: set[str] = field(default_factory=set)
    arrived: list[tuple[float, str, Offer]] = field(default_factory=list)  # by age, then path
    waiting: dict[str, str] = field(default_factory=dict)
    sick: dict[str, str] = field(default_factory=dict)
    next_look: float = NEVER

    def is_sick(self, path: str, error: OSError) -> None:
        """Note a file that a disk does not show: it stops no other."""
        self.found.add(path)
        self.sick[path] = self.waiting[path] = f"cannot be looked at: {error.strerror}"

    def sick_folder(self, sub: str, error: OSError) -> None:
        """Note a sub-folder that a disk does not show, with all that may be in it."""
        self.is_sick(f"{sub}/", error)


@dataclass(slots=True)
class Inbox:
    """Remembers the files it has seen. Only `scan` looks at the disk; times are arguments.

    Thread: scanner.
    """

    root: Path
    _seen: dict[str, Seen] = field(default_factory=dict)
    _cancels: dict[str, float] = field(default_factory=dict)  # SUB/NAME.cancel -> first seen

    def scan(self, now: float, watch: Watch, recursive: bool) -> Scan:
        """Look at everything once. Raises OSError: the inbox itself cannot be read."""
        look = _Look()
        cancels: dict[str, float] = {}
        for file in job_files(self.root, recursive, look.sick_folder):
            sub, entry, _ = file
            path = below(sub, entry.name)
            if names.is_cancel(entry.name):
                cancels[path] = self._cancels.get(path, now)
                continue
            look.found.add(path)
            if path in self._seen and self._seen[path].offered:
                continue
            try:
                verdict = self._examine(path, file, now, watch)
            except NOT_OURS:
                continue  # withdrawn meanwhile
            except OSError as e:
                look.is_sick(path, e)
                continue
            look.next_look = min(look.next_look, verdict.again)
            if verdict.why and not verdict.give_up:
                look.waiting[path] = verdict.why
            else:
                look.arrived.append((self._seen[path].since, path, self._offer(file, now, verdict)))
        for path in self._seen.keys() - look.found:
            del self._seen[path]  # taken or withdrawn
        waiting = look.waiting
        blocked = {path: why for path, why in waiting.items() if self._is_blocked(path, why)}
        cancels = self._hold_back(cancels, look.found, waiting, now)
        return Scan(
            started=now,
            offers=tuple(offer for _, _, offer in sorted(look.arrived)),
            waiting=waiting,
            blocked=blocked,
            next_look=look.next_look,
            sick=look.sick,
            found=len(look.found),
            cancels=cancels,
        )

    def _offer(self, file: Found, now: float, verdict: Verdict) -> Offer:
        sub, entry, _ = file
        seen = self._seen[below(sub, entry.name)]
        seen.offered = True
        return Offer(sub, entry.name, seen.signature, now, verdict.why, seen.owner)

    def object(self, path: str, objection: str) -> None:
        """Make an offered file wait that would be refused, because it may still be arriving."""
        if seen := self._seen.get(path):
            seen.objection, seen.offered = objection, False

    def block(
        self, path: str, obstacle: str, now: float, seconds: float, is_sick: bool = False
    ) -> None:
        """Make an offered file wait that cannot be read or moved out; it is offered again after `seconds`.

        is_sick: because of a disk; then it is tried less and less often.
        """
        if seen := self._seen.get(path):
            seen.tries = seen.tries + 1 if is_sick else 1
            seen.obstacle, seen.offered = obstacle, False
            seen.obstacle_until = now + delay(seconds, seen.tries)

    def move_deadlines(self, seconds: float) -> None:
        """Let every file settle so much later: we stood still, and perhaps its writer with us."""
        for seen in self._seen.values():
            seen.since += seconds
        self._cancels = {path: since + seconds for path, since in self._cancels.items()}

    def put_back(self, path: str) -> None:
        """Forget an offered file that was taken, withdrawn or changed; a changed one settles anew."""
        self._seen.pop(path, None)

    def _examine(self, path: str, file: Found, now: float, watch: Watch) -> Verdict:
        """Look at one file and judge it. Raises OSError: it was withdrawn, or its disk is sick."""
        _, entry, siblings = file
        seen = self._note(path, entry.stat(follow_symlinks=False), now)
        if watch.ready_suffix is not None and entry.name + watch.ready_suffix not in siblings:
            seen.obstacle = f"waiting for {entry.name}{watch.ready_suffix}"
            return Verdict(seen.obstacle)
        return _judge(entry.path, seen, now, watch)

    def _note(self, path: str, status: os.stat_result, now: float) -> Seen:
        """Count one more look; a file that has changed is seen for the first time."""
        seen, current = self._seen.get(path), signature(status)
        if seen is None or seen.signature != current:
            seen = self._seen[path] = Seen(current, status.st_uid, now)
        else:
            seen.looks += 1
        return seen

    def _is_blocked(self, path: str, why: str) -> bool:
        """Whether the file waits for a reason that does not pass with time."""
        return path not in self._seen or self._seen[path].obstacle == why

    def _hold_back(
        self, cancels: dict[str, float], found: set[str], waiting: dict[str, str], now: float
    ) -> dict[str, float]:
        """Remember the cancel marks; return those whose file is not in the inbox. The others wait."""
        held = set(those_of(cancels, found))
        for path in held:
            waiting[path] = "waits until the file it names is taken"
            cancels[path] = now  # how long the mark stands counts from when that file is gone
        self._cancels = cancels
        return {path: since for path, since in cancels.items() if path not in held}


def _judge(path: str, seen: Seen, now: float, watch: Watch) -> Verdict:
    """Decide whether a file is complete, waits or is given up."""
    settles = seen.since + watch.settle_seconds
    waits_for_writer = now < settles + watch.writer_seconds
    if seen.obstacle and now < seen.obstacle_until:
        return Verdict(seen.obstacle, seen.obstacle_until)
    objection = seen.objection or ("is empty" if seen.signature[1] == 0 else None)
    if objection:
        gives_up = seen.since + max(watch.give_up_seconds, watch.settle_seconds)
        why = f"would be refused: {objection}"
        if now < gives_up or seen.looks < LOOKS:
            return Verdict(why, max(gives_up, now))
        if waits_for_writer and is_open_for_writing(path):
            return Verdict(f"{why}; open for writing", now + WRITER_SECONDS)
        return Verdict(objection, now, give_up=True)
    if now < settles or seen.looks < LOOKS:
        return Verdict("still settling", max(settles, now))
    if waits_for_writer and is_open_for_writing(path):
        return Verdict("open for writing", now + WRITER_SECONDS)
    return Verdict(None)


def those_of(cancels: Iterable[str], files: Iterable[str]) -> list[str]:
    """Return those of `cancels` whose file is among `files`.

    SUB/cat.txt is the file of SUB/cat.cancel and of SUB/cat.txt.cancel.
    """
    marks = {names.fold(names.split(path)[0]): path for path in cancels}
    if not marks:
        return []
    known = {names.fold(name) for path in files for name in (path, names.split(path)[0])}
    return [path for name, path in marks.items() if name in known]
