"""The daemon's link to one engine: framing, sound answers, deadlines, an engine that reads nothing."""

import os
import pickle
import struct
from collections.abc import Iterator

import pytest

from promptdrop.config import Prompt
from promptdrop.nouns import Latency, Rendering
from promptdrop.pool.link import REAP_SECONDS, EngineLink, Limits
from promptdrop.pool.messages import (
    Answer,
    Began,
    Begin,
    Cancel,
    Cancelled,
    CountTokens,
    Failed,
    Gone,
    Placed,
    Ready,
    Render,
    Rendered,
    Stage,
    Step,
    Tokens,
)
from scripted import INFO, ScriptedEngine
from specs import spec

LIMITS = Limits(load=600.0, grace=5.0, stall=30.0, begin=40.0)
LONG = tuple(f"{n:1000}" for n in range(1000))  # a megabyte: more than a pipe takes at once
RENDERING = Rendering("a", 9, False, 2, Latency(1, 1, 1, 1), (1.0, 1.0))


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    """The far end of the link."""
    engine = ScriptedEngine()
    yield engine
    engine.reap(0)


@pytest.fixture
def link(engine: ScriptedEngine) -> EngineLink:
    """A link at time 0, to an engine that loads."""
    return EngineLink(engine, started=0.0, loads_since=0.0, pid=7)


@pytest.fixture
def warm(engine: ScriptedEngine, link: EngineLink) -> EngineLink:
    """The same link, once the engine is warm."""
    engine.say(Ready(INFO))
    list(link.answers(0.0))
    return link


def framed(message: object) -> bytes:
    """A message as a Connection sends it."""
    data = pickle.dumps(message)
    return struct.pack("!i", len(data)) + data


def render(ticket: int, timeout_seconds: float = 60.0) -> Render:
    """The request for an image."""
    return Render(ticket, spec(timeout_seconds=timeout_seconds), Prompt(), ("kind",), False)


def send(link: EngineLink, *tickets: int, now: float = 0.0) -> None:
    """Send images, and let them begin."""
    for ticket in tickets:
        link.render(ticket, render(ticket), now)
    link.begin()


def begun(engine: ScriptedEngine, link: EngineLink, *tickets: int, now: float = 0.0) -> None:
    """Send images, of which the engine begins all together."""
    send(link, *tickets, now=now)
    engine.say(*(Began(ticket, len(tickets)) for ticket in tickets))
    list(link.answers(now))


# What it hears


def test_an_answer_comes_when_it_is_whole(engine: ScriptedEngine, link: EngineLink) -> None:
    """It may arrive byte by byte; the link does not wait for the rest."""
    data = framed(Stage("loading weights"))
    for byte in data[:-1]:
        engine.say_bytes(bytes([byte]))
        assert list(link.answers(1.0)) == []
    engine.say_bytes(data[-1:])

    assert list(link.answers(2.0)) == [Stage("loading weights")]
    assert link.stage == "loading weights"


def test_answers_that_arrive_together_come_in_order(
    engine: ScriptedEngine, link: EngineLink
) -> None:
    """Two whole answers are read; the beginning of a third is kept."""
    third = framed(Stage("c"))
    engine.say_bytes(framed(Stage("a")) + framed(Stage("b")) + third[:9])
    first = list(link.answers(1.0))
    engine.say_bytes(third[9:])

    assert first == [Stage("a"), Stage("b")]
    assert list(link.answers(1.0)) == [Stage("c")]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack("!i", 2**31 - 1), "announced an answer of 2147483647 bytes"),
        (struct.pack("!i", 1 << 20), "announced an answer of 1048576 bytes"),
        (struct.pack("!i", -5), "announced an answer of -5 bytes"),
        (struct.pack("!i", 7) + b"garbage", "said what cannot be read"),
        (framed({"answer": 42}), "gave an answer to nothing: dict"),
        (framed(Begin()), "gave an answer to nothing: Begin"),
        (framed(Ready("warm")), "gave an answer to nothing: Ready"),  # type: ignore[arg-type]  # broken
    ],
)
def test_an_engine_that_talks_nonsense_is_killed(
    engine: ScriptedEngine, link: EngineLink, data: bytes, reason: str
) -> None:
    """Nothing that it says afterwards is heard."""
    engine.say_bytes(data + framed(Stage("later")))

    assert list(link.answers(3.0)) == []
    assert reason in (link.killed or "")
    assert link.has_ended()
    assert not link.is_lost


@pytest.mark.parametrize(
    "answer",
    [Ready(INFO), Tokens(1, (9,)), Rendered(2, RENDERING)],
    ids=["warm twice", "one count for two prompts", "an image that was not begun"],
)
def test_an_answer_that_does_not_fit_kills(
    engine: ScriptedEngine, warm: EngineLink, answer: Answer
) -> None:
    """An answer that no sound engine gives at this time kills the engine, though its type is right."""
    warm.count_tokens(1, ("a", "b"), 0.0)
    send(warm, 2)
    engine.say(answer)

    assert list(warm.answers(1.0)) == []
    assert "gave an answer to nothing" in (warm.killed or "")


def test_answers_about_images_that_are_not_in_hand_are_left_out(
    engine: ScriptedEngine, warm: EngineLink
) -> None:
    """They are no fault, since an image that was cancelled may still end in another way."""
    begun(engine, warm, 1)
    engine.say(Cancelled(1))
    (answer,) = warm.answers(1.0)
    assert isinstance(answer, Cancelled)
    held = warm.take(answer)
    engine.say(Failed(1, "late"), Step(1, 1, 2), Stage("idle"))

    assert held.spec == spec()
    assert list(warm.answers(1.0)) == [Stage("idle")]
    assert warm.killed is None


def test_a_relay_says_where_its_engine_is_and_how_it_ended(
    engine: ScriptedEngine, link: EngineLink
) -> None:
    """Its loading begins when it is placed; a lost host is no image's fault, a kill is no loss."""
    engine.say(Placed("gpu7", 42), Gone("the host gpu7 is gone", is_lost=True))
    list(link.answers(5.0))

    assert (link.host, link.pid, link.loads_since) == ("gpu7", 42, 5.0)
    assert link.how_it_ended() == "the host gpu7 is gone"
    assert link.is_lost
    link.kill("as asked", 6.0)
    assert not link.is_lost


# What it sends


def test_requests_arrive_in_order_with_memory_for_pixels(
    engine: ScriptedEngine, warm: EngineLink
) -> None:
    """Each image has memory of its own, in which the daemon reads what the engine writes."""
    send(warm, 1, 2)
    warm.cancel(1)
    warm.count_tokens(3, ("a",), 0.0)

    kinds = [type(message) for message in engine.heard()]
    assert kinds == [Render, Render, Begin, Cancel, CountTokens]
    assert {len(held.pixels) for held in warm.in_hand.values()} == {64 * 64 * 3}


def test_an_engine_that_reads_nothing_is_not_waited_for(
    engine: ScriptedEngine, warm: EngineLink
) -> None:
    """Messages and descriptors that the pipe does not take are sent when it takes more."""
    warm.count_tokens(1, LONG, 0.0)
    send(warm, 2)
    stuck = warm.writers()
    messages = []
    while warm.writers():
        messages += engine.heard_while(warm.flush)
    messages += engine.heard()

    assert stuck == [engine.socket.fileno()]
    assert [type(message) for message in messages] == [CountTokens, Render, Begin]


def test_what_a_dead_engine_never_read_is_dropped(engine: ScriptedEngine, warm: EngineLink) -> None:
    """Unsent descriptors are closed, and sending to it is still no error."""
    before = len(os.listdir("/proc/self/fd"))
    warm.count_tokens(1, LONG, 0.0)
    send(warm, 2)
    assert warm.writers()
    engine.close_pipe()
    warm.flush()
    send(warm, 3)
    for held in warm.in_hand.values():
        held.pixels.close()

    assert warm.writers() == []
    assert len(os.listdir("/proc/self/fd")) == before - 1  # the far end of the pipe


# Deadlines, on an injected clock


def test_an_engine_must_be_warm_in_time(link: EngineLink) -> None:
    """It is overdue right after the limit, which the next deadline names."""
    assert link.next_deadline(LIMITS) == 600.0
    assert link.overdue(600.0, LIMITS) is None
    assert "not loaded and warm within 600 s" in (link.overdue(600.1, LIMITS) or "")


def test_an_engine_that_waits_for_a_host_has_no_deadline() -> None:
    """A host may come at any time; its loading begins when it is placed."""
    engine = ScriptedEngine()
    link = EngineLink(engine, started=0.0, loads_since=None)

    assert link.next_deadline(LIMITS) == float("inf")
    assert link.overdue(1e9, LIMITS) is None
    engine.reap(0)


def test_each_step_moves_the_deadline(engine: ScriptedEngine, warm: EngineLink) -> None:
    """Silence between two steps counts as hung, so each step moves that deadline."""
    begun(engine, warm, 1, now=10.0)
    assert warm.next_deadline(LIMITS) == 40.0
    engine.say(Step(1, 1, 2))
    list(warm.answers(20.0))

    assert warm.next_deadline(LIMITS) == 50.0
    assert warm.overdue(50.0, LIMITS) is None
    assert "silent for 30 s between steps" in (warm.overdue(50.1, LIMITS) or "")


@pytest.mark.parametrize(("images", "seconds"), [(1, 60), (3, 180)])
def test_an_image_has_its_timeout_and_a_batch_that_of_all(
    engine: ScriptedEngine, warm: EngineLink, images: int, seconds: int
) -> None:
    """To the timeout comes the grace, in which the engine may end the image by itself."""
    begun(engine, warm, *range(images), now=10.0)
    patient = Limits(load=600.0, grace=5.0, stall=None, begin=40.0)
    deadline = 10.0 + seconds + 5.0

    assert warm.next_deadline(patient) == deadline
    assert warm.overdue(deadline, patient) is None
    assert f"no answer 5 s after the image's {seconds} s" in (
        warm.overdue(deadline + 0.1, patient) or ""
    )


def test_an_engine_that_is_asked_must_begin(engine: ScriptedEngine, warm: EngineLink) -> None:
    """The silence before it was asked does not count; having begun, it has the image's deadlines."""
    assert warm.overdue(1000.0, LIMITS) is None
    send(warm, 1, now=1000.0)

    assert warm.next_deadline(LIMITS) == 1040.0
    assert "did not begin what it was asked" in (warm.overdue(1040.1, LIMITS) or "")
    engine.say(Began(1, 1))
    list(warm.answers(1040.0))
    assert warm.overdue(1040.1, LIMITS) is None


def test_a_closed_pipe_is_an_end_or_a_fault(engine: ScriptedEngine, link: EngineLink) -> None:
    """The engine is dying, or is killed after a while; the pipe, always readable, is not waited on."""
    link.life.ends = lambda: [99]  # type: ignore[method-assign]  # as a child process has
    engine.close_pipe()
    list(link.answers(10.0))

    assert link.readers() == [99]
    assert link.next_deadline(LIMITS) == 10.0 + REAP_SECONDS
    assert link.overdue(10.0 + REAP_SECONDS, LIMITS) is None
    assert "closed its end of the pipe" in (link.overdue(10.1 + REAP_SECONDS, LIMITS) or "")


def test_a_kill_that_nothing_follows_is_noticed(engine: ScriptedEngine, link: EngineLink) -> None:
    """An engine in uninterruptible sleep outlives its kill; the first reason is kept."""
    engine.is_stubborn = True
    link.kill("overdue", 10.0, timed_out=True)
    link.kill("again", 11.0)

    assert (link.killed, link.timed_out) == ("overdue", True)
    assert not link.outlives_kill(10.0)
    assert link.next_deadline(LIMITS) == 10.0 + REAP_SECONDS
    assert link.outlives_kill(10.0 + REAP_SECONDS)
    assert not link.reap()


# Time that stood still


def test_limits_do_not_run_while_the_daemon_stands_still(
    engine: ScriptedEngine, warm: EngineLink
) -> None:
    """An hour in which the daemon stood still moves every limit of an image by an hour; when the image
    began stays as it was."""
    begun(engine, warm, 1)
    before = warm.next_deadline(LIMITS)
    warm.move_deadlines(3600.0)

    assert warm.next_deadline(LIMITS) == before + 3600.0
    assert warm.overdue(before + 3600.0, LIMITS) is None
    assert warm.overdue(before + 3601.0, LIMITS)
    assert warm.in_hand[1].began == 0.0


def test_beginning_and_ending_have_their_time_too(warm: EngineLink) -> None:
    """So has an engine that was asked something, and one that was killed."""
    send(warm, 1)
    warm.move_deadlines(100.0)
    asked = warm.next_deadline(LIMITS)
    warm.kill("as a test wants it", 100.0)
    warm.move_deadlines(100.0)

    assert asked == LIMITS.begin + 100.0
    assert not warm.outlives_kill(199.0 + REAP_SECONDS)
    assert warm.outlives_kill(200.0 + REAP_SECONDS)


def test_an_engine_that_loads_has_its_time(link: EngineLink) -> None:
    """engine.load_timeout_seconds is moved like every limit."""
    link.move_deadlines(100.0)

    assert link.next_deadline(LIMITS) == LIMITS.load + 100.0
    assert link.overdue(LIMITS.load + 99.0, LIMITS) is None
