"""All engines of a daemon, by an injected clock: lives, deaths, kills, rests, and who gets images."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from harness import FAST, merged
from promptdrop import config
from promptdrop.config import Config, Prompt
from promptdrop.errors import ConfigError
from promptdrop.pool.link import REAP_SECONDS
from promptdrop.pool.messages import Began, Begin, Cancel, Placed, Ready, Render, Stage, Step
from promptdrop.pool.pool import DEPTH, FULL_SECONDS, ChildProcesses, Ended, Pool, Slot
from scripted import INFO, ScriptedBackend, ScriptedEngine
from specs import spec

LOAD, STALL, GRACE, RESCAN = 100.0, 10.0, 2.0, 0.5  # seconds, of every configuration here


def configured(**engine: Any) -> Config:
    """A configuration with round limits."""
    limits = {
        "load_timeout_seconds": LOAD,
        "stall_seconds": STALL,
        "kill_grace_seconds": GRACE,
        **engine,
    }
    return config.parse(merged(FAST, {"engine": limits}))


MakeWorld = Callable[..., "World"]


class World:
    """A pool on scripted engines, and the clock they share."""

    def __init__(self, slots: int = 1, **engine: Any) -> None:
        self.now = 0.0
        self.backend = ScriptedBackend(slots, clock=lambda: self.now)
        self.pool = Pool(configured(**engine), self.backend)

    def hear(self, now: float | None = None, may_start: bool = True) -> list[Any]:
        """Return the news of all engines at a moment."""
        self.now = self.now if now is None else now
        return [news for _, _, news in self.pool.hear(self.now, may_start)]

    def warm(self) -> list[ScriptedEngine]:
        """Start all engines, and have them say that they are warm."""
        self.hear()
        engines = list(self.backend.engines.values())
        for engine in engines:
            engine.say(Ready(INFO))
        self.hear()
        return engines

    def slot(self, number: int = 1) -> Slot:
        """A slot by its number."""
        return self.pool.slots[number - 1]

    def send(self, *tickets: int, to: int = 1) -> None:
        """Send images to the engine of a slot."""
        link = self.slot(to).link
        assert link
        for ticket in tickets:
            render = Render(ticket, spec(timeout_seconds=60.0), Prompt(), ("kind",), False)
            link.render(ticket, render, self.now)
            self.slot(to).has_news = True


@pytest.fixture
def make_world() -> Iterator[MakeWorld]:
    """`make_world(slots, ...changes to engine...)`; everything is closed at the end of the test."""
    made: list[World] = []

    def make(slots: int = 1, **engine: Any) -> World:
        made.append(World(slots, **engine))
        return made[-1]

    yield make
    for world in made:
        world.pool.close()


# Lives and deaths


def test_there_are_as_many_engines_as_the_backend_wants(make_world: MakeWorld) -> None:
    """Each begins at the first `hear` at which it may."""
    world = make_world(slots=3)
    world.hear(may_start=False)
    none = list(world.pool.slots)
    world.hear()
    world.hear()

    assert none == []
    assert [slot.name for slot in world.pool.slots] == ["engine-1", "engine-2", "engine-3"]
    assert world.backend.begun == 3


def test_the_last_words_are_heard_before_the_death(make_world: MakeWorld) -> None:
    """Its last answers come before its end; then the next life of the slot begins."""
    world = make_world()
    (engine,) = world.warm()
    engine.say(Stage("about to die"))
    engine.die()

    assert world.hear() == [Stage("about to die"), Ended()]
    assert world.slot().link is None
    world.hear()
    assert world.slot().lives == 2
    assert world.slot().info is None  # the supervisor keeps it, once the engine is warm


def test_an_engine_that_rests_begins_no_life_before_its_time(make_world: MakeWorld) -> None:
    """Neither its death nor `hear` ends the rest; the next deadline names its end."""
    world = make_world()
    (engine,) = world.warm()
    world.slot().rest("it cannot load", until=30.0)
    engine.die()
    world.hear(1.0)
    world.hear(29.9)

    assert world.slot().link is None
    assert world.pool.trouble == "it cannot load"
    assert world.pool.next_deadline() == 30.0
    world.hear(30.0)
    assert world.slot().link
    assert world.pool.trouble is None


@pytest.mark.parametrize(
    ("said", "deadline", "reason"),
    [
        ([], LOAD, "not loaded and warm within 100 s"),
        ([Ready(INFO)], STALL, "did not begin what it was asked"),
        ([Ready(INFO), Began(1, 1)], STALL, "silent for 10 s between steps"),
    ],
    ids=["loading", "asked", "rendering"],
)
def test_a_silent_engine_is_killed_at_its_deadline(
    make_world: MakeWorld, said: list[Any], deadline: float, reason: str
) -> None:
    """It is not killed earlier; the log says so once, and its end is heard next time."""
    world = make_world()
    world.hear()
    if said:
        world.backend.engines[1].say(said[0])
        world.hear()
        world.send(1)
        world.backend.engines[1].say(*said[1:])
        world.hear()
    asked = world.pool.next_deadline()
    link = world.slot().link
    assert link
    world.hear(deadline)
    assert link.killed is None
    with capture_logs() as logged:
        world.hear(deadline + 0.1)
        news = world.hear(deadline + 0.2)

    assert asked == deadline
    assert [(e["event"], e["engine"]) for e in logged] == [("engine.killed", "engine-1")]
    assert reason in (link.killed or "")
    assert link.timed_out
    assert news == [Ended()]


def test_an_engine_that_steps_is_left_alone_until_its_images_timeout(make_world: MakeWorld) -> None:
    """Each step moves the deadline for silence, but not that of the image."""
    world = make_world()
    (engine,) = world.warm()
    world.send(1)
    engine.say(Began(1, 1))
    world.hear(0.0)
    for second in range(5, 61, 5):
        engine.say(Step(1, second, 1000))
        world.hear(float(second))
    assert world.pool.next_deadline() == 60.0 + GRACE
    world.hear(60.1 + GRACE)
    link = world.slot().link

    assert link
    assert "after the image's 60 s" in (link.killed or "")


def test_an_engine_that_outlives_its_kill_is_trouble(make_world: MakeWorld) -> None:
    """Nothing can end it; it is waited for, and no deadline wakes the loop any more."""
    world = make_world()
    (engine,) = world.warm()
    engine.is_stubborn = True
    link = world.slot().link
    assert link
    link.kill("as asked", 0.0)
    with capture_logs() as logged:
        world.hear(REAP_SECONDS)
        world.hear(REAP_SECONDS + 1)

    assert [e["event"] for e in logged] == ["engine.unkillable"]
    assert world.pool.outlive_kill
    assert "was killed and does not end" in (world.pool.trouble or "")
    assert world.pool.next_deadline() == float("inf")
    engine.is_stubborn = False
    engine.die()
    world.hear(REAP_SECONDS + 2)
    world.hear()
    assert not world.pool.outlive_kill
    assert world.pool.trouble is None


def test_one_engine_that_works_is_enough(make_world: MakeWorld) -> None:
    """The trouble of another engine is only that of its slot."""
    world = make_world(slots=2)
    first, _ = world.warm()
    world.slot(1).rest("it cannot load", until=30.0)
    first.die()
    world.hear(1.0)

    assert world.pool.trouble is None
    assert world.slot(1).trouble == "it cannot load"
    assert not world.pool.is_hopeless()


# What cannot begin


def test_a_backend_that_is_full_is_asked_again_soon(make_world: MakeWorld) -> None:
    """This is no error, and is not logged."""
    world = make_world()
    world.backend.refusals = [BlockingIOError()]
    with capture_logs() as logged:
        world.hear(5.0)

    assert logged == []
    assert world.pool.next_deadline() == 5.0 + FULL_SECONDS
    world.hear(5.0 + FULL_SECONDS)
    assert world.slot().link


def test_an_engine_that_cannot_begin_is_tried_again_like_a_sick_disk(make_world: MakeWorld) -> None:
    """It is tried again after a while, and status and log say why."""
    world = make_world()
    world.backend.refusals = [OSError(24, "Too many open files")]
    with capture_logs() as logged:
        world.hear(5.0)

    assert [e["event"] for e in logged] == ["engine.not_started"]
    assert "cannot be started" in (world.pool.trouble or "")
    assert world.pool.next_deadline() == 5.0 + RESCAN
    world.hear(5.0 + RESCAN)
    assert world.pool.trouble is None


def test_workers_and_devices_must_agree() -> None:
    """Several workers on one named device are a mistake in the configuration."""
    loaded = config.parse(merged(FAST, {"model": {"device": "cuda:0"}, "engine": {"workers": 2}}))

    with pytest.raises(ConfigError, match=r"workers: 2, but model\.device: cuda:0 is one device"):
        ChildProcesses(loaded)


# Who is sent what


def test_the_engine_with_the_fewest_images_has_room(make_world: MakeWorld) -> None:
    """Each takes its batch and the next one, so that its device never waits; then none has room."""
    world = make_world(slots=2, batch=2)
    world.warm()
    sent = []
    while slot := world.pool.has_room():
        sent.append(slot.number)
        world.send(len(sent), to=slot.number)

    assert sent == [1, 2] * (DEPTH * 2)


def test_an_engine_that_loads_or_was_killed_has_no_room(make_world: MakeWorld) -> None:
    """Only a warm engine takes images."""
    world = make_world()
    world.hear()
    loading = world.pool.has_room()
    world.warm()
    link = world.slot().link
    assert link
    link.kill("as asked", 0.0)

    assert loading is None
    assert world.pool.has_room() is None
    assert world.pool.first_warm() is None


def test_images_that_were_sent_at_once_are_let_begin_at_once(make_world: MakeWorld) -> None:
    """One Begin for all of them, to their engine only."""
    world = make_world(slots=2)
    first, second = world.warm()
    world.send(1, 2, to=1)
    world.pool.begin()
    world.pool.begin()

    assert [type(message) for message in first.heard()] == [Render, Render, Begin]
    assert second.heard() == []


def test_an_idle_engine_takes_what_another_has_not_begun(make_world: MakeWorld) -> None:
    """It gets as many as its batch, each asked back once; an image being rendered stays, and a last one."""
    world = make_world(slots=3, batch=1)
    first, second, third = world.warm()
    world.send(1, 2, to=1)
    world.send(3, to=2)
    first.say(Began(1, 1))
    world.hear()
    world.pool.share()
    world.pool.share()

    assert [m for m in first.heard() if isinstance(m, Cancel)] == [Cancel(2)]
    assert [m for m in (*second.heard(), *third.heard()) if isinstance(m, Cancel)] == []


def test_while_all_have_work_nothing_is_asked_back(make_world: MakeWorld) -> None:
    """No engine is idle and could take an image."""
    world = make_world(slots=2, batch=1)
    first, _ = world.warm()
    world.send(1, 2, to=1)
    world.send(3, to=2)
    world.pool.share()

    assert [m for m in first.heard() if isinstance(m, Cancel)] == []
    assert [ticket for _, _, ticket, _ in world.pool.in_hand()] == [1, 2, 3]


# Unloading


def test_engines_are_unloaded_until_there_is_work(make_world: MakeWorld) -> None:
    """All engines end, none begins, and the next life counts as the first."""
    world = make_world(slots=2)
    world.warm()
    loaded = world.pool.are_loaded
    world.pool.unload(1.0)
    news = world.hear(1.0)
    world.hear(500.0)

    assert loaded
    assert news == [Ended(), Ended()]
    assert all(slot.link is None and slot.is_unloading for slot in world.pool.slots)
    assert world.pool.next_deadline() == float("inf")
    world.pool.is_unloaded = False
    world.hear(501.0)
    assert [(slot.lives, slot.is_unloading) for slot in world.pool.slots] == [(1, False)] * 2


def test_an_engine_that_waits_for_a_host_is_not_on_its_way(make_world: MakeWorld) -> None:
    """It does not keep others from being unloaded; one that was placed is loading."""
    world = make_world(slots=2)
    world.hear()
    world.backend.engines[1].say(Ready(INFO))
    waiting = world.slot(2).link
    assert waiting
    waiting.loads_since = None
    world.hear()
    without_host = world.pool.are_loaded
    world.backend.engines[2].say(Placed("gpu2", 7))
    world.hear()

    assert without_host
    assert not world.pool.are_loaded
