"""The daemon's link to one life of an engine, wherever it runs: talk to it, notice silence, kill it.

Nothing here waits for the engine, which may stop in the middle of a message or read none. At the other
end is a multiprocessing.connection.Connection, whose frames are a length and a pickle.
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
class Held:
    """An image that the engine has been sent."""

    spec: ImageSpec
    pixels: mmap.mmap
    began: float | None = None  # seconds of the daemon's monotonic clock; None: it waits
    batch: int = 1  # how many images were begun together
    last_sign: float = 0.0  # when it began or did its last step
    step: int = 0
    is_shared: bool = False  # since its last step the text of another image is encoded, too
    recalled: bool = False  # it was asked back, for another engine
    away: float = 0.0  # seconds since it began in which the daemon stood still

    @property
    def timeout_seconds(self) -> float:
        """Seconds for the whole batch: the image's timeout times the images begun together."""
        return self.spec.timeout_seconds * self.batch

    def timed_out(self, began: float, grace: float) -> float:
        """Return when its time is over, and `grace` with it, on the daemon's monotonic clock."""
        return began + self.away + self.timeout_seconds + grace


@dataclass(slots=True)
class Limits:
    """Seconds that the engine may be silent. Made anew for each check, so that SIGHUP can change them."""

    load: float  # until it is warm
    grace: float  # after an image's timeout
    stall: float | None  # between two steps of an image; None: no limit
    begin: float  # until it begins one of the images or questions in hand


class Life(Protocol):
    """The other end of a link: a process of this machine, or a relay to another machine's."""

    socket: socket.socket  # not blocking
    is_lost: bool  # whether an end that it does not explain means a lost host: no image's fault

    def ends(self) -> list[int]:
        """Descriptors that become readable when it ends. Empty: it has ended when the socket has."""

    def has_ended(self) -> bool:
        """Whether it is dead. Answers that it sent before may still be read."""

    def how_it_ended(self) -> str:
        """Say how it ended, for log and job: `killed by SIGSEGV`, `exit status 3`."""

    def kill(self) -> None:
        """End it at once, without waiting for its end."""

    def reap(self, seconds: float) -> bool:
        """Kill it, wait at most so long for its end, and close. False: it does not end."""


@dataclass(slots=True)
class EngineLink:
    """One engine, from its start until it is reaped. The engine's next life is another object."""

    life: Life
    started: float  # seconds of the daemon's monotonic clock
    loads_since: float | None  # when it began to load; None: it waits for a host with a free GPU
    pid: int | None = None  # on its host
    host: str | None = None
    info: EngineInfo | None = None  # set once it is warm
    stage: str = "starting"
    killed: str | None = None  # why the daemon killed it
    timed_out: bool = False  # it was killed because it was overdue
    gone: Gone | None = None  # its end, as a relay has reported it
    in_hand: dict[int, Held] = field(default_factory=dict)  # by ticket, in the order sent
    questions: dict[int, int] = field(default_factory=dict)  # by ticket: prompts to be counted
    _last_sign: float = 0.0  # when it last answered, or was asked while it had nothing to do
    _killed_at: float = float("inf")
    _closed_at: float = float("inf")  # when its end of the pipe was found closed
    _heard: bytearray = field(default_factory=bytearray)  # answers, the last one not whole yet
    _unsent: deque[memoryview | int] = field(default_factory=deque)  # messages and descriptors

    @property
    def is_ready(self) -> bool:
        """Whether it is loaded and warm."""
        return self.info is not None

    def readers(self) -> list[int]:
        """Descriptors that become readable when it answers or dies."""
        ends = self.life.ends()
        if ends and self._closed_at < float("inf"):
            return ends  # a closed pipe is always readable
        return [self.life.socket.fileno(), *ends]

    def writers(self) -> list[int]:
        """Descriptors that become writable when it takes more of what is unsent; then `flush`."""
        return [self.life.socket.fileno()] if self._unsent else []

    def has_ended(self) -> bool:
        """Whether it is dead."""
        return self.life.has_ended()

    def how_it_ended(self) -> str:
        """Say how it ended: `killed by SIGSEGV`, `the host gpu7 is gone`."""
        return self.gone.how if self.gone else self.life.how_it_ended()

    @property
    def is_lost(self) -> bool:
        """Whether its host or the way there was lost, which is no image's fault.

        False for an engine that the daemon killed.
        """
        if self.killed:
            return False
        return self.gone.is_lost if self.gone else self.life.is_lost

    def render(self, ticket: int, render: Render, now: float) -> None:
        """Send one image, with new memory for its pixels. `begin` has to follow.

        Sending to a dead engine is no error: `has_ended` tells.

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
        self.in_hand[ticket] = Held(spec, pixels, last_sign=now)
        self.send(render, memory)

    def begin(self) -> None:
        """Say that nothing more is sent now: the images that wait may be rendered."""
        self.send(Begin())

    def cancel(self, ticket: int) -> None:
        """Ask to stop an image at its next step, or to skip it."""
        self.send(Cancel(ticket))

    def count_tokens(self, ticket: int, prompts: tuple[str, ...], now: float) -> None:
        """Ask how many tokens prompts have."""
        self._expect(now)
        self.questions[ticket] = len(prompts)
        self.send(CountTokens(ticket, prompts))

    def stop(self) -> None:
        """Ask to end once all that was sent before is done."""
        self.send(Stop())

    def flush(self) -> None:
        """Send as much of the unsent as the pipe takes now."""
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
            pass  # it reads slowly, or not at all; `writers` says when to go on
        except OSError:
            self._forget_unsent()  # it is dead; `has_ended` will tell

    def answers(self, now: float) -> Iterator[Answer]:
        """Yield the answers since the last call. Each of them moves the engine's deadline.

        An engine that sends anything else is broken, and is killed.
        """
        self._listen(now)
        while not self.killed and (frame := self._next_frame(now)) is not None:
            try:
                answer = pickle.loads(frame)
            except Exception as e:  # unpickling nonsense may raise any error
                self.kill(f"the engine said what cannot be read: {e}", now)
                return
            if not self._is_sound(answer):
                self.kill(f"the engine gave an answer to nothing: {type(answer).__name__}", now)
                return
            self._last_sign = now
            if self._note(answer, now):
                yield answer

    def overdue(self, now: float, limits: Limits) -> str | None:
        """Return the reason to kill the engine now; None if there is none."""
        if now > self._closed_at + REAP_SECONDS:
            return "closed its end of the pipe and did not end"
        if not self.is_ready:
            if self.loads_since is not None and now > self.loads_since + limits.load:
                return f"not loaded and warm within {limits.load:g} s (engine.load_timeout_seconds)"
            return None
        for held, began in self._begun():
            if now > held.timed_out(began, limits.grace):
                return f"no answer {limits.grace:g} s after the image's {held.timeout_seconds:g} s (timeout_seconds, engine.kill_grace_seconds)"
            if limits.stall is not None and now > held.last_sign + limits.stall:
                return f"silent for {limits.stall:g} s between steps (engine.stall_seconds)"
        if self._must_begin() and now > self._last_sign + limits.begin:
            return f"silent for {limits.begin:g} s and did not begin what it was asked (engine.stall_seconds, engine.image_timeout_seconds)"
        return None

    def next_deadline(self, limits: Limits) -> float:
        """Return the earliest time, on the daemon's monotonic clock, at which a limit passes.

        Before it, `overdue` and `outlives_kill` stay as they are if nothing happens.
        """
        if self.killed:
            return self._killed_at + REAP_SECONDS
        deadlines = [self._closed_at + REAP_SECONDS]
        if not self.is_ready:
            since = float("inf") if self.loads_since is None else self.loads_since
            return min(since + limits.load, deadlines[0])
        if self._must_begin():
            deadlines.append(self._last_sign + limits.begin)
        for held, began in self._begun():
            deadlines.append(held.timed_out(began, limits.grace))
            if limits.stall is not None:
                deadlines.append(held.last_sign + limits.stall)
        return min(deadlines)

    def move_deadlines(self, seconds: float) -> None:
        """Let every limit pass so much later: the daemon stood still, and perhaps the engine with it."""
        if self.loads_since is not None:
            self.loads_since += seconds
        self._last_sign += seconds
        self._killed_at += seconds
        self._closed_at += seconds
        for held in self.in_hand.values():
            held.last_sign += seconds
        for held, _ in self._begun():
            held.away += seconds

    def kill(self, reason: str, now: float, timed_out: bool = False) -> None:
        """Kill it, without waiting for its end. If it was killed before, the first reason stands."""
        if not self.killed:
            self.killed, self._killed_at, self.timed_out = reason, now, timed_out
        self.life.kill()

    def outlives_kill(self, now: float) -> bool:
        """Whether it was killed REAP_SECONDS ago and is still there: in uninterruptible sleep."""
        return now >= self._killed_at + REAP_SECONDS

    def reap(self) -> bool:
        """Kill it, wait at most REAP_SECONDS, and close. False: it is in uninterruptible sleep."""
        self._forget_unsent()
        return self.life.reap(REAP_SECONDS)

    def _begun(self) -> list[tuple[Held, float]]:
        """List the images being rendered, each with when it began."""
        images = self.in_hand.values()
        return [(held, held.began) for held in images if held.began is not None]

    def _must_begin(self) -> bool:
        """Whether it has work and has begun no image yet."""
        return bool(self.in_hand or self.questions) and not self._begun()

    def _expect(self, now: float) -> None:
        """Start the clock of its silence, if it had nothing to do before."""
        if not (self.in_hand or self.questions):
            self._last_sign = now

    def _listen(self, now: float) -> None:
        """Read what has come, at most the length of the longest answer."""
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
        """Return the bytes of the next answer; None if it is not whole yet."""
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
        """Whether this engine can give this answer now."""
        if isinstance(answer, Tokens):
            asked = self.questions.get(answer.ticket)
            return asked is None or asked == len(answer.counts)
        if isinstance(answer, Ready):
            return isinstance(answer.info, EngineInfo) and not self.is_ready
        if isinstance(answer, Rendered):
            held = self.in_hand.get(answer.ticket)
            began = held is None or held.began is not None
            return began and isinstance(answer.rendering, Rendering)
        return isinstance(answer, Answer)

    def _note(self, answer: Answer, now: float) -> bool:
        """Keep what an answer says. Returns False if it is about an image that is not in hand."""
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
            held = self.in_hand[answer.ticket]
            held.began = held.last_sign = now
            held.batch = answer.images
        elif isinstance(answer, Step):
            for held, _ in self._begun():
                held.last_sign, held.step = now, answer.step
                held.is_shared = answer.prepares
        return True

    def take(self, answer: Rendered | Failed | Cancelled) -> Held:
        """Remove the image that an answer ends from the engine's hand, and return it."""
        return self.in_hand.pop(answer.ticket)

    def send(self, message: object, descriptor: int | None = None) -> None:
        """Send a message, and a descriptor with it, which is closed once it is sent."""
        data = pickle.dumps(message)
        self._unsent.append(memoryview(_LENGTH.pack(len(data)) + data))
        if descriptor is not None:
            self._unsent.append(descriptor)
        self.flush()

    def _forget_unsent(self) -> None:
        """Drop what is unsent, and close its descriptors."""
        for unsent in self._unsent:
            if isinstance(unsent, int):
                os.close(unsent)
        self._unsent.clear()
