"""The daemon's one wait, and the threads that touch disks for it.

Whatever may block runs in a room, a small pool of threads, and what follows from it runs on the
loop. Trouble with a disk is never an answer: the same work is tried again until it is cured.
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

# scanner: looks at the inbox. reader: parses drops. clerk: moves jobs, one thing after another.
# herald: writes the outbox's status, and waits alone when that is on a share that hangs.
Room = Literal["scanner", "reader", "clerk", "publisher", "herald"]
SLOW_SECONDS = 15.0  # a piece of work that takes longer is reported
CLOSE_SECONDS = 5.0  # ... and at the end it is not waited for any longer than this


class Loop:
    """Owned by the main thread; only `wake` may be called from elsewhere."""

    def __init__(self) -> None:
        self.trouble: dict[object, str] = {}  # work that a disk does not let succeed -> why
        self._again: list[Callable[[], None]] = []  # of it, what waits for the next try
        self._told: set[str] = set()  # reasons that were logged since all was well
        self._futures: set[Future[Any]] = set()
        self._at_work: dict[object, tuple[Room, float]] = {}  # in the threads -> since when
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
        """End the wait in hand. Called from any thread and from signal handlers."""
        try:
            os.write(self._wake_write, b"\0")
        except OSError:
            pass  # the pipe is full of wake-ups already, or closed

    def wait(self, readers: list[int], writers: list[int], deadline: float) -> None:
        """Until a descriptor is ready, a wake-up, stalled work is due, or `deadline` (monotonic)."""
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
        """What the threads have brought back, and stalled work whose time has come."""
        while not self._results.empty():
            self._results.get()()
        if time.monotonic() >= self._retry_at:
            due, self._again, self._retry_at = self._again, [], float("inf")
            for again in due:
                again()

    def slow(self, now: float) -> str | None:
        """What has not come back for long: a disk that does not answer raises no error."""
        for room, since in list(self._at_work.values()):
            if now > since + SLOW_SECONDS:
                return f"the {room} has waited more than {SLOW_SECONDS:g} s for a disk"
        return None

    def off(
        self,
        room: Room,
        function: Callable[[], Any],
        then: Callable[[Any], None],
        retry_seconds: float,
    ) -> None:
        """Run `function` in a room, then `then(result)` here; after disk trouble, again later."""
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
                self._stall(work, again, reason_of(error), retry_seconds)
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
        """Let work in hand end, drop what has not begun. False: a disk does not let it end."""
        self._closed = True
        for room in self._rooms.values():
            room.shutdown(wait=False, cancel_futures=True)
        _, hung = concurrent.futures.wait(list(self._futures), CLOSE_SECONDS)
        os.close(self._wake_read)
        os.close(self._wake_write)
        return not hung

    def _stall(
        self, work: object, again: Callable[[], None], reason: str, retry_seconds: float
    ) -> None:
        if reason not in self._told:
            self._told.add(reason)
            log.get().warning("disk.trouble", reason=reason)
        self.trouble[work] = reason
        self._again.append(again)
        self._retry_at = min(self._retry_at, time.monotonic() + retry_seconds)

    def _cure(self, work: object) -> None:
        if self.trouble.pop(work, None) and not self.trouble:
            self._told.clear()
            log.get().info("disk.cured")


def reason_of(error: BaseException) -> str:
    """The file, the error and what it means, of trouble with a disk."""
    if isinstance(error, PromptdropError):
        return str(error)
    assert isinstance(error, OSError)
    if error.filename is None:
        return error.strerror or str(error)
    where = Path(os.fsdecode(error.filename))
    if where.name.startswith(fs.TEMPORARY):
        where = where.parent  # its name is another at every try
    return f"{names.printable(str(where))}: {error.strerror or error}"
