"""The life of a job: accepted, measured, queued, cancelled, ended or refused."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from promptdrop.errors import RequestError
from promptdrop.pool.messages import Cancel, CountTokens, Tokens
from promptdrop.supervisor import jobs as jobs_room
from rooms import Rooms

MakeRooms = Callable[..., Rooms]
REFUSE = {"prompt": {"overflow": "refuse", "max_tokens": 16}}


def until_ended(rooms: Rooms) -> None:
    """Turn until no job is left."""
    rooms.until(lambda: not rooms.work.running, "the end of all jobs")


def test_a_job_ends_when_its_last_image_has(rooms: Rooms) -> None:
    """It does not end before; then the status lists its end."""
    rooms.accept(job := rooms.job(images=2))
    running = rooms.work.running[job.id]
    outcomes = []
    for number in (1, 2):
        running.busy += 1
        job.state(number).outcome = "rendered"
        rooms.jobs.image_ended(running)
        outcomes.append(running.ending)
    until_ended(rooms)

    assert outcomes == [False, True]
    assert [(end.id, end.outcome) for end in rooms.jobs.finished] == [(job.id, "done")]
    assert (rooms.spool.paths.outbox / "a/job.json").exists()


def test_a_cancelled_job_ends_at_once_if_no_engine_holds_it(rooms: Rooms) -> None:
    """Its images leave the queue and its file goes to failed/, to be retried."""
    rooms.accept(job := rooms.job(images=3))
    rooms.jobs.cancel([job.id], lambda: None, lambda: None)
    until_ended(rooms)

    assert len(rooms.work.queue) == 0
    assert rooms.jobs.finished[-1].error == "cancelled on request"
    assert (rooms.spool.paths.failed / "a.txt").exists()


def test_a_cancel_is_durable_before_its_command_goes(rooms: Rooms) -> None:
    """It is recorded before the command is removed, so a crash in between repeats the command."""
    rooms.accept(job := rooms.job())
    found = []
    rooms.jobs.cancel([job.id], lambda: found.append((job.home / "cancelled").exists()), list)
    until_ended(rooms)

    assert found == [True]


def test_a_cancelled_job_waits_for_the_image_that_is_rendered(rooms: Rooms) -> None:
    """The engine is asked to stop it at its next step."""
    rooms.look()
    (engine,) = rooms.warm()
    rooms.accept(job := rooms.job())
    rooms.feed()
    (ticket,) = engine.begin()
    rooms.hear()
    rooms.jobs.cancel([job.id], lambda: None, lambda: None)
    rooms.until(lambda: job.cancelled, "the cancel")

    assert engine.heard() == [Cancel(ticket)]
    assert not rooms.work.running[job.id].ending


def test_a_file_that_is_no_job_goes_to_failed(rooms: Rooms) -> None:
    """A drain waits for it, and the status lists it."""
    rooms.refuse(rooms.drop("a.txt"), RequestError("is nonsense"))
    waits = rooms.jobs.refusing
    rooms.until(lambda: not rooms.jobs.refusing, "a refused file")

    assert waits == 1
    assert rooms.jobs.finished[-1].outcome == "refused"
    assert (rooms.spool.paths.failed / "a.txt.error.json").exists()


def test_a_more_urgent_job_recalls_what_is_prefetched(rooms: Rooms) -> None:
    """An image that is being rendered is not recalled, nor one of the same priority."""
    rooms.look()
    (engine,) = rooms.warm()
    rooms.accept(rooms.job("a.txt", images=2))
    rooms.feed()
    (first,) = engine.begin(1)
    (prefetched,) = rooms.work.tickets.keys() - {first}
    rooms.hear()
    rooms.accept(rooms.job("b.txt", priority=0))
    before = engine.heard()
    rooms.accept(rooms.job("c.txt", priority=1))

    assert before == []
    assert engine.heard() == [Cancel(prefetched)]


def test_with_many_images_a_job_waits_on_the_disk(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If more than OPEN_IMAGES are queued, its detail is kept on the disk only."""
    monkeypatch.setattr(jobs_room, "OPEN_IMAGES", 1)
    jobs = [rooms.job(f"{n}.txt") for n in range(2)]
    for job in jobs:
        rooms.accept(job)

    assert [job.detail_in_memory is None for job in jobs] == [False, True]


# --- measuring ------------------------------------------------------------------------------------


def question(messages: list[Any]) -> CountTokens:
    """The one question among the messages to an engine."""
    (asked,) = [message for message in messages if isinstance(message, CountTokens)]
    return asked


@pytest.mark.parametrize(("tokens", "queued", "refused"), [(16, 1, 0), (17, 0, 1)])
def test_a_prompt_is_measured_first(
    make_rooms: MakeRooms, tokens: int, queued: int, refused: int
) -> None:
    """With prompt.overflow: refuse, a job that fits is queued, and one that does not is refused whole."""
    rooms = make_rooms(REFUSE)
    rooms.accept(rooms.job())
    (engine,) = rooms.warm()
    before = len(rooms.work.queue)
    asked = question(engine.heard())
    engine.say(Tokens(asked.ticket, (tokens,)))
    rooms.hear()

    assert before == 0
    assert (len(rooms.work.queue), rooms.jobs.refusing) == (queued, refused)
    rooms.until(lambda: not rooms.jobs.refusing, "the refusal")
    assert [f"has {tokens} tokens" in str(end.error) for end in rooms.jobs.finished] == [
        True
    ] * refused


def test_another_engine_is_asked_when_one_dies(make_rooms: MakeRooms) -> None:
    """The question is not lost with it."""
    rooms = make_rooms(REFUSE, slots=2)
    rooms.accept(rooms.job())
    first, second = rooms.warm()
    question(first.heard())
    first.die()
    rooms.hear()
    asked = question(second.heard())
    second.say(Tokens(asked.ticket, (1,)))
    rooms.hear()

    assert len(rooms.work.queue) == 1


def test_a_job_that_is_measured_can_be_cancelled(make_rooms: MakeRooms) -> None:
    """The engine's later answer about it is ignored."""
    rooms = make_rooms(REFUSE)
    (engine,) = rooms.warm()
    rooms.accept(job := rooms.job())
    asked = question(engine.heard())
    rooms.jobs.cancel([job.id], lambda: None, lambda: None)
    until_ended(rooms)
    engine.say(Tokens(asked.ticket, (1000,)))
    rooms.hear()

    assert len(rooms.work.queue) == 0
    assert rooms.jobs.finished[-1].outcome == "cancelled"
    assert rooms.engines.next_deadline(time.monotonic()) > 0
