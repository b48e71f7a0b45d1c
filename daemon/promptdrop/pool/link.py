"""The daemon's handle on one life of an engine, wherever it runs: speak, notice silence, kill.

Nothing here waits for the engine: it may stop in the middle of a message, or read none. The other
end of the pipe is a multiprocessing.connection.Connection, whose frames are a length and a pickle.
"""

import mmap
import os
import pickle
import socket
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from promptdrop.nouns import EngineInfo, ImageSpec, Rendering
from promptdrop.pool.messages import (
    Answer,
    Began,
    Begin,
    Cancel,
    Cancelled,
    CannotStart,
    CountTokens,
    Failed,
    Gone,
    Placed,
    Ready,
    Render,
    Rendered,
    Stage,
    Step,
    Stop,
    Tokens,
)

REAP_SECONDS = 5.0  # a killed process that is still there is in uninterruptible sleep
_LENGTH = struct.Struct("!i")
_CHUNK = 1 << 16  # bytes read at a time
_ANSWER_LIMIT = 1 << 20  # bytes: the longest prompt and 10,000 counts fit ten times


@dataclass(slots=True)
class InHand:
    """One image that the engine has been sent."""

    spec: ImageSpec
    pixels: mmap.mmap
    began: float | None = None  # the daemon's monotonic clock
    batch: int = 1  # images that were begun together
    last_sign: float = 0.0
    step: int = 0
    is_shared: bool = False  # since that step the text of another is encoded, too
    recalled: bool = False  # another engine shall have it

    @property
    def timeout_seconds(self) -> float:
        """Of all that were begun together."""
        return self.spec.timeout_seconds * self.batch


@dataclass(slots=True)
class Limits:
    """How long the engine may be silent, seconds. Read anew each time, so SIGHUP can change them."""

    load: float
    grace: float
    stall: float | None  # between the steps of an image
    begin: float  # with images or questions in hand, before one is begun


class Life(Protocol):
    """What is at the other end of a link: a process of this machine, or a relay to another's."""

    socket: socket.socket  # not blocking
    is_lost: bool  # its end without a word of its own is no image's fault

    def ends(self) -> list[int]:
        """Descriptors that can be read once it has ended; none: the socket's end is its end."""

    def has_ended(self) -> bool:
        """Whether it is dead; what it said before may still be read."""

    def how_it_ended(self) -> str:
        """`killed by SIGSEGV`, `exit status 3`."""

    def kill(self) -> None:
        """End it at once; returns at once."""

    def reap(self, seconds: float) -> bool:
        """Kill, wait at most so long for its end, and close. False: nobody ends it."""


@dataclass(slots=True)
class EngineLink:
    """One engine, from start to reaped. Not started again: a new life is a new object."""

    life: Life
    started: float  # the daemon's monotonic clock
    loads_since: float | None  # when its loading began; None: it waits for a host with a free GPU
    pid: int | None = None  # where it runs
    host: str | None = None
    info: EngineInfo | None = None  # set once it is warm
    stage: str = "starting"
    killed: str | None = None  # why we killed it
    timed_out: bool = False  # it was killed because it was overdue
    gone: Gone | None = None  # what a relay said of its end
    in_hand: dict[int, InHand] = field(default_factory=dict)  # by ticket, in the order sent
    questions: dict[int, int] = field(default_factory=dict)  # CountTokens by ticket: how many
    _last_sign: float = 0.0  # when it last answered, or was asked after having nothing to do
    _killed_at: float = float("inf")
    _closed_at: float = float("inf")  # when its end of the pipe was found closed
    _heard: bytearray = field(default_factory=bytearray)  # the beginning of an answer
    _unsent: deque[memoryview | int] = field(default_factory=deque)  # messages and descriptors

    @property
    def is_ready(self) -> bool:
        """Whether it is loaded and warm."""
        return self.info is not None

    def readers(self) -> list[int]:
        """What to wait on: its answers and its death."""
        ends = self.life.ends()
        if ends and self._closed_at < float("inf"):
            return ends  # a closed pipe is readable for ever
        return [self.life.socket.fileno(), *ends]

    def writers(self) -> list[int]:
        """What to wait on until it takes more; then `flush`."""
        return [self.life.socket.fileno()] if self._unsent else []

    def has_ended(self) -> bool:
        """Whether it is dead."""
        return self.life.has_ended()

    def how_it_ended(self) -> str:
        """`killed by SIGSEGV`, `the host gpu7 is gone`."""
        return self.gone.how if self.gone else self.life.how_it_ended()

    @property
    def is_lost(self) -> bool:
        """Whether its host or the way there ended, which is no image's fault; we did not kill it."""
        if self.killed:
            return False
        return self.gone.is_lost if self.gone else self.life.is_lost

    def render(self, ticket: int, render: Render, now: float) -> None:
        """Send one image with fresh memory for its pixels; `begin` follows.

        A dead engine is noticed by `has_ended`.

        Raises OSError: out of descriptors or memory; nothing was sent.
        """
        spec = render.spec
        size = spec.height * spec.width * 3
        memory = os.memfd_create("promptdrop-pixels", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, size)
            pixels = mmap.mmap(memory, size)
        except OSError:
            os.close(memory)
            raise
        self._expect(now)
        self.in_hand[ticket] = InHand(spec, pixels, last_sign=now)
        self.send(render, memory)

    def begin(self) -> None:
        """Nothing more is sent now: what waits may be rendered."""
        self.send(Begin())

    def cancel(self, ticket: int) -> None:
        """Ask to stop an image at its next step."""
        self.send(Cancel(ticket))

    def count_tokens(self, ticket: int, prompts: tuple[str, ...], now: float) -> None:
        """Ask how long prompts are."""
        self._expect(now)
        self.questions[ticket] = len(prompts)
        self.send(CountTokens(ticket, prompts))

    def stop(self) -> None:
        """Ask to end after what was sent before."""
        self.send(Stop())

    def flush(self) -> None:
        """Send what the pipe takes now."""
        try:
            while self._unsent:
                first = self._unsent[0]
                if isinstance(first, int):  # as multiprocessing.reduction.recv_handle expects it
                    socket.send_fds(self.life.socket, [b"\1"], [first])
                    os.close(first)
                    self._unsent.popleft()
                elif rest := first[self.life.socket.send(first) :]:
                    self._unsent[0] = rest
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            pass  # it reads slowly, or not at all: `writers` says when to go on
        except OSError:
            self._forget_unsent()  # it is dead; the loop notices by its pidfd

    def answers(self, now: float) -> Iterator[Answer]:
        """What the engine has said since the last call; each sign of life moves its deadline.

        An engine that says what no engine says is broken: it is killed.
        """
        self._listen(now)
        while not self.killed and (frame := self._next_frame(now)) is not None:
            try:
                answer = pickle.loads(frame)
            except Exception as e:  # unpickling nonsense may raise anything at all
                self.kill(f"the engine said what cannot be read: {e}", now)
                return
            if not self._is_sound(answer):
                self.kill(f"the engine gave an answer to nothing: {type(answer).__name__}", now)
                return
            self._last_sign = now
            if self._note(answer, now):
                yield answer

    def overdue(self, now: float, limits: Limits) -> str | None:
        """Why the engine must be killed now, or None."""
        if now > self._closed_at + REAP_SECONDS:
            return "closed its end of the pipe and did not end"
        if not self.is_ready:
            if self.loads_since is not None and now > self.loads_since + limits.load:
                return f"not loaded and warm within {limits.load:g} s (engine.load_timeout_seconds)"
            return None
        for image, began in self._begun():
            if now > began + image.timeout_seconds + limits.grace:
                return f"no answer {limits.grace:g} s after the image's {image.timeout_seconds:g} s (timeout_seconds, engine.kill_grace_seconds)"
            if limits.stall is not None and now > image.last_sign + limits.stall:
                return f"silent for {limits.stall:g} s between steps (engine.stall_seconds)"
        if self._must_begin() and now > self._last_sign + limits.begin:
            return f"silent for {limits.begin:g} s and did not begin what it was asked (engine.stall_seconds, engine.image_timeout_seconds)"
        return None

    def next_deadline(self, limits: Limits) -> float:
        """When `overdue` or `outlives_kill` may first have something to say, on the daemon's monotonic clock."""
        if self.killed:
            return self._killed_at + REAP_SECONDS
        deadlines = [self._closed_at + REAP_SECONDS]
        if not self.is_ready:
            since = float("inf") if self.loads_since is None else self.loads_since
            return min(since + limits.load, deadlines[0])
        if self._must_begin():
            deadlines.append(self._last_sign + limits.begin)
        for image, began in self._begun():
            deadlines.append(began + image.timeout_seconds + limits.grace)
            if limits.stall is not None:
                deadlines.append(image.last_sign + limits.stall)
        return min(deadlines)

    def kill(self, reason: str, now: float, timed_out: bool = False) -> None:
        """End it at once; returns at once. The first reason stands."""
        if not self.killed:
            self.killed, self._killed_at, self.timed_out = reason, now, timed_out
        self.life.kill()

    def outlives_kill(self, now: float) -> bool:
        """Whether it was killed and is still there: in uninterruptible sleep, which nobody ends."""
        return now >= self._killed_at + REAP_SECONDS

    def reap(self) -> bool:
        """Kill, wait a bounded time, and close. False: it is in uninterruptible sleep."""
        self._forget_unsent()
        return self.life.reap(REAP_SECONDS)

    def _begun(self) -> list[tuple[InHand, float]]:
        images = self.in_hand.values()
        return [(image, image.began) for image in images if image.began is not None]

    def _must_begin(self) -> bool:
        return bool(self.in_hand or self.questions) and not self._begun()

    def _expect(self, now: float) -> None:
        """The silence before it had anything to do does not count."""
        if not (self.in_hand or self.questions):
            self._last_sign = now

    def _listen(self, now: float) -> None:
        """Read what is there, at most as much as one answer may be long."""
        try:
            while len(self._heard) <= _ANSWER_LIMIT:
                chunk = self.life.socket.recv(_CHUNK)
                if not chunk:
                    self._closed_at = min(self._closed_at, now)  # it is dying, or will be killed
                    return
                self._heard += chunk
        except BlockingIOError:
            pass  # all was read
        except OSError:
            return  # reset by its death; `has_ended` will say how

    def _next_frame(self, now: float) -> bytes | None:
        """One whole answer, or None: the rest has not come yet."""
        if len(self._heard) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._heard)
        if not 0 <= length <= _ANSWER_LIMIT - _LENGTH.size:
            self.kill(f"the engine announced an answer of {length} bytes", now)
            return None
        end = _LENGTH.size + length
        if len(self._heard) < end:
            return None
        frame = bytes(self._heard[_LENGTH.size : end])
        del self._heard[:end]
        return frame

    def _is_sound(self, answer: object) -> bool:
        """Whether it is an answer that this engine can give now."""
        if isinstance(answer, Tokens):
            asked = self.questions.get(answer.ticket)
            return asked is None or asked == len(answer.counts)
        if isinstance(answer, Ready):
            return isinstance(answer.info, EngineInfo) and not self.is_ready
        if isinstance(answer, Rendered):
            image = self.in_hand.get(answer.ticket)
            began = image is None or image.began is not None
            return began and isinstance(answer.rendering, Rendering)
        return isinstance(answer, Answer)

    def _note(self, answer: Answer, now: float) -> bool:
        """Keep the books. False: the answer is about an image nobody sent."""
        if isinstance(answer, Stage):
            self.stage = answer.text
        elif isinstance(answer, Placed):
            self.host, self.pid, self.loads_since = answer.host, answer.pid, now
        elif isinstance(answer, Gone):
            self.gone = answer
        elif isinstance(answer, Ready):
            self.info = answer.info
        elif isinstance(answer, Tokens):
            self.questions.pop(answer.ticket, None)
        elif isinstance(answer, CannotStart):
            pass  # the daemon ends
        elif answer.ticket not in self.in_hand:
            return False
        elif isinstance(answer, Began):
            image = self.in_hand[answer.ticket]
            image.began = image.last_sign = now
            image.batch = answer.images
        elif isinstance(answer, Step):
            for image, _ in self._begun():
                image.last_sign, image.step = now, answer.step
                image.is_shared = answer.prepares
        return True

    def take(self, answer: Rendered | Failed | Cancelled) -> InHand:
        """The image an answer ends; it is in the engine's hand no more."""
        return self.in_hand.pop(answer.ticket)

    def send(self, message: object, descriptor: int | None = None) -> None:
        """Send a message; the descriptor that goes with it is closed once it is sent."""
        data = pickle.dumps(message)
        self._unsent.append(memoryview(_LENGTH.pack(len(data)) + data))
        if descriptor is not None:
            self._unsent.append(descriptor)
        self.flush()

    def _forget_unsent(self) -> None:
        for unsent in self._unsent:
            if isinstance(unsent, int):
                os.close(unsent)
        self._unsent.clear()
