"""Engines and a backend that do what a test tells them to, without a process."""

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

from promptdrop.config import Config
from promptdrop.nouns import EngineInfo
from promptdrop.pool.link import EngineLink
from promptdrop.pool.messages import Answer, Began, Render
from promptdrop.pool.pool import Slot

INFO = EngineInfo("gradient", None, "float32", "none", False, "cpu")


class ScriptedEngine:
    """The far end of a link, and its life: it says and does what a test tells it to."""

    def __init__(self) -> None:
        self.is_lost = False
        self.is_stubborn = False  # it outlives a kill
        self.socket, end = socket.socketpair()
        self.socket.setblocking(False)
        self._end = Connection(end.detach())
        self._is_dead = False

    def say(self, *answers: Answer) -> None:
        """Send answers to the daemon."""
        for answer in answers:
            self._end.send(answer)

    def say_bytes(self, data: bytes) -> None:
        """Send raw bytes, which need not be a message."""
        os.write(self._end.fileno(), data)

    def close_pipe(self) -> None:
        """Close the pipe, and live on."""
        self._end.close()

    def heard(self) -> list[Any]:
        """Every message since the last call."""
        messages = []
        while self._end.poll():
            messages.append(self._end.recv())
            if isinstance(messages[-1], Render):
                os.close(recv_handle(self._end))
        return messages

    def heard_while(self, flush: Callable[[], None]) -> list[Any]:
        """Every message of a daemon whose pipe is full: a thread reads while `flush` goes on sending."""
        messages: list[Any] = []
        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(self.heard)
            while not reading.done():
                flush()
            messages += reading.result()
        return messages

    def renders(self) -> list[Render]:
        """Every image that was sent since the last call."""
        return [message for message in self.heard() if isinstance(message, Render)]

    def begin(self, images: int | None = None) -> list[int]:
        """Begin the first `images` of those that were sent, as one batch. Returns their tickets."""
        tickets = [render.ticket for render in self.renders()][:images]
        self.say(*(Began(ticket, len(tickets)) for ticket in tickets))
        return tickets

    def die(self) -> None:
        """End without a word."""
        self._is_dead = True

    # --- what the link asks of a life ---

    def ends(self) -> list[int]:
        return []

    def has_ended(self) -> bool:
        return self._is_dead

    def how_it_ended(self) -> str:
        return "exit status 3"

    def kill(self) -> None:
        self._is_dead = not self.is_stubborn

    def reap(self, seconds: float) -> bool:
        self.socket.close()
        self._end.close()
        return not self.is_stubborn


class ScriptedBackend:
    """Starts scripted engines; the last life of each slot stands in `engines`."""

    may_begin = True
    trouble: str | None = None

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.engines: dict[int, ScriptedEngine] = {}  # by number of the slot
        self.begun = 0
        self.refusals: list[OSError] = []  # raised by the next calls of `begin`
        self._slots, self._clock = slots, clock

    def wanted(self, slots: list[Slot]) -> int:
        return self._slots

    def begin(self, slot: Slot, settings: Config) -> EngineLink:
        if self.refusals:
            raise self.refusals.pop(0)
        self.begun += 1
        life = self.engines[slot.number] = ScriptedEngine()
        now = self._clock()
        return EngineLink(life, now, now, self.begun)

    def is_hopeless(self, slots: list[Slot]) -> bool:
        return all(slot.link is None or slot.trouble for slot in slots)

    def readers(self) -> list[int]:
        return []

    def hear(self, now: float) -> None:
        pass

    def next_deadline(self) -> float:
        return float("inf")

    def move_deadlines(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass
