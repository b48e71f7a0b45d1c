"""The engine process: load, warm up, render until told to stop. It may die at any moment.

Started by the daemon as `python -m promptdrop.worker FD`, with the configuration as the first
message on FD. Any exception that is not one of ours escapes and ends this process: after an
unknown CUDA error every later call fails too, so the only cure is a new process.
"""

import ctypes
import faulthandler
import gc
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import NoReturn

from promptdrop import engine, log
from promptdrop.config import Config
from promptdrop.engine import Engine
from promptdrop.errors import (
    ConfigError,
    EngineError,
    EngineStartError,
    ImageCancelled,
    ImageTimeout,
)
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
    Tokens,
)
from promptdrop.metrics import Nvml

_PR_SET_PDEATHSIG = 1  # prctl(2)
_STAGE_SECONDS = 1.0  # warm-up reports its steps at most this often


class Line:
    """The engine's end of the pipe. Read by a thread, so that a Cancel overtakes the render in hand."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[tuple[Render, int] | CountTokens | Stop] = deque()
        self._cancelled: set[int] = set()  # images that were begun
        self._changed = threading.Condition()
        self._sending = threading.Lock()

    def listen(self) -> None:
        """Begin to read requests."""
        threading.Thread(target=self._read, name="inbound", daemon=True).start()

    def send(self, answer: Answer) -> None:
        """From any thread."""
        with self._sending:
            self._connection.send(answer)

    def next(self) -> tuple[Render, int] | CountTokens | Stop:
        """Wait for the next request; a Render with the descriptor of its memory."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            return self._waiting.popleft()

    def is_cancelled(self, ticket: int) -> bool:
        """Whether the daemon does not want this image any more."""
        return ticket in self._cancelled

    def _read(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, Cancel):
                    self._cancel(message.ticket)
                    continue
                request = message
                if isinstance(message, Render):
                    request = message, recv_handle(self._connection)
                with self._changed:
                    self._waiting.append(request)
                    self._changed.notify()
        except (EOFError, OSError):
            os._exit(0)  # the daemon is gone; nobody wants what is being rendered

    def _cancel(self, ticket: int) -> None:
        """What has not begun is given back now, however long the image in hand takes."""
        with self._changed:
            for request in self._waiting:
                if isinstance(request, tuple) and request[0].ticket == ticket:
                    self._waiting.remove(request)
                    os.close(request[1])
                    break
            else:
                self._cancelled.add(ticket)
                return
        self.send(Cancelled(ticket))


def main(fd: int) -> None:
    """Entry point of the engine process. Any escaping exception ends it."""
    die_with_parent()
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the daemon decides when we stop
    signal.signal(signal.SIGALRM, _raise_timeout)
    connection = Connection(fd)
    config: Config = connection.recv()
    log.set_up(config.log.level, config.log.format)
    line = Line(connection)
    line.listen()
    warm = _start(config, line.send)
    _serve(warm, Nvml(warm.info.device_index), line)


def _start(config: Config, send: Callable[[Answer], None]) -> Engine:
    try:
        loaded = engine.load(config, lambda text: send(Stage(text)))
        loaded.warm_up(_reporter(send))
    except (ConfigError, EngineStartError) as e:
        send(CannotStart(str(e), e.exit_status))
        sys.exit(e.exit_status)
    except EngineError as e:
        send(CannotStart(f"warm-up failed: {e}", 1))
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what is loaded stays: later collections need not look at a million objects
    loaded.info = replace(loaded.info, host=socket.gethostname())
    send(Ready(loaded.info))
    return loaded


def _reporter(send: Callable[[Answer], None]) -> Callable[[], None]:
    last = 0.0

    def report() -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _STAGE_SECONDS:
            last = now
            send(Stage("warming up"))

    return report


def _serve(warm: Engine, nvml: Nvml, line: Line) -> None:
    while not isinstance(request := line.next(), Stop):
        if isinstance(request, CountTokens):
            line.send(Tokens(request.ticket, tuple(warm.count_tokens(list(request.prompts)))))
            continue
        render, memory = request
        try:
            _render(warm, nvml, render, memory, line)
        finally:
            os.close(memory)
        if render.empty_cache:
            warm.empty_cache()


def _render(warm: Engine, nvml: Nvml, render: Render, memory: int, line: Line) -> None:
    ticket, spec, send = render.ticket, render.spec, line.send
    if line.is_cancelled(ticket):
        send(Cancelled(ticket))
        return
    send(Began(ticket))
    deadline = time.monotonic() + spec.timeout_seconds

    def on_step(step: int, steps: int) -> None:
        send(Step(ticket, step, steps))
        if line.is_cancelled(ticket):
            raise ImageCancelled
        if time.monotonic() > deadline:  # an alarm that a destructor or bare except swallowed
            raise ImageTimeout

    try:
        with (
            _alarm(spec.timeout_seconds),
            mmap.mmap(memory, spec.height * spec.width * 3) as pixels,
            memoryview(pixels) as buffer,
        ):
            rendering = engine.render_one(warm, spec, render.prompt, on_step, buffer)
    except ImageCancelled:
        send(Cancelled(ticket))
    except ImageTimeout:
        send(
            Failed(
                ticket,
                f"took longer than {spec.timeout_seconds:g} s (timeout_seconds)",
                timed_out=True,
            )
        )
    except EngineError as e:
        send(Failed(ticket, str(e)))
    else:
        rendering = replace(rendering, utilization_percent=nvml.utilization_percent())
        send(Rendered(ticket, rendering))


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """SIGALRM after `seconds`: raises within Python code; a C call delays it to its end."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _raise_timeout(number: int, frame: object) -> NoReturn:
    raise ImageTimeout


def die_with_parent() -> None:
    """SIGKILL us when the daemon's main thread ends, even while a C call holds the GIL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        os._exit(0)  # it ended before we asked


if __name__ == "__main__":
    main(int(sys.argv[1]))
