"""The life of a job: accepted, measured, queued, cancelled, ended or refused."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from parts import Parts
from promptdrop.errors import RequestError
from promptdrop.pool.messages import Cancel, CountTokens, Tokens
from promptdrop.supervisor import jobs as jobs_room
from promptdrop.supervisor.errands import Progress

MakeParts = Callable[..., Parts]
REFUSE = {"prompt": {"overflow": "refuse", "max_tokens": 16}}


def until_ended(parts: Parts) -> None:
    """Turn until no job is left."""
    parts.until(lambda: not parts.work.running, "the end of all jobs")


def test_a_job_ends_when_its_last_image_has(parts: Parts) -> None:
    """It does not end before; then the status lists its end."""
    parts.accept(job := parts.job(images=2))
    running = parts.work.running[job.id]
    outcomes = []
    for number in (1, 2):
        running.busy += 1
        job.state(number).outcome = "rendered"
        parts.jobs.image_ended(running)
        outcomes.append(running.ending)
    until_ended(parts)

    assert outcomes == [False, True]
    assert [(end.id, end.outcome) for end in parts.jobs.finished] == [(job.id, "done")]
    assert (parts.spool.paths.outbox / "a/job.json").exists()


def test_a_cancelled_job_ends_at_once_if_no_engine_holds_it(parts: Parts) -> None:
    """Its images leave the queue and its file goes to failed/, to be retried."""
    parts.accept(job := parts.job(images=3))
    parts.jobs.cancel([job.id], lambda: None, lambda _: None)
    until_ended(parts)

    assert len(parts.work.queue) == 0
    assert parts.jobs.finished[-1].error == "cancelled on request"
    assert (parts.spool.paths.failed / "a.txt").exists()


def test_a_cancel_is_durable_before_its_command_goes(parts: Parts) -> None:
    """It is recorded before the command is removed, so a crash in between repeats the command."""
    parts.accept(job := parts.job())
    found, ends = [], []
    remove = lambda: found.append((job.home / "cancelled").exists())  # noqa: E731
    parts.jobs.cancel([job.id], remove, ends.append)
    until_ended(parts)

    assert (found, ends) == ([True], [Progress.DONE])


def test_a_cancelled_job_waits_for_the_image_that_is_rendered(parts: Parts) -> None:
    """The engine is asked to stop it at its next step."""
    parts.look()
    (engine,) = parts.warm()
    parts.accept(job := parts.job())
    parts.feed()
    (ticket,) = engine.begin()
    parts.hear()
    recorded: list[Progress] = []
    parts.jobs.cancel([job.id], lambda: None, recorded.append)
    parts.until(lambda: recorded, "the record of the cancel")

    assert engine.heard() == [Cancel(ticket)]
    assert not parts.work.running[job.id].ending


def test_a_file_that_is_no_job_goes_to_failed(parts: Parts) -> None:
    """A drain waits for it, and the status lists it."""
    parts.refuse(parts.drop("a.txt"), RequestError("is nonsense"))
    waits = parts.jobs.refusing
    parts.until(lambda: not parts.jobs.refusing, "a refused file")

    assert waits == 1
    assert parts.jobs.finished[-1].outcome == "refused"
    assert (parts.spool.paths.failed / "a.txt.error.json").exists()


def test_a_more_urgent_job_recalls_what_is_prefetched(parts: Parts) -> None:
    """An image that is being rendered is not recalled, nor one of the same priority."""
    parts.look()
    (engine,) = parts.warm()
    parts.accept(parts.job("a.txt", images=2))
    parts.feed()
    (first,) = engine.begin(1)
    (prefetched,) = parts.work.tickets.keys() - {first}
    parts.hear()
    parts.accept(parts.job("b.txt", priority=0))
    before = engine.heard()
    parts.accept(parts.job("c.txt", priority=1))

    assert before == []
    assert engine.heard() == [Cancel(prefetched)]


def test_with_many_images_a_job_waits_on_the_disk(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If more than OPEN_IMAGES are queued, its detail is kept on the disk only."""
    monkeypatch.setattr(jobs_room, "OPEN_IMAGES", 1)
    jobs = [parts.job(f"{n}.txt") for n in range(2)]
    for job in jobs:
        parts.accept(job)

    assert [job.detail_in_memory is None for job in jobs] == [False, True]


# --- measuring ------------------------------------------------------------------------------------


def question(messages: list[Any]) -> CountTokens:
    """The one question among the messages to an engine."""
    (asked,) = [message for message in messages if isinstance(message, CountTokens)]
    return asked


@pytest.mark.parametrize(("tokens", "queued", "refused"), [(16, 1, 0), (17, 0, 1)])
def test_a_prompt_is_measured_first(
    make_parts: MakeParts, tokens: int, queued: int, refused: int
) -> None:
    """With prompt.overflow: refuse, a job that fits is queued, and one that does not is refused whole."""
    parts = make_parts(REFUSE)
    parts.accept(parts.job())
    (engine,) = parts.warm()
    before = len(parts.work.queue)
    asked = question(engine.heard())
    engine.say(Tokens(asked.ticket, (tokens,)))
    parts.hear()

    assert before == 0
    assert (len(parts.work.queue), parts.jobs.refusing) == (queued, refused)
    parts.until(lambda: not parts.jobs.refusing, "the refusal")
    assert [f"has {tokens} tokens" in str(end.error) for end in parts.jobs.finished] == [
        True
    ] * refused


def test_another_engine_is_asked_when_one_dies(make_parts: MakeParts) -> None:
    """The question is not lost with it."""
    parts = make_parts(REFUSE, slots=2)
    parts.accept(parts.job())
    first, second = parts.warm()
    question(first.heard())
    first.die()
    parts.hear()
    asked = question(second.heard())
    second.say(Tokens(asked.ticket, (1,)))
    parts.hear()

    assert len(parts.work.queue) == 1


@pytest.mark.parametrize("tokens", [1, 1000])
def test_a_job_that_is_measured_can_be_cancelled(make_parts: MakeParts, tokens: int) -> None:
    """The engine's later answer about it is ignored, also while the cancel is being recorded."""
    parts = make_parts(REFUSE)
    (engine,) = parts.warm()
    parts.accept(job := parts.job())
    asked = question(engine.heard())
    parts.jobs.cancel([job.id], lambda: None, lambda _: None)
    engine.say(Tokens(asked.ticket, (tokens,)))
    parts.hear()
    queued = len(parts.work.queue)
    until_ended(parts)

    assert queued == 0
    assert [end.outcome for end in parts.jobs.finished] == ["cancelled"]
    assert parts.engines.next_deadline(time.monotonic()) > 0
