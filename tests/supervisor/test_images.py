"""Decisions about an image: when a failure is charged to it, and when it is given up."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from parts import Parts
from promptdrop.pool.messages import Failed, Rendered
from promptdrop.spool import record
from promptdrop.spool.job import DEATHS_FAILED, Job
from promptdrop.supervisor.work import Running
from scripted import INFO
from specs import spec
from spools import RENDERING

MakeParts = Callable[..., Parts]


def taken(parts: Parts, images: int = 1) -> Running:
    """A job whose first image was taken from the queue and not sent to an engine."""
    parts.accept(job := parts.job(images=images))
    parts.work.queue.take()
    return parts.work.running[job.id]


def waiting(parts: Parts) -> list[int]:
    """The numbers of the images that wait, in the order they are taken."""
    numbers = []
    while image := parts.work.queue.take():
        numbers.append(image[1])
    return numbers


def begun(job: Job, number: int = 1) -> dict[str, int]:
    """The record of an image in hand; empty if there is none."""
    path = job.record_path(number, "begun")
    return json.loads(path.read_bytes()) if path.exists() else {}


def until_ended(parts: Parts) -> None:
    """Turn until no job is left."""
    parts.until(lambda: not parts.work.running, "the end of all jobs")


def test_a_failed_image_comes_last_of_its_job(parts: Parts) -> None:
    """It comes last because it may be poison. The attempt is recorded on the disk."""
    running = taken(parts, images=3)
    parts.images.failed(running, spec(), "too bad", timed_out=False)

    assert begun(running.job) == {"attempts": 1, "deaths": 0}
    assert waiting(parts) == [2, 3, 1]


def test_the_last_attempt_decides(parts: Parts) -> None:
    """After engine.max_attempts the image fails, and with it its job."""
    running = taken(parts)
    for _ in range(3):
        parts.images.failed(running, spec(), "too bad", timed_out=False)
        parts.work.queue.take()
    until_ended(parts)

    (end,) = parts.jobs.finished
    assert end.outcome == "failed"
    assert end.error == "image 1: too bad (attempt 3 of 3)"


def test_a_cancelled_job_s_image_is_not_tried_again(parts: Parts) -> None:
    """Its job ends instead."""
    running = taken(parts)
    running.job.cancelled = True
    parts.images.failed(running, spec(), "too bad", timed_out=False)
    until_ended(parts)

    assert len(parts.work.queue) == 0
    assert parts.jobs.finished[-1].outcome == "cancelled"


@pytest.mark.parametrize(("timed_out", "outcome"), [(True, "placeholder"), (False, "failed")])
def test_a_timeout_may_leave_a_placeholder(
    make_parts: MakeParts, timed_out: bool, outcome: str
) -> None:
    """engine.on_timeout: placeholder; any other error still fails the image."""
    parts = make_parts({"engine": {"on_timeout": "placeholder", "max_attempts": 1}})
    parts.warm()
    running = taken(parts)
    parts.images.failed(running, spec(), "too slow", timed_out=timed_out)
    until_ended(parts)

    summary = json.loads((parts.spool.paths.outbox / "a/job.json").read_bytes())
    assert summary["images"][0]["outcome"] == outcome


def test_a_batch_s_failure_is_charged_to_nobody(parts: Parts) -> None:
    """As nobody knows which image was at fault, each is rendered next, alone."""
    running = taken(parts, images=3)
    parts.images.batch_failed(running, spec(), "too bad")

    assert running.alone == {1}
    assert begun(running.job) == {}
    assert waiting(parts) == [1, 2, 3]


def test_an_image_that_hosts_are_lost_with_fails_at_last(parts: Parts) -> None:
    """No attempt is charged; after DEATHS_FAILED losses it is given up."""
    running = taken(parts)
    for _ in range(DEATHS_FAILED):
        parts.images.lost(running, spec(), counts=True)
        parts.work.queue.take()
    until_ended(parts)

    assert running.job.states[1].attempts == 0
    assert f"{DEATHS_FAILED} times" in str(parts.jobs.finished[-1].error)


def test_a_host_s_end_that_was_announced_is_no_death(parts: Parts) -> None:
    """The image is tried again for ever."""
    running = taken(parts)
    for _ in range(DEATHS_FAILED + 1):
        parts.images.lost(running, spec(), counts=False)

    assert running.job.deaths(1) == 0


def test_a_death_of_the_daemon_is_counted_in_advance(parts: Parts) -> None:
    """It is taken back whenever the image is put down while the daemon lives."""
    running = taken(parts)
    parts.images.begun(running.job, spec())
    in_hand = begun(running.job)
    parts.images.put_back(running, spec())

    assert in_hand == {"attempts": 0, "deaths": 1}
    assert begun(running.job) == {}


def test_an_orderly_stop_charges_nobody(parts: Parts) -> None:
    """For images in hand the death counted in advance is taken back; charged attempts stay."""
    running = taken(parts, images=2)
    parts.images.failed(running, spec(), "too bad", timed_out=False)
    parts.images.begun(running.job, spec())
    parts.images.put_down_all()

    assert begun(running.job) == {"attempts": 1, "deaths": 0}


def test_a_record_that_cannot_be_written_stops_no_image(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One death too many or too few may be counted, which is better than a stalled loop."""

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "begin_image", refuse)
    monkeypatch.setattr(record, "end_attempt", refuse)
    running = taken(parts)
    parts.images.begun(running.job, spec())
    parts.images.put_back(running, spec())

    assert waiting(parts) == [1]


def test_a_rendered_image_is_published(parts: Parts) -> None:
    """It goes from the engine's memory to the outbox, and its job ends."""
    parts.look()
    (engine,) = parts.warm()
    parts.accept(parts.job())
    parts.feed()
    (ticket,) = engine.begin()
    engine.say(Rendered(ticket, RENDERING))
    parts.hear()
    under_way = parts.publishing.under_way
    until_ended(parts)

    assert (under_way, parts.publishing.under_way, parts.publishing.published) == (1, 0, 1)
    assert sorted(path.name for path in (parts.spool.paths.outbox / "a").iterdir()) == [
        "a-0001.json", "a-0001.png", "job.json", "request.txt",
    ]  # fmt: skip
    assert parts.images.window.summary().p50_ms == round(RENDERING.latency_ms.render, 1)


@pytest.mark.parametrize(("images", "attempts", "alone"), [(1, 1, set()), (2, 0, {1})])
def test_an_engine_s_word_is_charged(
    parts: Parts, images: int, attempts: int, alone: set[int]
) -> None:
    """A failure of one image is charged to it; a failure of several to nobody."""
    parts.look()
    (engine,) = parts.warm()
    parts.accept(job := parts.job())
    running = parts.work.running[job.id]
    parts.feed()
    (ticket,) = engine.begin()
    engine.say(Failed(ticket, "too bad", images=images))
    parts.hear()

    assert (job.state(1).attempts, running.alone) == (attempts, alone)
    assert (running.busy, parts.work.tickets) == (0, {})
    assert parts.pool.slots[0].info == INFO
    assert parts.engines.next_deadline(time.monotonic()) > 0
