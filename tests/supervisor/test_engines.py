"""Decisions about engines: a start that fails, a death and the image it is charged to, unloading."""

import time
from collections.abc import Callable

import pytest

from promptdrop.pool.messages import Cancelled, CannotStart, Gone
from promptdrop.supervisor.engines import IDLE_DEATHS, REST_SECONDS
from rooms import Rooms

MakeRooms = Callable[..., Rooms]


def fed(rooms: Rooms, images: int = 1) -> None:
    """Accept a job and send its images to the engines."""
    rooms.look()
    rooms.accept(rooms.job(images=images))
    rooms.feed()


def test_an_engine_that_cannot_start_ends_the_daemon(rooms: Rooms) -> None:
    """Its exit status and reason are the daemon's, if there is no other engine."""
    rooms.hear()
    rooms.backend.engines[1].say(CannotStart("no such model", 69))
    rooms.hear()

    assert (rooms.gate.exit_status, rooms.gate.ending) == (69, "no such model")


def test_an_engine_that_cannot_start_beside_others_rests(make_rooms: MakeRooms) -> None:
    """The daemon goes on with the others, and tries it again after REST_SECONDS."""
    rooms = make_rooms(slots=2)
    first, _ = rooms.warm()
    first.die()
    rooms.hear()
    rooms.hear()  # another life
    now = time.monotonic()
    rooms.backend.engines[1].say(CannotStart("no memory", 71))
    rooms.hear()

    slot = rooms.pool.slots[0]
    assert rooms.gate.exit_status is None
    assert slot.trouble == "no memory"
    assert slot.due == pytest.approx(now + REST_SECONDS, abs=10)


def test_an_engine_that_dies_loading_ends_the_daemon(rooms: Rooms) -> None:
    """It is not started again, since its next life would die as well."""
    rooms.hear()
    rooms.backend.engines[1].die()
    rooms.hear()

    assert rooms.gate.exit_status == 1
    assert rooms.gate.ending == "while starting: the engine died: exit status 3"


def test_a_death_is_charged_to_the_image_in_hand(rooms: Rooms) -> None:
    """It is not charged to the prefetched image, which comes first now."""
    (engine,) = rooms.warm()
    fed(rooms, images=2)
    engine.begin(1)
    rooms.hear()
    engine.die()
    rooms.hear()
    (running,) = rooms.work.running.values()

    assert [running.job.state(number).attempts for number in (1, 2)] == [1, 0]
    assert (running.busy, rooms.work.tickets) == (0, {})
    assert [taken[1] for taken in (rooms.work.queue.take(), rooms.work.queue.take()) if taken] == [
        2, 1,
    ]  # fmt: skip


def test_a_death_with_a_batch_in_hand_is_charged_to_nobody(make_rooms: MakeRooms) -> None:
    """Each image of it is rendered alone from now on."""
    rooms = make_rooms({"engine": {"batch": 2}})
    (engine,) = rooms.warm()
    fed(rooms, images=2)
    engine.begin()
    rooms.hear()
    engine.die()
    rooms.hear()
    (running,) = rooms.work.running.values()

    assert running.alone == {1, 2}
    assert running.job.state(1).attempts == 0


def test_a_lost_host_is_charged_to_no_attempt(rooms: Rooms) -> None:
    """The loss counts like a death of the daemon."""
    (engine,) = rooms.warm()
    fed(rooms)
    engine.begin()
    rooms.hear()
    engine.say(Gone("the host is gone", is_lost=True))
    engine.die()
    rooms.hear()
    (running,) = rooms.work.running.values()

    assert (running.job.state(1).attempts, running.job.state(1).deaths) == (0, 1)


def test_an_image_that_comes_back_cancelled_is_next(rooms: Rooms) -> None:
    """It was recalled for a more urgent one, and is not charged."""
    (engine,) = rooms.warm()
    fed(rooms, images=3)
    (render, *_) = engine.renders()
    engine.say(Cancelled(render.ticket))
    rooms.hear()
    taken = rooms.work.queue.take()

    assert taken is not None
    assert taken[1] == 1


def test_an_engine_that_dies_again_and_again_is_given_up(rooms: Rooms) -> None:
    """This happens after IDLE_DEATHS deaths in a row without an image in hand."""
    for _ in range(IDLE_DEATHS):
        ended = rooms.gate.exit_status
        (engine,) = rooms.warm()
        engine.die()
        rooms.hear()

    assert ended is None
    assert rooms.gate.exit_status == 1
    assert f"died {IDLE_DEATHS} times in a row" in str(rooms.gate.ending)


def test_idle_engines_are_unloaded_and_loaded_again(make_rooms: MakeRooms) -> None:
    """They are unloaded after engine.unload_after_seconds; their end is no death."""
    rooms = make_rooms({"engine": {"unload_after_seconds": 10}})
    rooms.look()
    rooms.warm()
    now = time.monotonic()
    rooms.engines.maybe_unload(now)
    due = rooms.engines.next_deadline(now)
    rooms.engines.maybe_unload(due)
    unloaded = rooms.pool.is_unloaded
    rooms.hear()
    deaths = rooms.pool.slots[0].idle_deaths
    rooms.accept(rooms.job())
    rooms.engines.maybe_unload(due)

    assert due <= now + 10
    assert (unloaded, deaths) == (True, 0)
    assert not rooms.pool.is_unloaded


def test_a_paused_daemon_stays_unloaded(make_rooms: MakeRooms) -> None:
    """Images that wait for `resume` do not load an engine."""
    rooms = make_rooms({"engine": {"unload_after_seconds": 10}})
    rooms.look(paused="because")
    rooms.warm()
    rooms.engines.maybe_unload(time.monotonic() + 100)
    rooms.accept(rooms.job())
    rooms.engines.maybe_unload(time.monotonic() + 200)

    assert rooms.pool.is_unloaded
