"""Decisions about engines: a start that fails, a death and the image it is charged to, unloading."""

import time
from collections.abc import Callable

import pytest

from parts import Parts
from promptdrop.pool.messages import Cancelled, CannotStart, Gone
from promptdrop.supervisor.engines import IDLE_DEATHS, REST_SECONDS

MakeParts = Callable[..., Parts]


def fed(parts: Parts, images: int = 1) -> None:
    """Accept a job and send its images to the engines."""
    parts.look()
    parts.accept(parts.job(images=images))
    parts.feed()


def test_an_engine_that_cannot_start_ends_the_daemon(parts: Parts) -> None:
    """Its exit status and reason are the daemon's, if there is no other engine."""
    parts.hear()
    parts.backend.engines[1].say(CannotStart("no such model", 69))
    parts.hear()

    assert (parts.gate.exit_status, parts.gate.ending) == (69, "no such model")


def test_an_engine_that_cannot_start_beside_others_rests(make_parts: MakeParts) -> None:
    """The daemon goes on with the others, and tries it again after REST_SECONDS."""
    parts = make_parts(slots=2)
    first, _ = parts.warm()
    first.die()
    parts.hear()
    parts.hear()  # another life
    now = time.monotonic()
    parts.backend.engines[1].say(CannotStart("no memory", 71))
    parts.hear()

    slot = parts.pool.slots[0]
    assert parts.gate.exit_status is None
    assert slot.trouble == "no memory"
    assert slot.due == pytest.approx(now + REST_SECONDS, abs=10)


def test_an_engine_that_dies_loading_ends_the_daemon(parts: Parts) -> None:
    """It is not started again, since its next life would die as well."""
    parts.hear()
    parts.backend.engines[1].die()
    parts.hear()

    assert parts.gate.exit_status == 1
    assert parts.gate.ending == "while starting: the engine died: exit status 3"


def test_a_death_is_charged_to_the_image_in_hand(parts: Parts) -> None:
    """It is not charged to the prefetched image, which comes first now."""
    (engine,) = parts.warm()
    fed(parts, images=2)
    engine.begin(1)
    parts.hear()
    engine.die()
    parts.hear()
    (running,) = parts.work.running.values()

    assert [running.job.state(number).attempts for number in (1, 2)] == [1, 0]
    assert (running.busy, parts.work.tickets) == (0, {})
    assert [taken[1] for taken in (parts.work.queue.take(), parts.work.queue.take()) if taken] == [
        2, 1,
    ]  # fmt: skip


def test_a_death_with_a_batch_in_hand_is_charged_to_nobody(make_parts: MakeParts) -> None:
    """Each image of it is rendered alone from now on."""
    parts = make_parts({"engine": {"batch": 2}})
    (engine,) = parts.warm()
    fed(parts, images=2)
    engine.begin()
    parts.hear()
    engine.die()
    parts.hear()
    (running,) = parts.work.running.values()

    assert running.alone == {1, 2}
    assert running.job.state(1).attempts == 0


def test_a_lost_host_is_charged_to_no_attempt(parts: Parts) -> None:
    """The loss counts like a death of the daemon."""
    (engine,) = parts.warm()
    fed(parts)
    engine.begin()
    parts.hear()
    engine.say(Gone("the host is gone", is_lost=True))
    engine.die()
    parts.hear()
    (running,) = parts.work.running.values()

    assert (running.job.state(1).attempts, running.job.state(1).deaths) == (0, 1)


def test_an_image_that_comes_back_cancelled_is_next(parts: Parts) -> None:
    """It was recalled for a more urgent one, and is not charged."""
    (engine,) = parts.warm()
    fed(parts, images=3)
    (render, *_) = engine.renders()
    engine.say(Cancelled(render.ticket))
    parts.hear()
    taken = parts.work.queue.take()

    assert taken is not None
    assert taken[1] == 1


def test_an_engine_that_dies_again_and_again_is_given_up(parts: Parts) -> None:
    """This happens after IDLE_DEATHS deaths in a row without an image in hand."""
    for _ in range(IDLE_DEATHS):
        ended = parts.gate.exit_status
        (engine,) = parts.warm()
        engine.die()
        parts.hear()

    assert ended is None
    assert parts.gate.exit_status == 1
    assert f"died {IDLE_DEATHS} times in a row" in str(parts.gate.ending)


def test_idle_engines_are_unloaded_and_loaded_again(make_parts: MakeParts) -> None:
    """They are unloaded after engine.unload_after_seconds; their end is no death."""
    parts = make_parts({"engine": {"unload_after_seconds": 10}})
    parts.look()
    parts.warm()
    now = time.monotonic()
    parts.engines.maybe_unload(now)
    due = parts.engines.next_deadline(now)
    parts.engines.maybe_unload(due)
    unloaded = parts.pool.is_unloaded
    parts.hear()
    deaths = parts.pool.slots[0].idle_deaths
    parts.accept(parts.job())
    parts.engines.maybe_unload(due)

    assert due <= now + 10
    assert (unloaded, deaths) == (True, 0)
    assert not parts.pool.is_unloaded


def test_a_paused_daemon_stays_unloaded(make_parts: MakeParts) -> None:
    """Images that wait for `resume` do not load an engine."""
    parts = make_parts({"engine": {"unload_after_seconds": 10}})
    parts.look(paused="because")
    parts.warm()
    parts.engines.maybe_unload(time.monotonic() + 100)
    parts.accept(parts.job())
    parts.engines.maybe_unload(time.monotonic() + 200)

    assert parts.pool.is_unloaded
