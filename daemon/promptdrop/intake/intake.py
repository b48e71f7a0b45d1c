"""From a file in the inbox to a job: look, read, claim, resolve, or refuse.

The scanner looks, the reader reads, the clerk claims and resolves; in between the loop decides.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from promptdrop import log, mounts, names
from promptdrop.config import Config
from promptdrop.errors import RequestError
from promptdrop.intake import taking
from promptdrop.intake.inbox import Inbox, Offer, Scan
from promptdrop.intake.sick import Sick
from promptdrop.intake.turns import Turns, by_lane
from promptdrop.intake.watcher import Mode, Watcher, watch_mode
from promptdrop.loop import TROUBLE, Loop, Owner, reason_of
from promptdrop.nouns import Request
from promptdrop.spool import control
from promptdrop.spool.job import Job, Unresolved
from promptdrop.spool.lanes import Lane, lane_of
from promptdrop.spool.spool import Spool

SCAN_SECONDS = 0.1  # shortest time between two looks at the inbox
SCAN_SHARE = 0.25  # the part of a core that looks may take while a big inbox keeps changing
TAKING = 16  # files being read or claimed at once; the others wait for their turn


class Desk(Protocol):
    """The supervisor, as this folder knows it. Everything that comes in is reported to it on the loop."""

    config: Config

    def accept(self, job: Job) -> None:
        """Take over a new job, which is resolved."""

    def refuse(self, claimed: Unresolved, error: RequestError) -> None:
        """Take over a claimed file that cannot be a job."""

    def surveyed(self, survey: "Survey") -> None:
        """Act on what the last look has found, before any of its files is taken."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The result of one look at the inbox, the control folder and the disks."""

    scan: Scan | None  # None: the inbox could not be read
    trouble: str | None  # with a disk, in words
    paused: str | None  # why no new image is begun, and how to go on
    commands: tuple[control.Command, ...]  # as found; one may have been carried out since
    lanes: dict[Lane, list[Offer]]  # the scan's offers, by the lane whose turn it may be
    cost: float  # CPU seconds


class Intake:
    """Takes files out of the inbox. It looks when it is woken and at intervals; `look` never blocks."""

    def __init__(self, loop: Loop, spool: Spool, desk: Desk) -> None:
        self.waiting: dict[str, str] = {}  # SUB/FILE -> why it is not taken yet
        self.watch = "not yet"  # how the inbox is watched, in words
        self.obstacle: str | None = None  # why nothing that is left can be taken
        self.last_activity = 0.0  # when something was last taken or put back
        self._loop, self._spool, self._desk = loop, spool, desk
        self._inbox = Inbox(spool.paths.inbox)
        self._watcher = Watcher(self.wake)
        self._woken = True
        self._scanning = False
        self._last_scan = self._next_scan = self._rested = 0.0
        self._quiet_since: float | None = None  # start of the last look that found no job file
        self._turns = Turns()
        # SUB/FILE of those that wait for their turn, are being read, claimed or resolved -> how many.
        self.arriving: Counter[str] = Counter()
        self._taking = (
            0  # ... of which have had their turn, and do not wait for a disk of their own
        )
        self._sick = Sick(spool.paths.inbox, loop.troubles)
        self._is_all_blocked = False  # whether the last look found only files that cannot be taken
        self._verdicts: list[Callable[[], None]] = []  # changes of the inbox, made by the next look

    def wake(self) -> None:
        """Look soon.

        Thread: any.
        """
        self._woken = True
        self._loop.wake()

    def next_look(self) -> float:
        """Return when `look` has something to do, monotonic seconds."""
        if self._scanning:
            return float("inf")
        soon = self._last_scan + SCAN_SECONDS if self._woken else float("inf")
        return max(min(self._next_scan, soon), self._rested)

    def is_quiet(self) -> bool:
        """Whether the last look began after the last activity and found no job file."""
        quiet = self._quiet_since is not None and self._quiet_since >= self.last_activity
        if not quiet:
            self._woken = True
        return quiet and self.is_idle()

    def is_idle(self) -> bool:
        """Whether nothing is being looked at or taken."""
        return not (self._scanning or self.arriving or self._verdicts)

    @property
    def behind(self) -> int:
        """Count the files that wait because others of their lane are stuck."""
        return self._turns.behind

    def is_stuck(self) -> bool:
        """Whether nothing is left that could be taken now, since every file left is stuck."""
        return self._is_all_blocked and not (self._scanning or self._taking or self._verdicts)

    def look(self, now: float) -> None:
        """Start a look if one is due."""
        if self._scanning or now < self.next_look():
            return
        self._scanning, self._woken, self._last_scan = True, False, now
        verdicts, self._verdicts = self._verdicts, []
        self._loop.off("scanner", partial(self._survey, now, verdicts), self._survey_done)

    def resolve_again(self, claimed: Unresolved) -> None:
        """Read a file that was claimed before a crash."""
        self.arriving[claimed.path] += 1
        self._taking += 1
        lane = lane_of(-1, claimed.sub, claimed.file)
        self._resolve(claimed, None, None, lane)

    def has_room(self) -> bool:
        """Whether one more file may be taken now."""
        return self._taking < TAKING

    def turn_away(self, path: str, error: RequestError) -> None:
        """Move SUB/FILE from the inbox to failed/, with the reason."""
        sub, _, file = path.rpartition("/")
        now = time.monotonic()
        offer = Offer(sub, file, (0, 0, 0, 0), now)
        self.arriving[path] += 1
        self._taking += 1
        owner = Owner(names.printable(path), path, self._turn_away_stalled)
        work = partial(taking.claim, self._spool, offer)
        self._loop.off("clerk", work, partial(self._claim_done, offer, error), owner=owner)

    def _turn_away_stalled(self, begins: bool) -> None:
        self._taking += -1 if begins else 1
        self._take_turns()

    def move_deadlines(self, seconds: float) -> None:
        """Let what waits in the inbox wait so much longer: we stood still, perhaps its writers, too."""
        self._verdicts.append(partial(self._inbox.move_deadlines, seconds))
        self._woken = True

    def close(self) -> None:
        """Stop watching."""
        self._watcher.close()

    # --- looking ------------------------------------------------------------------------------

    def _survey(self, now: float, verdicts: list[Callable[[], None]]) -> Survey:
        """Look at the inbox, the control folder and the disks.

        Thread: scanner.
        """
        began = time.thread_time()
        settings = self._desk.config
        for verdict in verdicts:
            verdict()
        verdicts.clear()
        scan, trouble = None, None
        try:
            self._spool.folders.require()
            self._watcher.check(self._watched_folders())
            scan = self._inbox.scan(now, settings.watch, settings.inbox.recursive)
            self._spool.folders.require_space(settings.limits.min_free_disk_mib)
        except TROUBLE as e:
            trouble = reason_of(e)
        commands: tuple[control.Command, ...] = ()
        try:
            commands = self._spool.commands.read(time.monotonic())
        except OSError as e:  # what was found in the inbox is known all the same
            trouble = trouble or reason_of(e)
        return Survey(
            scan=scan,
            trouble=trouble,
            paused=control.why_paused(self._spool.paths),
            commands=commands,
            lanes=by_lane(scan.offers if scan else (), settings.queue.policy),
            cost=time.thread_time() - began,
        )

    def decide_watch(self) -> Mode:
        """Decide how to watch, anew at every look: a share may be mounted over a local folder.

        Thread: any.
        """
        mode, self.watch = watch_mode(
            self._desk.config.watch.mode, mounts.file_system(self._spool.paths.inbox)
        )
        return mode

    def _watched_folders(self) -> dict[Path, bool]:
        """Return the folders to watch, each with whether its sub-folders are watched, too.

        Thread: scanner.
        """
        folders = {self._spool.paths.control: False}
        if self.decide_watch() == "inotify":
            folders[self._spool.paths.inbox] = self._desk.config.inbox.recursive
        return folders

    def _survey_done(self, survey: Survey) -> None:
        self._scanning = False
        self._rested = self._last_scan + survey.cost / SCAN_SHARE
        self._next_scan = self._last_scan + self._desk.config.watch.rescan_seconds
        self._desk.surveyed(survey)
        if scan := survey.scan:
            self.waiting = scan.waiting
            self._next_scan = min(self._next_scan, scan.next_look)
            self._quiet_since = scan.started if scan.found == 0 else None
            stuck = scan.blocked and len(scan.blocked) == scan.found
            self.obstacle = _first(scan.blocked) if stuck else None
            self.arriving.update(offer.path for offer in scan.offers)
            self._turns.add(survey.lanes)
            self._take_turns()
            waits = (p for p in scan.waiting if p not in scan.blocked and not names.is_cancel(p))
            self._is_all_blocked = not scan.offers and not any(True for _ in waits)
            self._sick.looked(scan.sick.items(), scan.waiting, self.arriving)

    # --- taking -------------------------------------------------------------------------------

    def _take_turns(self) -> None:
        """Read the next files, a few at a time, so that other work of the clerk comes in between."""
        while self._taking < TAKING and (offer := self._turns.take()):
            self._taking += 1
            work = partial(self._read, offer)
            self._loop.off("reader", work, partial(self._read_done, offer))

    def _resolve_stalled(self, lane: Lane, begins: bool) -> None:
        """Give the place of a claimed file that waits for a disk of its own to others, or take one again."""
        self._taking += -1 if begins else 1
        self._turns.stalled(lane, begins)
        self._take_turns()

    def _took(self, path: str) -> None:
        """Give the next file its turn, after one that was taken, refused or left in the inbox."""
        self.arriving[path] -= 1
        if not self.arriving[path]:
            del self.arriving[path]
        self._taking -= 1
        self._take_turns()

    def _read(self, offer: Offer) -> Request | RequestError | OSError | None:
        """Read an offered file; an OSError is trouble of this file alone.

        Thread: reader.
        """
        try:
            return taking.read(self._spool, offer)
        except OSError as e:
            return e

    def _read_done(self, offer: Offer, result: Request | RequestError | OSError | None) -> None:
        if result is None:
            self._gone(offer)
        elif isinstance(result, OSError):
            self._fails(offer, result)
        elif isinstance(result, RequestError) and offer.give_up is None:
            self._not_taken(offer.path, lambda: self._inbox.object(offer.path, str(result)))
        else:
            work = partial(self._claim, offer)
            self._loop.off("clerk", work, partial(self._claim_done, offer, result))

    def _claim(self, offer: Offer) -> Unresolved | str | OSError | None:
        """Move an offered file out of the inbox; an OSError is trouble of this file alone.

        Thread: clerk.
        """
        try:
            return taking.claim(self._spool, offer)
        except OSError as e:
            return e

    def _gone(self, offer: Offer) -> None:
        """Look anew at a file that was withdrawn or changed."""
        self._sick.end(offer.path)
        self._not_taken(offer.path, lambda: self._inbox.put_back(offer.path))

    def _fails(self, offer: Offer, error: OSError) -> None:
        """Leave a file in the inbox that a disk does not give; its place is free for others."""
        reason, now, seconds = reason_of(error), time.monotonic(), self._loop.retry_seconds
        self._sick.note(offer.path, reason)
        self._not_taken(offer.path, lambda: self._inbox.block(offer.path, reason, now, seconds))

    def _not_taken(self, path: str, verdict: Callable[[], None]) -> None:
        self._verdicts.append(verdict)
        self._took(path)
        self.wake()

    def _claim_done(
        self,
        offer: Offer,
        result: Request | RequestError,
        claimed: Unresolved | str | OSError | None,
    ) -> None:
        self.last_activity = now = time.monotonic()
        if claimed is None:
            self._gone(offer)
            return
        if isinstance(claimed, OSError):
            self._fails(offer, claimed)
            return
        if isinstance(claimed, str):
            again = self._desk.config.watch.rescan_seconds
            self._not_taken(offer.path, lambda: self._inbox.block(offer.path, claimed, now, again))
            return
        self._sick.end(offer.path)
        # Its name is free: the next file under it may be there before the next look.
        self._verdicts.append(lambda: self._inbox.put_back(offer.path))
        if isinstance(result, RequestError):
            self._took(offer.path)
            self._desk.refuse(claimed, result)
        else:
            self._resolve(claimed, offer, result, offer.lane)

    def _resolve(
        self, claimed: Unresolved, offer: Offer | None, asked: Request | None, lane: Lane
    ) -> None:
        owner = Owner(claimed.shown, lane, partial(self._resolve_stalled, lane))
        work = partial(taking.resolve, self._spool, claimed, offer, asked)
        self._loop.off("clerk", work, partial(self._resolve_done, claimed.path), owner=owner)

    def _resolve_done(self, path: str, result: Job | tuple[Unresolved, RequestError]) -> None:
        self._took(path)
        self.last_activity = time.monotonic()
        if isinstance(result, Job):
            log.get().info(
                "job.claimed",
                job=result.id,
                file=names.printable(result.path),
                images=result.images,
                folder=result.folder,
            )
            self._desk.accept(result)
        else:
            self._desk.refuse(*result)


def _first(blocked: dict[str, str]) -> str:
    """Name the first file that cannot be taken, and how many others there are."""
    path, why = next(iter(blocked.items()))
    others = f", and {len(blocked) - 1} more" if len(blocked) > 1 else ""
    return f"{names.printable(path)}: {why}{others}"
