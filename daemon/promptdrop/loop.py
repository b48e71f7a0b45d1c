"""The daemon's event loop, and the threads that touch disks for it.

Work that may block runs in a room, a small pool of threads; what follows from it runs on the loop.
Trouble with a disk is never a result: the same work is tried again until the disk is cured.
"""

import concurrent.futures
import math
import os
import select
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from promptdrop import fs, log, names
from promptdrop.errors import DiskTrouble, PromptdropError

PUBLISHERS = 4  # images being encoded and saved at once
TROUBLE = (OSError, DiskTrouble)

# scanner: looks at the inbox. reader: parses drops. clerk: moves jobs, one after another.
# publisher: encodes and saves images. herald: writes the status in the outbox; where that is on a
# share that hangs, no other thread waits.
Room = Literal["scanner", "reader", "clerk", "publisher", "herald"]
SLOW_SECONDS = 15.0  # a piece of work that takes longer is reported
CLOSE_SECONDS = 5.0  # ... and is waited for at most so long when the daemon ends


class Loop:
    """Belongs to the main thread; only `wake` may be called from other threads."""

    def __init__(self, retry_seconds: float) -> None:
        self.retry_seconds = retry_seconds  # from trouble with a disk to the next try
        self.trouble: dict[object, str] = {}  # work that fails because of a disk -> why
        self._again: list[Callable[[], None]] = []  # starts each of these once more
        self._told: set[str] = set()  # reasons that were logged since all was well
        self._futures: set[Future[Any]] = set()
        self._at_work: dict[
            object, tuple[Room, float]
        ] = {}  # work in the rooms -> its room, and when it began
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
        if time.monotonic() >= self._retry_at:
            due, self._again, self._retry_at = self._again, [], float("inf")
            for again in due:
                again()

    def slow(self, now: float) -> str | None:
        """Name a room whose work has not come back for long: a disk that hangs raises no error."""
        for room, since in list(self._at_work.values()):
            if now > since + SLOW_SECONDS:
                return f"the {room} has waited more than {SLOW_SECONDS:g} s for a disk"
        return None

    def off(self, room: Room, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run `function` in a room, then `then(result)` on the loop.

        After OSError and DiskTrouble the function runs again in `retry_seconds`, so it must be
        repeatable; any other error ends the daemon.
        """
        work = object()

        def run() -> Any:
            self._at_work[work] = room, time.monotonic()
            try:
                return function()
            finally:
                del self._at_work[work]

        def done(future: Future[Any]) -> None:
            self._futures.discard(future)
            self._results.put(lambda: returned(future))
            self.wake()

        def returned(future: Future[Any]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if isinstance(error, TROUBLE):
                self._stall(work, again, reason_of(error))
            elif error is not None:
                raise error
            else:
                self._cure(work)
                then(future.result())

        def again() -> None:
            if not self._closed:
                future = self._rooms[room].submit(run)
                self._futures.add(future)
                future.add_done_callback(done)

        again()

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
        return not hung

    def _stall(self, work: object, again: Callable[[], None], reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            log.get().warning("disk.trouble", reason=reason)
        self.trouble[work] = reason
        self._again.append(again)
        self._retry_at = min(self._retry_at, time.monotonic() + self.retry_seconds)

    def _cure(self, work: object) -> None:
        if self.trouble.pop(work, None) and not self.trouble:
            self._told.clear()
            log.get().info("disk.cured")


def reason_of(error: BaseException) -> str:
    """Say in words which file had trouble with its disk, and what trouble."""
    if isinstance(error, PromptdropError):
        return str(error)
    assert isinstance(error, OSError)
    if error.filename is None:
        return error.strerror or str(error)
    where = Path(os.fsdecode(error.filename))
    if where.name.startswith(fs.TEMPORARY):
        where = where.parent  # a temporary has another name at every try
    return f"{names.printable(str(where))}: {error.strerror or error}"
