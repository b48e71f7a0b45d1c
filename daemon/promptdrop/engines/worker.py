"""The main loop of the engine process: load, warm up, render until told to stop.

The daemon starts it as `python -m promptdrop.engines.worker FD [LOG]`; the configuration is the first
message on FD, lines of the log go to descriptor LOG, else to stderr. An exception that is not one of ours escapes and ends this process: after an unknown CUDA error
every later call fails too, and only a new process helps.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

from promptdrop import log
from promptdrop.config import Config
from promptdrop.engines import engine
from promptdrop.engines.alarm import Alarm
from promptdrop.engines.engine import Engine
from promptdrop.errors import (
    ConfigError,
    EngineError,
    EngineStartError,
    ImageCancelled,
    ImageTimeout,
)
from promptdrop.metrics import Nvml
from promptdrop.nouns import Rendering
from promptdrop.pool.messages import (
    Answer,
    Began,
    Begin,
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

_PR_SET_PDEATHSIG = 1  # prctl(2)
_STAGE_SECONDS = 1.0  # warm-up reports its steps at most this often


@dataclass(frozen=True, slots=True)
class Image:
    """An image that was asked for, and the descriptor of the memory for its pixels."""

    render: Render
    memory: int

    def is_like(self, other: "Image") -> bool:
        """Whether the two may be rendered together."""
        kind = self.render.kind
        return kind is not None and kind == other.render.kind


class Line:
    """The engine's end of the pipe. A thread reads it, so that a Cancel is seen during a render."""

    def __init__(self, connection: Connection, on_end: Callable[[], None]) -> None:
        """on_end: called, in that thread, once the daemon has closed its end."""
        self._connection, self._on_end = connection, on_end
        self._waiting: deque[Image | CountTokens | Stop] = deque()
        self._arriving: list[Image] = []  # images that wait for a Begin
        self._cancelled: set[int] = set()  # tickets of images that were begun
        self._changed = threading.Condition()
        self._sending = threading.Lock()

    def listen(self) -> None:
        """Begin to read requests."""
        threading.Thread(target=self._read, name="inbound", daemon=True).start()

    def send(self, answer: Answer) -> None:
        """Send an answer.

        Thread: any.
        """
        with self._sending:
            self._connection.send(answer)

    def next(self, most: int) -> list[Image] | CountTokens | Stop:
        """Wait for the next request. An image comes with others of its kind, at most `most` in all."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            first = self._waiting[0]
            if not isinstance(first, Image):
                self._waiting.popleft()
                return first
            images = self._first_images(most)
            for image in images:
                self._waiting.remove(image)
            return images

    def coming(self, most: int) -> list[Image]:
        """Return the images that would be rendered next if no other came."""
        with self._changed:
            return self._first_images(most)

    def is_cancelled(self, ticket: int) -> bool:
        """Whether the daemon has cancelled this image, which was begun."""
        return ticket in self._cancelled

    def _first_images(self, most: int) -> list[Image]:
        images = [one for one in self._waiting if isinstance(one, Image)]
        return [one for one in images if one is images[0] or one.is_like(images[0])][:most]

    def _read(self) -> None:
        """Read requests, in a thread of its own, until the daemon closes its end."""
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, Cancel):
                    self._cancel(message.ticket)
                elif isinstance(message, Render):
                    self._arriving.append(Image(message, recv_handle(self._connection)))
                else:
                    self._let_begin(*([] if isinstance(message, Begin) else [message]))
        except (EOFError, OSError):
            self._on_end()

    def _let_begin(self, *requests: CountTokens | Stop) -> None:
        """Queue the images that have arrived, then these requests."""
        with self._changed:
            self._waiting += [*self._arriving, *requests]
            self._changed.notify()
        self._arriving = []

    def _cancel(self, ticket: int) -> None:
        """Answer at once if the image has not begun; otherwise remember that it is cancelled."""
        with self._changed:
            for request in self._waiting:
                if isinstance(request, Image) and request.render.ticket == ticket:
                    self._waiting.remove(request)
                    os.close(request.memory)
                    break
            else:
                self._cancelled.add(ticket)
                return
        self.send(Cancelled(ticket))


class Ahead:
    """Encodes the texts of the images that come next, while others are rendered.

    It does so in the step callback, on the same thread and CUDA stream. The callback runs when the device
    has just begun a whole evaluation, so that the device does not wait for the launches of an encoding,
    which take longer than the encoding itself. It encodes one text a step, so that the device has work all the time.
    """

    def __init__(self, warm: Engine, line: Line, most: int) -> None:
        self._warm, self._line, self._most = warm, line, most
        self._prepared: set[int] = set()  # tickets

    @property
    def has_prepared(self) -> bool:
        """Whether any text was encoded in the time of the images in hand."""
        return bool(self._prepared)

    def coming(self) -> Image | None:
        """Return the next image whose text is to be encoded. Images that may be poison are left out."""
        for image in self._line.coming(self._most):
            if image.render.kind is not None and image.render.ticket not in self._prepared:
                return image
        return None

    def prepare(self, image: Image) -> None:
        """Encode an image's text. An error here may be that image's fault."""
        self._prepared.add(image.render.ticket)
        self._warm.prepare(image.render.spec, image.render.prompt)


def main(fd: int, lines: int | None = None) -> None:
    """Entry point of the engine process. Any escaping exception ends it."""
    die_with_parent()
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the daemon decides when we stop
    connection = Connection(fd)
    config: Config = connection.recv()
    if lines is not None:
        log.write_to(lines)
    log.set_up(config.log.level, config.log.format)
    # Once the daemon is gone, nobody wants what is being rendered.
    serve(config, Line(connection, on_end=lambda: os._exit(0)))


def serve(config: Config, line: Line) -> None:
    """Load the engine, warm it up, and answer requests until a Stop.

    Raises SystemExit: the engine cannot start; the daemon was told why.
    """
    line.listen()
    warm = _start(config, line.send)
    _answer(warm, Nvml(warm.info.device_index), line, config.engine.batch)


def _start(config: Config, send: Callable[[Answer], None]) -> Engine:
    """Load the engine and warm it up. Raises SystemExit: it cannot start."""
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
    """Make an on_step for the warm-up that sends a sign of life, at most once in _STAGE_SECONDS."""
    last = 0.0

    def report() -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _STAGE_SECONDS:
            last = now
            send(Stage("warming up"))

    return report


def _answer(warm: Engine, nvml: Nvml, line: Line, most: int) -> None:
    """Answer requests until a Stop."""
    while not isinstance(request := line.next(most), Stop):
        if isinstance(request, CountTokens):
            line.send(Tokens(request.ticket, tuple(warm.count_tokens(list(request.prompts)))))
            continue
        try:
            wanted = [image for image in request if not line.is_cancelled(image.render.ticket)]
            for image in request:
                if image not in wanted:
                    line.send(Cancelled(image.render.ticket))
            if wanted:
                _render(warm, nvml, wanted, line, most)
        finally:
            for image in request:
                os.close(image.memory)
        if any(image.render.empty_cache for image in request):
            warm.empty_cache()


def _render(warm: Engine, nvml: Nvml, images: list[Image], line: Line, most: int) -> None:
    """Render images together, and answer for each. One that is cancelled meanwhile is still rendered."""
    tickets = [image.render.ticket for image in images]
    for ticket in tickets:
        line.send(Began(ticket, len(images)))
    seconds = sum(image.render.spec.timeout_seconds for image in images)
    results: list[Rendering | Failed]
    may_be_poison = images[0].render.kind is None
    ahead = Ahead(warm, line, 0 if may_be_poison else most)
    try:
        results = _results(warm, images, line, seconds, ahead)
    except ImageCancelled:
        pass  # all were cancelled, which is answered below
    except ImageTimeout:
        many = f" for {len(images)} images together" if len(images) > 1 else ""
        error = f"took longer than {seconds:g} s{many} (timeout_seconds)"
        worked_on = len(images) + ahead.has_prepared
        results = [Failed(ticket, error, timed_out=True, images=worked_on) for ticket in tickets]
    except EngineError as e:
        results = [Failed(ticket, str(e), images=len(images)) for ticket in tickets]
    for n, ticket in enumerate(tickets):
        if line.is_cancelled(ticket):
            line.send(Cancelled(ticket))
        elif isinstance(result := results[n], Failed):
            line.send(result)
        else:
            used = nvml.utilization_percent()
            line.send(Rendered(ticket, replace(result, utilization_percent=used)))


def _results(
    warm: Engine, images: list[Image], line: Line, seconds: float, ahead: Ahead
) -> list[Rendering | Failed]:
    """Render images together. Returns the result of each.

    Raises ImageTimeout, EngineError: all of them failed. ImageCancelled: all of them were cancelled.
    """
    tickets = [image.render.ticket for image in images]
    alarm = Alarm(seconds)

    def on_step(step: int, steps: int) -> None:
        coming = ahead.coming() if step < steps else None
        line.send(Step(tickets[0], step, steps, prepares=coming is not None))
        if all(map(line.is_cancelled, tickets)):
            raise ImageCancelled
        if alarm.is_over:  # its exception was swallowed by a destructor or a bare except
            raise ImageTimeout
        if coming:
            ahead.prepare(coming)

    with ExitStack() as stack:
        stack.enter_context(alarm)
        buffers = [stack.enter_context(_pixels(image)) for image in images]
        specs = [image.render.spec for image in images]
        results = warm.render(specs, images[0].render.prompt, on_step, buffers)
    return [
        Failed(ticket, str(result)) if isinstance(result, EngineError) else result
        for ticket, result in zip(tickets, results, strict=True)
    ]


@contextmanager
def _pixels(image: Image) -> Iterator[memoryview]:
    """Map the memory for an image's pixels: uint8 [height, width, 3]."""
    size = image.render.spec.height * image.render.spec.width * 3
    with mmap.mmap(image.memory, size) as pixels, memoryview(pixels) as buffer:
        yield buffer


def die_with_parent() -> None:
    """Have the kernel kill this process when the daemon's main thread ends, even in a C call."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        os._exit(0)  # the daemon had ended before the call


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
