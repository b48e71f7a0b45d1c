"""Keeps one engine process on a host of the cluster, and its answers until the gateway asks for them.

Runs in the process of a Ray actor (`actor.py`). It imports no torch and never hangs: the engine is the
same child process as on a single machine, and is killed in the same way. It outlives the daemon, so that
the daemon's next life finds the engine warm.
"""

import os
import select
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptdrop.config import Config
from promptdrop.pool import process
from promptdrop.pool.link import EngineLink
from promptdrop.pool.messages import (
    Answer,
    Begin,
    Cancel,
    Cancelled,
    CountTokens,
    Failed,
    Gone,
    Ready,
    Render,
    Rendered,
    Request,
    Stage,
    Step,
)

STEP_SECONDS = (
    0.5  # steps are held back so long, to be sent together: each call costs a millisecond
)

Said = tuple[
    Answer, bytes | None
]  # an answer, and with Rendered its pixels: uint8 [height, width, 3]


@dataclass(frozen=True, slots=True)
class Host:
    """The answer to `hello`. An actor of 0.1.0 sends this class; a later one sends its fields."""

    name: str
    pid: int
    version: str


class EngineHost:
    """Keeps one engine at a time. Its methods are called from the cluster, several at once."""

    def __init__(self) -> None:
        self._said: deque[Said] = deque()
        self._wanted: deque[Request] = deque()  # requests that the keeper is to pass on
        # The number of the caller that attached last; calls of earlier ones are refused.
        self._listener = 0
        self._link: EngineLink | None = None
        self._settings: Config | None = None  # of the engine that runs
        self._next: Config | None = None  # of the engine to begin once none runs
        self._stale: set[int] = set()  # tickets of an earlier listener, whose answers nobody wants
        self._changed = threading.Condition()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Children die with the thread that forked them (PR_SET_PDEATHSIG): the keeper forks them.
        threading.Thread(target=self._keep, name="keeper", daemon=True).start()

    def attach(self, settings: Config) -> int:
        """Make this caller the listener, who alone is heard from now on. Returns its number.

        An engine of the same settings that runs is kept, warm as it is: its running images are
        cancelled and not reported. Otherwise a new engine is started.
        """
        with self._changed:
            self._listener += 1
            self._said.clear()
            self._wanted.clear()
            link = self._link
            if link and not link.killed and _makings(self._settings) == _makings(settings):
                self._stale |= link.in_hand.keys()
                self._wanted.extend(Cancel(ticket) for ticket in link.in_hand)
                self._say(Ready(link.info) if link.info else Stage(link.stage))
            else:
                self._next = settings
                if link:
                    link.kill("another takes its place", time.monotonic())
            self._changed.notify_all()
            self._wake()
            return self._listener

    def tell(self, listener: int, requests: list[Request]) -> None:
        """Pass requests on to the engine."""
        with self._changed:
            if listener == self._listener:
                self._wanted.extend(requests)
                self._wake()

    def listen(self, listener: int, seconds: float) -> list[Said]:
        """Return what the engine has said since the last call; wait at most `seconds` for something."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while (left := deadline - time.monotonic()) > 0:
                self._changed.wait_for(lambda: self._is_urgent(listener), min(left, STEP_SECONDS))
                if self._said or listener != self._listener:
                    break
            if listener != self._listener:
                return [(Gone("another daemon has taken this engine over", is_lost=True), None)]
            said = list(self._said)
            self._said.clear()
            return said

    def kill(self, listener: int) -> None:
        """Kill the engine process; if it has not begun, do not begin it.

        Its answers and its end are still reported.
        """
        with self._changed:
            if listener != self._listener:
                return
            is_to_begin, self._next = self._next is not None, None
            if self._link:
                self._link.kill("as asked", time.monotonic())
            elif is_to_begin:
                self._say(Gone("it had not begun", is_lost=False))

    def _is_urgent(self, listener: int) -> bool:
        is_heard = listener == self._listener
        return not is_heard or any(not isinstance(said, (Step, Stage)) for said, _ in self._said)

    def _say(self, answer: Answer, pixels: bytes | None = None) -> None:
        """Keep an answer for the listener. The caller holds the lock."""
        self._said.append((answer, pixels))
        self._changed.notify_all()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups already

    def _keep(self) -> None:
        """Run the keeper, in its own thread. An exception ends the actor, and with it the engine.

        Otherwise the daemon would wait for an engine that nobody keeps.
        """
        try:
            while True:
                self._turn()
        except Exception:
            traceback.print_exc()
            os._exit(1)

    def _turn(self) -> None:
        """Wait; then take in the engine's answers, start the next engine, and pass requests on."""
        waiting = select.poll()
        waiting.register(self._wake_read, select.POLLIN)
        if link := self._link:
            for descriptor in link.readers():
                writes = select.POLLOUT if descriptor in link.writers() else 0
                waiting.register(descriptor, select.POLLIN | writes)
        waiting.poll()
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            pass  # the engine woke us, not a caller
        with self._changed:
            self._hear()
            if self._next and not self._link:
                self._begin(self._next)
            self._pass_on()

    def _hear(self) -> None:
        if (link := self._link) is None:
            return
        now = time.monotonic()
        link.flush()
        ended = link.has_ended()
        for answer in link.answers(now):
            ticket, pixels = getattr(answer, "ticket", None), None
            if isinstance(answer, (Rendered, Failed, Cancelled)):
                with link.take(answer).pixels as memory:
                    pixels = memory[:] if isinstance(answer, Rendered) else None
            if ticket not in self._stale:
                self._say(answer, pixels)
            elif pixels is not None or isinstance(answer, (Failed, Cancelled)):
                self._stale.discard(ticket)
        if ended:
            link.reap()
            for image in link.in_hand.values():
                image.pixels.close()
            self._link, self._settings = None, None
            self._stale.clear()
            if not self._next:  # else the engine was an earlier listener's
                self._say(Gone(link.how_it_ended(), is_lost=False))

    def _begin(self, settings: Config) -> None:
        self._next = None
        try:
            here = settings.model_copy(update={"root": _cache_folder()})
            self._link, self._settings = process.start(here), settings
        except OSError as e:
            self._say(Gone(f"the engine process cannot be started: {e}", is_lost=True))

    def _pass_on(self) -> None:
        now = time.monotonic()
        while self._wanted:
            wanted = self._wanted.popleft()
            if self._link is None:
                pass  # the engine died, and its end is reported as Gone
            elif isinstance(wanted, Render):
                self._link.render(wanted.ticket, wanted, now)
            elif isinstance(wanted, Begin):
                self._link.begin()
            elif isinstance(wanted, CountTokens):
                self._link.count_tokens(wanted.ticket, wanted.prompts, now)
            elif isinstance(wanted, Cancel):
                self._link.cancel(wanted.ticket)


def _makings(settings: Config | None) -> tuple[Any, ...] | None:
    """Return the settings that an engine depends on; if only others have changed, it may stay."""
    if settings is None:
        return None
    engine = settings.engine
    speed = engine.compile, engine.quantization, engine.batch
    memory = engine.offload, engine.reserve_memory_mib
    return settings.model, settings.model_path, engine.warmup, speed, memory


def _cache_folder() -> Path:
    """Return the folder for compiled code on this host, where there is no spool."""
    ours = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]  # systemd's CacheDirectory=
    return Path(ours or Path.home() / ".cache" / "promptdrop")
