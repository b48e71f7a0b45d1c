"""The daemon's handle on one life of the engine process: start, speak, notice silence, kill."""

import errno
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

from promptdrop import messages
from promptdrop.config import Config
from promptdrop.job import EngineInfo, ImageSpec
from promptdrop.messages import (
    Answer,
    Began,
    Cancel,
    Cancelled,
    CannotStart,
    CountTokens,
    Failed,
    Ready,
    Render,
    Rendered,
    Stage,
    Step,
    Stop,
)

_REAP_SECONDS = 5.0  # a killed process that is still there is in uninterruptible sleep


@dataclass(slots=True)
class InHand:
    """One image that the engine has been sent."""

    spec: ImageSpec
    pixels: mmap.mmap
    began: float | None = None  # the daemon's monotonic clock
    last_sign: float = 0.0
    step: int = 0


@dataclass(slots=True)
class Limits:
    """How long the engine may be silent, seconds. Read anew each time, so SIGHUP can change them."""

    load: float
    grace: float
    stall: float | None


@dataclass(slots=True)
class EngineProcess:
    """One engine process, from spawn to reaped. Not started again: a new life is a new object."""

    config: Config
    started: float  # the daemon's monotonic clock
    info: EngineInfo | None = None  # set once it is warm
    stage: str = "starting"
    cannot_start: CannotStart | None = None
    in_hand: dict[int, InHand] = field(default_factory=dict)  # by ticket, in the order sent
    _popen: subprocess.Popen[bytes] = field(init=False)
    _connection: Connection = field(init=False)
    _pidfd: int = field(init=False)

    def __post_init__(self) -> None:
        """Called in the daemon's main thread: PR_SET_PDEATHSIG follows the thread that forks."""
        self._connection, theirs = Pipe()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "promptdrop.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,  # a process group of its own, to be killed as one
        )
        theirs.close()
        self._pidfd = os.pidfd_open(self._popen.pid)
        self._send(self.config)

    @property
    def pid(self) -> int:
        """The engine's process id and process group."""
        return self._popen.pid

    @property
    def is_ready(self) -> bool:
        """Whether it is loaded and warm."""
        return self.info is not None

    def filenos(self) -> list[int]:
        """What to wait on: its answers and its death."""
        return [self._connection.fileno(), self._pidfd]

    def has_ended(self) -> bool:
        """Whether the process is dead."""
        return self._popen.poll() is not None

    def how_it_ended(self) -> str:
        """`killed by SIGSEGV`, `exit status 3`."""
        code = self._popen.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def render(self, ticket: int, render: Render, now: float) -> None:
        """Send one image with fresh memory for its pixels. A dead engine is noticed by `has_ended`."""
        spec = render.spec
        size = spec.height * spec.width * 3
        memory = os.memfd_create("promptdrop-pixels", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, size)
            self.in_hand[ticket] = InHand(spec, mmap.mmap(memory, size), last_sign=now)
            if self._send(render):
                send_handle(self._connection, memory, self.pid)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died just now
        finally:
            os.close(memory)

    def cancel(self, ticket: int) -> None:
        """Ask to stop an image at its next step."""
        self._send(Cancel(ticket))

    def count_tokens(self, ticket: int, prompts: tuple[str, ...]) -> None:
        """Ask how long prompts are."""
        self._send(CountTokens(ticket, prompts))

    def stop(self) -> None:
        """Ask to end after what was sent before."""
        self._send(Stop())

    def answers(self, now: float) -> Iterator[Answer]:
        """What the engine has said since the last call; each sign of life moves its deadline.

        An answer that is none of ours is a broken engine: it is killed.
        """
        try:
            while self._connection.poll():
                answer = self._connection.recv()
                if not isinstance(answer, Answer):
                    raise pickle.UnpicklingError(f"not an answer: {type(answer).__name__}")
                if self._note(answer, now):
                    yield answer
        except (EOFError, OSError):
            return  # its end of the pipe is closed; `has_ended` will say how
        except (pickle.UnpicklingError, AttributeError, ImportError, ValueError, TypeError):
            self.kill()

    def overdue(self, now: float, limits: Limits) -> str | None:
        """Why the engine must be killed now, or None."""
        if not self.is_ready:
            if now > self.started + limits.load:
                return f"not loaded and warm within {limits.load:g} s (engine.load_timeout_seconds)"
            return None
        for image in self.in_hand.values():
            if image.began is None:
                continue
            if now > image.began + image.spec.timeout_seconds + limits.grace:
                return f"no answer {limits.grace:g} s after the image's {image.spec.timeout_seconds:g} s (timeout_seconds, engine.kill_grace_seconds)"
            if limits.stall is not None and now > image.last_sign + limits.stall:
                return f"silent for {limits.stall:g} s between steps (engine.stall_seconds)"
        return None

    def next_deadline(self, limits: Limits) -> float:
        """When `overdue` may first have something to say, on the daemon's monotonic clock."""
        if not self.is_ready:
            return self.started + limits.load
        deadlines = []
        for image in self.in_hand.values():
            if image.began is not None:
                deadlines.append(image.began + image.spec.timeout_seconds + limits.grace)
                if limits.stall is not None:
                    deadlines.append(image.last_sign + limits.stall)
        return min(deadlines, default=float("inf"))

    def kill(self) -> None:
        """SIGKILL its process group; returns at once."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # dead and reaped

    def reap(self) -> bool:
        """Kill, wait a bounded time, and close. False: it is in uninterruptible sleep."""
        self.kill()
        try:
            self._popen.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            self._connection.close()
            os.close(self._pidfd)
        return True

    def _note(self, answer: Answer, now: float) -> bool:
        """Keep the books. False: the answer is about an image nobody sent."""
        if isinstance(answer, Stage):
            self.stage = answer.text
        elif isinstance(answer, Ready):
            self.info = answer.info
        elif isinstance(answer, CannotStart):
            self.cannot_start = answer
        elif isinstance(answer, messages.Tokens):
            return True
        elif answer.ticket not in self.in_hand:
            return False
        elif isinstance(answer, Began):
            image = self.in_hand[answer.ticket]
            image.began = image.last_sign = now
        elif isinstance(answer, Step):
            self.in_hand[answer.ticket].last_sign = now
            self.in_hand[answer.ticket].step = answer.step
        return True

    def take(self, answer: Rendered | Failed | Cancelled) -> InHand:
        """The image an answer ends; it is in the engine's hand no more."""
        return self.in_hand.pop(answer.ticket)

    def _send(self, message: object) -> bool:
        try:
            self._connection.send(message)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF):
                raise
            return False  # it is dead; the loop notices by its pidfd
        return True
