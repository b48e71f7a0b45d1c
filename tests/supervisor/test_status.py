"""The content of the status, and when it is reported to whom."""

import json
import time
from typing import Any

import pytest

from parts import Parts
from promptdrop.records import Status
from promptdrop.supervisor.reporting import HEARTBEAT_SECONDS, STATUS_SECONDS, OutboxCopy, Reporter
from promptdrop.supervisor.status import one_line


def reporter_of(parts: Parts, told: list[Status] | None = None) -> Reporter:
    """A reporter on these parts, whose recovery is over."""
    parts.recovery.is_looking = False
    return Reporter(
        parts.work, parts.loop, parts.spool, parts.recovery, parts.composer, parts.notifier,
        on_change=None if told is None else told.append,
    )  # fmt: skip


def written(parts: Parts) -> dict[str, Any]:
    """status.json as it stands."""
    loaded: dict[str, Any] = json.loads(parts.spool.paths.status.read_bytes())
    return loaded


# --- what it says ---------------------------------------------------------------------------------


def test_the_state_is_one_word(parts: Parts) -> None:
    """If several states fit, the most urgent one is shown."""
    states = [parts.composer.state()]
    (engine,) = parts.warm()
    states.append(parts.composer.state())
    parts.look()
    parts.accept(parts.job())
    parts.feed()
    states.append(parts.composer.state())
    parts.look(trouble="because")
    states.append(parts.composer.state())
    parts.look(paused="because", trouble="because")
    states.append(parts.composer.state())
    parts.gate.stop_at = 5.0
    states.append(parts.composer.state())

    assert states == ["starting", "ready", "rendering", "waiting", "paused", "stopping"]
    assert len(engine.renders()) == 1


def test_an_image_in_hand_is_shown_with_its_step(parts: Parts) -> None:
    """The status says whose it is and how long it has taken."""
    parts.look()
    (engine,) = parts.warm()
    parts.accept(job := parts.job("sub/a.txt", images=2))
    parts.feed()
    engine.begin(1)
    parts.hear()
    status = parts.composer.compose("rendering", time.monotonic() + 100)

    assert status.current
    assert (status.current.job, status.current.file) == (job.id, "sub/a.txt")
    assert (status.current.image, status.current.images) == (1, 2)
    assert status.current.seconds >= 100
    assert status.queue.images == 2
    assert one_line(status).startswith("rendering, sub/a.txt 1/2, 2 images queued")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"reason": "because", "state": "waiting"}, "waiting: because"),
        ({"state": "ready"}, "ready, 0 images queued"),
        ({}, "stopped; 0 images queued"),
    ],
)
def test_systemctl_shows_one_line(parts: Parts, changes: dict[str, Any], line: str) -> None:
    """It says why work waits, or else what is done."""
    status = parts.composer.compose("starting", 0.0)

    assert one_line(status.model_copy(update=changes)) == line


# --- when it is told ------------------------------------------------------------------------------


def test_news_is_written_at_most_once_a_second(parts: Parts) -> None:
    """Without news it is written every HEARTBEAT_SECONDS, so that readers know that we live."""
    reporter, shown = reporter_of(parts), []
    now = 1000.0
    reporter.report(now)
    for after, news in (
        (0.5, True),
        (STATUS_SECONDS, True),
        (2.0, False),
        (HEARTBEAT_SECONDS, False),
    ):
        before = reporter.shown
        if news:
            parts.publishing.published += 1
        reporter.report(now + after)
        shown.append(reporter.shown is not before)
        now = now + after if shown[-1] else now

    assert shown == [False, True, False, True]
    assert written(parts)["images_published"] == 2


def test_the_end_of_a_job_is_told_at_once(parts: Parts) -> None:
    """It does not wait for a second to pass, since people who wait for the job read the status."""
    reporter = reporter_of(parts)
    reporter.report(1000.0)
    parts.accept(job := parts.job())
    parts.jobs.cancel([job.id], lambda: None, lambda _: None)
    parts.until(lambda: parts.jobs.finished, "the end of the job")
    reporter.report(1000.0)

    assert [end["id"] for end in written(parts)["finished"]] == [job.id]


def test_a_job_that_waits_does_not_keep_the_loop_awake(parts: Parts) -> None:
    """A pause may last all night, and a model loads for minutes: without news a look a second is enough."""
    reporter = reporter_of(parts)
    parts.look(paused="because")
    parts.accept(parts.job())
    dues = []
    for now in (1000.0, 1000.5, 1001.5, 1005.0):
        reporter.report(now)
        dues.append(reporter.next_deadline(now))

    assert dues == [1001.0, 1001.0, 1002.5, 1006.0]


def test_a_progress_bar_hears_ten_times_a_second(parts: Parts) -> None:
    """It does so whether or not there is news."""
    told: list[Status] = []
    reporter = reporter_of(parts, told)
    for tenth in range(5):
        reporter.report(1000.0 + tenth / 20)

    assert len(told) == 3


def test_the_outbox_has_a_copy(parts: Parts) -> None:
    """The herald writes it, and again only when the status has changed, a second after that write's end."""
    copy, path = OutboxCopy(parts.loop, parts.spool), parts.spool.paths.shared_status
    first = parts.composer.compose("starting", 0.0)
    second = parts.composer.compose("ready", 0.0)
    copy.update(first, began := time.monotonic())
    while_writing = copy.due(second)
    parts.until(lambda: copy.due(second) < float("inf"), "the copy")
    ended = time.monotonic()
    copy.update(second, began + STATUS_SECONDS)
    state = json.loads(path.read_bytes())["state"]

    assert while_writing == copy.due(first) == float("inf")
    assert began < copy.due(second) - STATUS_SECONDS <= ended
    assert state == "starting"


def test_the_last_word_is_that_it_stops(parts: Parts) -> None:
    """status.json always says so; the outbox only if it does not hang."""
    reporter = reporter_of(parts)
    reporter.report_last(1000.0, share=False)

    assert written(parts)["state"] == "stopping"
    assert not parts.spool.paths.shared_status.exists()
