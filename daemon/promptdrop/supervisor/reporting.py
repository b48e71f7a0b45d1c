"""Report the status when it is due, to status.json, its copy in the outbox, systemd and a bar."""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from promptdrop import fs
from promptdrop.loop import CLOSE_SECONDS, TROUBLE, Loop
from promptdrop.records import Status, StatusFinished, to_bytes
from promptdrop.sdnotify import Notifier
from promptdrop.spool.record import read_json
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.recovery import Recovery
from promptdrop.supervisor.status import Composer, one_line
from promptdrop.supervisor.work import Work

STATUS_SECONDS = 1.0  # shortest time between two writes, unless a job has ended
HEARTBEAT_SECONDS = 10.0  # longest time between two writes
PROGRESS_SECONDS = 0.1  # between two calls of `on_change`
_STATUS_BYTES = (
    4 << 20
)  # of a status: four lists of at most 100 files, each with a path and a reason


class OutboxCopy:
    """Writes status.json in the outbox, at most once a second and off the loop, as a share may hang."""

    def __init__(self, loop: Loop, spool: Spool) -> None:
        self._loop, self._spool = loop, spool
        self._written: Status | None = None
        self._written_at = 0.0  # when the last write had ended, monotonic seconds
        self._is_writing = False

    def due(self, status: Status) -> float:
        """Return when `update` next has something to do, monotonic seconds."""
        if status is self._written or self._is_writing:
            return float("inf")
        return self._written_at + STATUS_SECONDS

    def update(self, status: Status, now: float) -> None:
        """Write a status that differs from the last one, if it is time."""
        if now >= self.due(status):
            self._written, self._is_writing = status, True
            self._loop.off("herald", partial(self._write, status), self._write_done)

    def write_last(self, status: Status) -> bool:
        """Write at the end, when no room runs any more. False: it did not end in CLOSE_SECONDS."""
        writing = threading.Thread(target=self._write, args=(status,), name="herald", daemon=True)
        writing.start()
        writing.join(CLOSE_SECONDS)
        return not writing.is_alive()

    def _write(self, status: Status) -> None:
        """Write the copy, if the outbox can be written now.

        Thread: herald.
        """
        try:
            self._spool.folders.require()
            if not self._is_ours(self._spool.paths.shared_status):
                return
            mode = int(self._spool.config.output.mode, 8)
            fs.write_quickly(self._spool.paths.shared_status, to_bytes(status), mode)
        except TROUBLE:
            pass  # reported by the work that needs the outbox

    def _is_ours(self, path: Path) -> bool:
        """Whether a status.json in the outbox is one that a daemon wrote, or there is none.

        Thread: herald.
        """
        if not fs.exists(path):
            return True
        return read_json(path, _STATUS_BYTES).get("schema") == "promptdrop.status/1"

    def _write_done(self, _: None) -> None:
        self._is_writing, self._written_at = False, time.monotonic()


class Reporter:
    """Shows the status when it has changed, and at least every HEARTBEAT_SECONDS."""

    def __init__(
        self,
        work: Work,
        loop: Loop,
        spool: Spool,
        recovery: Recovery,
        composer: Composer,
        notifier: Notifier,
        on_change: Callable[[Status], None] | None,
    ) -> None:
        self.shown = composer.compose("starting", 0.0)  # what status.json says
        self._work, self._spool, self._recovery = work, spool, recovery
        self._composer, self._notifier, self._on_change = composer, notifier, on_change
        self._copy = OutboxCopy(loop, spool)
        self._key: object = None
        self._end: StatusFinished | None = None  # the end of a job that was shown last
        self._shown_at = self._progress_at = self._reported_at = 0.0  # monotonic seconds

    def start(self) -> None:
        """Write the first status.json."""
        self._write(self.shown)

    def report(self, now: float) -> None:
        """Report to everybody for whom a report is due."""
        if not self._work.pool.outlive_kill:
            self._notifier.ping(now)  # without pings systemd kills us all, which may help
        if self._on_change and now >= self._progress_at + PROGRESS_SECONDS:
            self._progress_at = now
            self._on_change(self._composer.compose(self._composer.state(), now))
        if not self._recovery.is_looking:
            self._copy.update(self.shown, now)
        if self._is_due(now):
            self._show(now)
        self._reported_at = now

    def next_deadline(self, now: float) -> float:
        """Return when `report` may next have something to do, monotonic seconds."""
        due = [now + HEARTBEAT_SECONDS]
        if self._notifier.watchdog_seconds:
            due.append(now + self._notifier.watchdog_seconds / 2)
        if self._work.running:
            due.append(self._next_look())
        if not self._recovery.is_looking:
            due.append(self._copy.due(self.shown))
        return min(due)

    def report_last(self, now: float, share: bool) -> bool:
        """Report that the daemon has stopped. share: also in the outbox. False: the outbox hangs."""
        last = self._composer.compose("stopping", now)
        self._write(last)
        has_answered = not share or self._copy.write_last(last)
        if self._on_change:
            self._on_change(last)
        return has_answered

    def _next_look(self) -> float:
        """Return when to look for news: a second after the status was shown, then every second."""
        soon = self._shown_at + STATUS_SECONDS
        return soon if self._reported_at < soon else self._reported_at + STATUS_SECONDS

    def _is_due(self, now: float) -> bool:
        if self._composer.last_end() is not self._end:
            return True  # people who wait for this job read the status
        if now < self._shown_at + STATUS_SECONDS:
            return False
        is_old = now >= self._shown_at + HEARTBEAT_SECONDS
        return is_old or bool(self._work.tickets) or self._composer.key(now) != self._key

    def _show(self, now: float) -> None:
        self._key, self._shown_at = self._composer.key(now), now
        self._end = self._composer.last_end()
        self.shown = self._composer.compose(self._composer.state(), now)
        self._notifier.status(one_line(self.shown))
        self._write(self.shown)

    def _write(self, status: Status) -> None:
        try:
            mode = self._spool.config.output.record_mode
            fs.write_quickly(self._spool.paths.status, to_bytes(status), mode)
        except OSError:
            pass  # reported by the work that needs the disk
