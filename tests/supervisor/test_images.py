"""Decisions about an image: when a failure is charged to it, and when it is given up."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from promptdrop.pool.messages import Failed, Rendered
from promptdrop.spool import record
from promptdrop.spool.job import DEATHS_FAILED, Job
from promptdrop.supervisor.work import Running
from rooms import Rooms
from specs import spec
from spools import INFO, RENDERING

MakeRooms = Callable[..., Rooms]


def taken(rooms: Rooms, images: int = 1) -> Running:
    """A job whose first image was taken from the queue and not sent to an engine."""
    rooms.accept(job := rooms.job(images=images))
    rooms.work.queue.take()
    return rooms.work.running[job.id]


def waiting(rooms: Rooms) -> list[int]:
    """The numbers of the images that wait, in the order they are taken."""
    numbers = []
    while image := rooms.work.queue.take():
        numbers.append(image[1])
    return numbers


def begun(job: Job, number: int = 1) -> dict[str, int]:
    """The record of an image in hand; empty if there is none."""
    path = job.record_path(number, "begun")
    return json.loads(path.read_bytes()) if path.exists() else {}


def until_ended(rooms: Rooms) -> None:
    """Turn until no job is left."""
    rooms.until(lambda: not rooms.work.running, "the end of all jobs")


def test_a_failed_image_comes_last_of_its_job(rooms: Rooms) -> None:
    """It comes last because it may be poison. The attempt is recorded on the disk."""
    running = taken(rooms, images=3)
    rooms.images.failed(running, spec(), "too bad", timed_out=False)

    assert begun(running.job) == {"attempts": 1, "deaths": 0}
    assert waiting(rooms) == [2, 3, 1]


def test_the_last_attempt_decides(rooms: Rooms) -> None:
    """After engine.max_attempts the image fails, and with it its job."""
    running = taken(rooms)
    for _ in range(3):
        rooms.images.failed(running, spec(), "too bad", timed_out=False)
        rooms.work.queue.take()
    until_ended(rooms)

    (end,) = rooms.jobs.finished
    assert end.outcome == "failed"
    assert end.error == "image 1: too bad (attempt 3 of 3)"


def test_a_cancelled_job_s_image_is_not_tried_again(rooms: Rooms) -> None:
    """Its job ends instead."""
    running = taken(rooms)
    running.job.cancelled = True
    rooms.images.failed(running, spec(), "too bad", timed_out=False)
    until_ended(rooms)

    assert len(rooms.work.queue) == 0
    assert rooms.jobs.finished[-1].outcome == "cancelled"


@pytest.mark.parametrize(("timed_out", "outcome"), [(True, "placeholder"), (False, "failed")])
def test_a_timeout_may_leave_a_placeholder(
    make_rooms: MakeRooms, timed_out: bool, outcome: str
) -> None:
    """engine.on_timeout: placeholder; any other error still fails the image."""
    rooms = make_rooms({"engine": {"on_timeout": "placeholder", "max_attempts": 1}})
    rooms.warm()
    running = taken(rooms)
    rooms.images.failed(running, spec(), "too slow", timed_out=timed_out)
    until_ended(rooms)

    summary = json.loads((rooms.spool.paths.outbox / "a/job.json").read_bytes())
    assert summary["images"][0]["outcome"] == outcome


def test_a_batch_s_failure_is_charged_to_nobody(rooms: Rooms) -> None:
    """As nobody knows which image was at fault, each is rendered next, alone."""
    running = taken(rooms, images=3)
    rooms.images.batch_failed(running, spec(), "too bad")

    assert running.alone == {1}
    assert begun(running.job) == {}
    assert waiting(rooms) == [1, 2, 3]


def test_an_image_that_hosts_are_lost_with_fails_at_last(rooms: Rooms) -> None:
    """No attempt is charged; after DEATHS_FAILED losses it is given up."""
    running = taken(rooms)
    for _ in range(DEATHS_FAILED):
        rooms.images.lost(running, spec(), counts=True)
        rooms.work.queue.take()
    until_ended(rooms)

    assert running.job.states[1].attempts == 0
    assert f"{DEATHS_FAILED} times" in str(rooms.jobs.finished[-1].error)


def test_a_host_s_end_that_was_announced_is_no_death(rooms: Rooms) -> None:
    """The image is tried again for ever."""
    running = taken(rooms)
    for _ in range(DEATHS_FAILED + 1):
        rooms.images.lost(running, spec(), counts=False)

    assert running.job.deaths(1) == 0


def test_a_death_of_the_daemon_is_counted_in_advance(rooms: Rooms) -> None:
    """It is taken back whenever the image is put down while the daemon lives."""
    running = taken(rooms)
    rooms.images.begun(running.job, spec())
    in_hand = begun(running.job)
    rooms.images.put_back(running, spec())

    assert in_hand == {"attempts": 0, "deaths": 1}
    assert begun(running.job) == {}


def test_an_orderly_stop_charges_nobody(rooms: Rooms) -> None:
    """For images in hand the death counted in advance is taken back; charged attempts stay."""
    running = taken(rooms, images=2)
    rooms.images.failed(running, spec(), "too bad", timed_out=False)
    rooms.images.begun(running.job, spec())
    rooms.images.put_down_all()

    assert begun(running.job) == {"attempts": 1, "deaths": 0}


def test_a_record_that_cannot_be_written_stops_no_image(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One death too many or too few may be counted, which is better than a stalled loop."""

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "begin_image", refuse)
    monkeypatch.setattr(record, "end_attempt", refuse)
    running = taken(rooms)
    rooms.images.begun(running.job, spec())
    rooms.images.put_back(running, spec())

    assert waiting(rooms) == [1]


def test_a_rendered_image_is_published(rooms: Rooms) -> None:
    """It goes from the engine's memory to the outbox, and its job ends."""
    rooms.look()
    (engine,) = rooms.warm()
    rooms.accept(rooms.job())
    rooms.feed()
    (ticket,) = engine.begin()
    engine.say(Rendered(ticket, RENDERING))
    rooms.hear()
    under_way = rooms.publishing.under_way
    until_ended(rooms)

    assert (under_way, rooms.publishing.under_way, rooms.publishing.published) == (1, 0, 1)
    assert sorted(path.name for path in (rooms.spool.paths.outbox / "a").iterdir()) == [
        "a-0001.json", "a-0001.png", "job.json", "request.txt",
    ]  # fmt: skip
    assert rooms.images.window.summary().p50_ms == round(RENDERING.latency_ms.render, 1)


@pytest.mark.parametrize(("images", "attempts", "alone"), [(1, 1, set()), (2, 0, {1})])
def test_an_engine_s_word_is_charged(
    rooms: Rooms, images: int, attempts: int, alone: set[int]
) -> None:
    """A failure of one image is charged to it; a failure of several to nobody."""
    rooms.look()
    (engine,) = rooms.warm()
    rooms.accept(job := rooms.job())
    running = rooms.work.running[job.id]
    rooms.feed()
    (ticket,) = engine.begin()
    engine.say(Failed(ticket, "too bad", images=images))
    rooms.hear()

    assert (job.state(1).attempts, running.alone) == (attempts, alone)
    assert (running.busy, rooms.work.tickets) == (0, {})
    assert rooms.pool.slots[0].info == INFO
    assert rooms.engines.next_deadline(time.monotonic()) > 0
