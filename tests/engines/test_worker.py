"""The engine process's main loop, driven in this process over a pair of sockets; gradients, no torch."""

import gc
import mmap
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

import pytest

from harness import FAST, PATIENCE_SECONDS, merged
from promptdrop import config
from promptdrop.config import Prompt
from promptdrop.engines import engine, worker
from promptdrop.nouns import ImageSpec
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
from specs import spec

# The worker's own alarms are SIGALRM's.
pytestmark = pytest.mark.timeout(120, method="thread")

React = Callable[[Answer], list[Any]]


class Peer:
    """The daemon's end of the pipe: it asks, and it reacts to answers by asking more."""

    def __init__(self, **changes: Any) -> None:
        self.config = config.parse(merged(FAST, changes))
        self.has_left = threading.Event()  # set once the worker has noticed that our end is closed
        ours, self._theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self._workers = Connection(os.dup(self._theirs.fileno()))
        self._line = worker.Line(self._workers, on_end=self.has_left.set)
        self._pixels: dict[int, mmap.mmap] = {}

    def serve(self, *requests: Any, react: React = lambda answer: []) -> list[Answer]:
        """Run the worker until it has answered a Stop. Returns all its answers.

        react: what to ask when an answer arrives; called in another thread.
        """
        answers: list[Answer] = []

        def converse() -> None:
            try:
                while True:
                    answers.append(self._connection.recv())
                    self._ask(react(answers[-1]))
            except EOFError:
                return

        self._ask(requests)
        reader = threading.Thread(target=converse)
        reader.start()
        try:
            worker.serve(self.config, self._line)
        finally:
            self._theirs.shutdown(socket.SHUT_WR)
            reader.join(PATIENCE_SECONDS)
        return answers

    def _ask(self, requests: Any) -> None:
        """Send requests; an image comes with memory for its pixels."""
        for request in requests:
            self._connection.send(request)
            if isinstance(request, Render):
                memory = os.memfd_create("test-pixels")
                size = request.spec.width * request.spec.height * 3
                os.ftruncate(memory, size)
                self._pixels[request.ticket] = mmap.mmap(memory, size)
                send_handle(self._connection, memory, os.getpid())
                os.close(memory)

    def pixels(self, ticket: int) -> bytes:
        """The bytes in the memory of an image."""
        return self._pixels[ticket][:]

    def leave(self) -> None:
        """Close our end, and wait until the worker has noticed it."""
        self._connection.close()
        assert self.has_left.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        """Leave, and close everything."""
        self.leave()
        self._workers.close()
        self._theirs.close()
        for pixels in self._pixels.values():
            pixels.close()


MakePeer = Callable[..., Peer]


@pytest.fixture
def make_peer() -> Iterator[MakePeer]:
    """`make_peer(...changes to config...)`; the process is put back as it was afterwards."""
    made: list[Peer] = []

    def make(**changes: Any) -> Peer:
        made.append(Peer(**changes))
        return made[-1]

    handler = signal.getsignal(signal.SIGALRM)
    yield make
    signal.signal(signal.SIGALRM, handler)
    gc.unfreeze()
    for peer in made:
        peer.close()


def render(
    ticket: int, prompt: str = "a cat", kind: tuple[Any, ...] | None = None, **fields: Any
) -> Render:
    """The request for an image, which is rendered alone unless it has a kind."""
    return Render(ticket, spec(prompt=prompt, **fields), Prompt(), kind, empty_cache=False)


def ends(answers: list[Answer]) -> list[Answer]:
    """The answers that end an image."""
    return [one for one in answers if isinstance(one, Rendered | Failed | Cancelled)]


def ticket_of(answer: Answer) -> Any:
    """The ticket of an answer; None for one that has none."""
    return getattr(answer, "ticket", None)


def drawn(asked: ImageSpec) -> bytes:
    """The pixels that the gradient engine draws without a worker."""
    loaded = engine.load(config.parse(FAST), lambda stage: None)
    pixels = bytearray(asked.width * asked.height * 3)
    engine.render_one(loaded, asked, Prompt(), lambda *step: None, memoryview(pixels))
    return bytes(pixels)


# From start to stop


def test_it_says_what_it_does_until_it_is_warm(make_peer: MakePeer) -> None:
    """It reports its stages, then that it is ready, with its model and host; a Stop ends it."""
    answers = make_peer().serve(Stop())

    assert answers[:3] == [Stage("importing"), Stage("loading weights"), Stage("warming up")]
    assert isinstance(answers[-1], Ready)
    assert answers[-1].info.host == socket.gethostname()


@pytest.mark.parametrize(
    ("revision", "error"),
    [
        ("!load-raise", "scripted by !load-raise"),
        ("!warm-raise", "warm-up failed: scripted by !raise"),
    ],
)
def test_an_engine_that_cannot_start_says_why_and_ends(
    make_peer: MakePeer, revision: str, error: str
) -> None:
    """It says with which exit status the daemon is to end, and ends itself."""
    peer = make_peer(model={"revision": revision})
    answers: list[Answer] = []
    with pytest.raises(SystemExit) as ended:
        peer.serve(react=lambda answer: answers.append(answer) or [])  # type: ignore[func-returns-value]  # None

    assert answers[-1] == CannotStart(error, 1)
    assert ended.value.code == 1


def test_it_ends_when_the_daemon_is_gone(make_peer: MakePeer) -> None:
    """It ends whatever it does just then, because nobody wants the result any more."""
    peer = make_peer()
    peer.serve(Stop())
    before = peer.has_left.is_set()
    peer.leave()

    assert not before


# Images


def test_images_are_rendered_in_order_into_their_memory(make_peer: MakePeer) -> None:
    """Each is begun, reports its steps, and ends."""
    peer = make_peer()
    answers = peer.serve(render(1, "a cat"), render(2, "a dog"), Begin(), Stop())
    first = [answer for answer in answers if ticket_of(answer) == 1]

    assert first[:3] == [Began(1, 1), Step(1, 1, 2), Step(1, 2, 2)]
    assert isinstance(first[3], Rendered)
    assert [ticket_of(end) for end in ends(answers)] == [1, 2]
    assert peer.pixels(1) == drawn(spec(prompt="a cat"))
    assert peer.pixels(2) == drawn(spec(prompt="a dog"))


def test_images_of_a_kind_are_rendered_together(make_peer: MakePeer) -> None:
    """The first image that waits takes others of its kind with it, up to `engine.batch`, past other kinds."""
    red, blue = ("red",), ("blue",)
    peer = make_peer(engine={"batch": 2})
    kinds = {1: red, 2: blue, 3: red, 4: red, 5: None, 6: None}
    images = [render(ticket, kind=kind) for ticket, kind in kinds.items()]
    answers = peer.serve(*images, Begin(), Stop())

    assert [answer for answer in answers if isinstance(answer, Began)] == [
        Began(1, 2), Began(3, 2), Began(2, 1), Began(4, 1), Began(5, 1), Began(6, 1),
    ]  # fmt: skip
    assert all(isinstance(end, Rendered) for end in ends(answers))


def test_an_image_waits_for_its_begin(make_peer: MakePeer) -> None:
    """It is not rendered before its Begin, since others of its kind may still come."""

    def react(answer: Answer) -> list[Any]:
        return [render(2, kind=("red",)), Begin(), Stop()] if isinstance(answer, Ready) else []

    answers = make_peer(engine={"batch": 2}).serve(render(1, kind=("red",)), react=react)

    assert [a for a in answers if isinstance(a, Began)] == [Began(1, 2), Began(2, 2)]


def test_prompts_are_counted_in_turn(make_peer: MakePeer) -> None:
    """Prompts are counted after the images that were sent before, and before those sent after."""
    question = CountTokens(2, ("a cat", "a big cat"))
    answers = make_peer().serve(render(1), question, render(3), Begin(), Stop())
    order = [one for one in answers if isinstance(one, Rendered | Tokens)]

    assert [ticket_of(one) for one in order] == [1, 2, 3]
    assert order[1] == Tokens(2, (10, 11))


def test_the_next_text_is_encoded_between_two_steps(make_peer: MakePeer) -> None:
    """It is encoded once, and the step that it delays says so; not beside an image that may be poison."""
    red = ("red",)
    peer = make_peer()
    images = [render(1, kind=red, steps=4), render(2, kind=red), render(3), render(4)]
    answers = peer.serve(*images, Begin(), Stop())
    prepares = [(one.ticket, one.step) for one in answers if isinstance(one, Step) and one.prepares]

    assert prepares == [(1, 1)]


# Cancels


def test_a_cancel_overtakes_the_image_in_hand(make_peer: MakePeer) -> None:
    """An image that waits is given back at once; the one in hand ends at its next step."""

    def react(answer: Answer) -> list[Any]:
        if answer == Began(1, 1):
            return [Cancel(2)]
        return [Cancel(1), Stop()] if answer == Cancelled(2) else []

    slow = render(1, "!slow 0.05 a cat", steps=100)
    answers = make_peer().serve(slow, render(2), render(3), Begin(), react=react)

    assert ends(answers)[:2] == [Cancelled(2), Cancelled(1)]
    assert ticket_of(ends(answers)[2]) == 3
    assert max(one.step for one in answers if isinstance(one, Step) and one.ticket == 1) < 100


def test_a_batch_goes_on_without_a_cancelled_image(make_peer: MakePeer) -> None:
    """It ends early only if all its images are cancelled."""

    def react(answer: Answer) -> list[Any]:
        return [Cancel(1), Stop()] if answer == Began(2, 2) else []

    images = [render(ticket, "!slow 0.05 a cat", ("red",), steps=40) for ticket in (1, 2)]
    answers = make_peer(engine={"batch": 2}).serve(*images, Begin(), react=react)
    first, second = ends(answers)

    assert first == Cancelled(1)
    assert isinstance(second, Rendered)


# Failures


def test_an_image_that_fails_fails_alone(make_peer: MakePeer) -> None:
    """Those beside it, and those after it, are rendered."""
    images = [
        render(ticket, prompt, ("red",))
        for ticket, prompt in ((1, "a cat"), (2, "!raise"), (3, "a dog"))
    ]
    answers = make_peer(engine={"batch": 3}).serve(*images, render(4), Begin(), Stop())
    results = {ticket_of(end): end for end in ends(answers)}

    assert results[2] == Failed(2, "scripted by !raise")
    assert all(isinstance(results[ticket], Rendered) for ticket in (1, 3, 4))


def test_a_batch_that_fails_blames_nobody(make_peer: MakePeer) -> None:
    """Each of its images says with how many it was worked on."""
    images = [render(ticket, "!together", ("red",)) for ticket in (1, 2)]
    answers = make_peer(engine={"batch": 2}).serve(*images, Begin(), Stop())

    assert ends(answers) == [Failed(ticket, "scripted by !together", images=2) for ticket in (1, 2)]


def test_an_image_that_takes_too_long_is_ended_by_an_alarm(make_peer: MakePeer) -> None:
    """The alarm interrupts it wherever it is; the engine goes on."""
    answers = make_peer().serve(render(1, "!hang", timeout_seconds=0.2), render(2), Begin(), Stop())
    first, second = ends(answers)

    assert first == Failed(1, "took longer than 0.2 s (timeout_seconds)", timed_out=True)
    assert isinstance(second, Rendered)


def test_a_batch_has_the_time_of_all_its_images(make_peer: MakePeer) -> None:
    """The timeouts add up; if the batch exceeds them, nobody knows which image was at fault."""
    images = [render(1, "!hang", ("red",), timeout_seconds=0.2)]
    images += [render(2, "a cat", ("red",), timeout_seconds=0.2)]
    answers = make_peer(engine={"batch": 2}).serve(*images, Begin(), Stop())
    error = "took longer than 0.4 s for 2 images together (timeout_seconds)"

    assert ends(answers) == [Failed(n, error, timed_out=True, images=2) for n in (1, 2)]


def test_a_text_that_was_encoded_meanwhile_shares_the_blame(make_peer: MakePeer) -> None:
    """An image that hangs after another's text was encoded may hang because of that."""
    hangs = render(1, "!late-hang 0.01", ("red",), timeout_seconds=0.5, steps=3)
    answers = make_peer().serve(hangs, render(2, kind=("red",)), Begin(), Stop())
    first, second = ends(answers)

    assert isinstance(first, Failed)
    assert (first.timed_out, first.images) == (True, 2)
    assert isinstance(second, Rendered)


def test_an_unknown_error_escapes(make_peer: MakePeer) -> None:
    """It ends the process: the next image would fail, too."""
    with pytest.raises(RuntimeError, match="scripted by !unknown"):
        make_peer().serve(render(1, "!unknown"), render(2), Begin(), Stop())
