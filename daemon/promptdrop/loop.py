"""The daemon's event loop, and the threads that touch disks for it.

Work that may block runs in a room, a small pool of threads; what follows from it runs on the loop.
Trouble with a disk is never a result: the same work is tried again until the disk is cured. Work that
belongs to one dropped file waits alone: its owner gives back what others may need meanwhile.
"""

import concurrent.futures
import math
import os
import select
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from promptdrop import fs, names
from promptdrop.errors import DiskTrouble, PromptdropError
from promptdrop.troubles import Troubles

PUBLISHERS = 4  # images being encoded and saved at once
TROUBLE = (OSError, DiskTrouble)

# scanner: looks at the inbox. reader: parses drops. clerk: moves jobs, one after another.
# publisher: encodes and saves images. herald: writes the status in the outbox; where that is on a
# share that hangs, no other thread waits.
Room = Literal["scanner", "reader", "clerk", "publisher", "herald"]
SLOW_SECONDS = 15.0  # a piece of work that takes longer is reported
CLOSE_SECONDS = 5.0  # ... and is waited for at most so long when the daemon ends
RETRY_SECONDS = 60.0  # longest time between two tries of work that fails because of a disk


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose work it is: what an OSError says about its files is no trouble of anybody else."""

    name: str  # SUB/FILE
    lane: Hashable  # other stalled work of this lane is tried again as soon as some of it succeeds
    # Told on the loop when it begins to wait, and when that is over.
    stalled: Callable[[bool], None] = lambda begins: None


@dataclass(slots=True)
class _Work:
    """Work that runs in a room, and again after trouble with a disk."""

    room: Room
    function: Callable[[], Any]
    then: Callable[[Any], None]
    owner: Owner | None
    tries: int = 0  # that have failed in a row
    due: float = 0.0  # monotonic seconds: when it is tried again
    is_owners: bool = False  # its owner was told that it waits


def delay(first: float, tries: int) -> float:
    """Return the seconds until the next try: twice as many after each, up to RETRY_SECONDS."""
    return min(first * 2.0 ** min(tries - 1, 30), max(first, RETRY_SECONDS))


class Loop:
    """Belongs to the main thread; only `wake` may be called from other threads."""

    def __init__(self, retry_seconds: float) -> None:
        self.retry_seconds = retry_seconds  # from trouble with a disk to the next try
        self.troubles = Troubles()
        self._stalled: dict[int, _Work] = {}  # by id()
        self._futures: set[Future[Any]] = set()
        self._at_work: dict[int, tuple[Room, float]] = {}  # by id(): its room, and when it began
        self._retry_at = float("inf")
        self._closed = False
        self._results: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._rooms = {
            "scanner": ThreadPoolExecutor(1, "scanner"),
            "reader": ThreadPoolExecutor(1, "reader"),
            "clerk": ThreadPoolExecutor(1, "clerk"),
            "herald": ThreadPoolExecutor(1, "herald"),
            "publisher": ThreadPoolExecutor(PUBLISHERS, "publisher"),
        }

    def wake(self) -> None:
        """End the wait that is going on, or the next one. Signal handlers may call it, too.

        Thread: any.
        """
        try:
            os.write(self._wake_write, b"\0")
        except OSError:
            pass  # the pipe is full of wake-ups already, or closed

    def wait(self, readers: list[int], writers: list[int], deadline: float) -> None:
        """Wait for a descriptor, a wake-up, stalled work that is due, or `deadline` (monotonic)."""
        timeout = max(0.0, min(deadline, self._retry_at) - time.monotonic())
        waiting = select.poll()
        for descriptor in {self._wake_read, *readers}:
            writes = select.POLLOUT if descriptor in writers else 0
            waiting.register(descriptor, select.POLLIN | writes)
        waiting.poll(math.ceil(timeout * 1e3))
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass  # drained

    def run_results(self) -> None:
        """Run what follows from work that the threads have done; start stalled work that is due again."""
        while not self._results.empty():
            self._results.get()()
        now = time.monotonic()
        if now >= self._retry_at:
            for work in [work for work in self._stalled.values() if work.due <= now]:
                del self._stalled[id(work)]
                self._submit(work)
            self._retry_at = min((w.due for w in self._stalled.values()), default=float("inf"))

    @property
    def is_working(self) -> bool:
        """Whether a room works, or has done work whose result was not looked at yet."""
        return bool(self._futures) or not self._results.empty()

    def slow(self, now: float) -> str | None:
        """Name a room whose work has not come back for long: a disk that hangs raises no error."""
        for room, since in list(self._at_work.values()):
            if now > since + SLOW_SECONDS:
                return f"the {room} has waited more than {SLOW_SECONDS:g} s for a disk"
        return None

    def off(
        self,
        room: Room,
        function: Callable[[], Any],
        then: Callable[[Any], None],
        *,
        owner: Owner | None = None,
    ) -> None:
        """Run `function` in a room, then `then(result)` on the loop.

        After OSError and DiskTrouble the function runs again, first in `retry_seconds`, so it must be
        repeatable; any other error ends the daemon. owner: whose trouble an OSError is; None, and a
        DiskTrouble: everybody's.
        """
        self._submit(_Work(room, function, then, owner))

    def try_again(self, lane: Hashable = None) -> None:
        """Try stalled work of a lane again at once; without a lane all of it."""
        now = time.monotonic()
        for work in self._stalled.values():
            if lane is None or (work.owner and work.owner.lane == lane):
                work.due = self._retry_at = now

    def close(self) -> bool:
        """Wait for running work, and drop work that has not begun.

        Returns False if some work still runs after CLOSE_SECONDS, because a disk hangs.
        """
        self._closed = True
        for room in self._rooms.values():
            room.shutdown(wait=False, cancel_futures=True)
        _, hung = concurrent.futures.wait(list(self._futures), CLOSE_SECONDS)
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._wake_write = -1  # a late signal must not write into another file
        return not hung

    def _submit(self, work: _Work) -> None:
        if self._closed:
            return
        future = self._rooms[work.room].submit(self._run, work)
        self._futures.add(future)
        future.add_done_callback(lambda future: self._ran(work, future))

    def _run(self, work: _Work) -> Any:
        """Do work.

        Thread: any room.
        """
        self._at_work[id(work)] = work.room, time.monotonic()
        try:
            return work.function()
        finally:
            del self._at_work[id(work)]

    def _ran(self, work: _Work, future: Future[Any]) -> None:
        """Have the loop look at the result.

        Thread: any room; the loop for what was dropped.
        """
        self._futures.discard(future)
        self._results.put(lambda: self._returned(work, future))
        self.wake()

    def _returned(self, work: _Work, future: Future[Any]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, TROUBLE):
            self._stall(work, error)
        elif error is not None:
            raise error
        else:
            self._cure(work)
            work.then(future.result())

    def _stall(self, work: _Work, error: BaseException) -> None:
        work.tries += 1
        work.due = time.monotonic() + delay(self.retry_seconds, work.tries)
        self._stalled[id(work)] = work
        self._retry_at = min(self._retry_at, work.due)
        owner = None if isinstance(error, DiskTrouble) else work.owner
        self.troubles.note(id(work), reason_of(error), owner.name if owner else None)
        if owner and not work.is_owners:
            work.is_owners = True
            owner.stalled(True)

    def _cure(self, work: _Work) -> None:
        self.troubles.end(id(work))
        if work.owner and work.is_owners:
            work.owner.stalled(False)
            self.try_again(work.owner.lane)


def reason_of(error: BaseException) -> str:
    """Say in words which file had trouble with its disk, and what trouble."""
    if isinstance(error, PromptdropError):
        return str(error)
    assert isinstance(error, OSError)
    if error.filename is None:
        return error.strerror or str(error)
    target = f" -> {_shown(error.filename2)}" if error.filename2 else ""
    return f"{_shown(error.filename)}{target}: {error.strerror or error}"


def _shown(file: str | bytes) -> str:
    """Return a file name for people; of a temporary, which has another name at every try, its folder."""
    where = Path(os.fsdecode(file))
    return names.printable(str(where.parent if where.name.startswith(fs.TEMPORARY) else where))
