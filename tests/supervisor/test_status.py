"""The content of the status, and when it is reported to whom."""

import json
import time
from typing import Any

import pytest

from promptdrop.records import Status
from promptdrop.supervisor.reporting import HEARTBEAT_SECONDS, STATUS_SECONDS, OutboxCopy, Reporter
from promptdrop.supervisor.status import one_line
from rooms import Rooms


def reporter_of(rooms: Rooms, told: list[Status] | None = None) -> Reporter:
    """A reporter on these rooms, whose recovery is over."""
    rooms.recovery.is_looking = False
    return Reporter(
        rooms.work, rooms.loop, rooms.spool, rooms.recovery, rooms.composer, rooms.notifier,
        on_change=None if told is None else told.append,
    )  # fmt: skip


def written(rooms: Rooms) -> dict[str, Any]:
    """status.json as it stands."""
    loaded: dict[str, Any] = json.loads(rooms.spool.paths.status.read_bytes())
    return loaded


# --- what it says ---------------------------------------------------------------------------------


def test_the_state_is_one_word(rooms: Rooms) -> None:
    """If several states fit, the most urgent one is shown."""
    states = [rooms.composer.state()]
    (engine,) = rooms.warm()
    states.append(rooms.composer.state())
    rooms.look()
    rooms.accept(rooms.job())
    rooms.feed()
    states.append(rooms.composer.state())
    rooms.look(trouble="because")
    states.append(rooms.composer.state())
    rooms.look(paused="because", trouble="because")
    states.append(rooms.composer.state())
    rooms.gate.stop_at = 5.0
    states.append(rooms.composer.state())

    assert states == ["starting", "ready", "rendering", "waiting", "paused", "stopping"]
    assert len(engine.renders()) == 1


def test_an_image_in_hand_is_shown_with_its_step(rooms: Rooms) -> None:
    """The status says whose it is and how long it has taken."""
    rooms.look()
    (engine,) = rooms.warm()
    rooms.accept(job := rooms.job("sub/a.txt", images=2))
    rooms.feed()
    engine.begin(1)
    rooms.hear()
    status = rooms.composer.compose("rendering", time.monotonic() + 100)

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
def test_systemctl_shows_one_line(rooms: Rooms, changes: dict[str, Any], line: str) -> None:
    """It says why work waits, or else what is done."""
    status = rooms.composer.compose("starting", 0.0)

    assert one_line(status.model_copy(update=changes)) == line


# --- when it is told ------------------------------------------------------------------------------


def test_news_is_written_at_most_once_a_second(rooms: Rooms) -> None:
    """Without news it is written every HEARTBEAT_SECONDS, so that readers know that we live."""
    reporter, shown = reporter_of(rooms), []
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
            rooms.publishing.published += 1
        reporter.report(now + after)
        shown.append(reporter.shown is not before)
        now = now + after if shown[-1] else now

    assert shown == [False, True, False, True]
    assert written(rooms)["images_published"] == 2


def test_the_end_of_a_job_is_told_at_once(rooms: Rooms) -> None:
    """It does not wait for a second to pass, since people who wait for the job read the status."""
    reporter = reporter_of(rooms)
    reporter.report(1000.0)
    rooms.accept(job := rooms.job())
    rooms.jobs.cancel([job.id], lambda: None, lambda: None)
    rooms.until(lambda: rooms.jobs.finished, "the end of the job")
    reporter.report(1000.0)

    assert [end["id"] for end in written(rooms)["finished"]] == [job.id]


def test_a_job_that_waits_does_not_keep_the_loop_awake(rooms: Rooms) -> None:
    """A pause may last all night, and a model loads for minutes: without news a look a second is enough."""
    reporter = reporter_of(rooms)
    rooms.look(paused="because")
    rooms.accept(rooms.job())
    dues = []
    for now in (1000.0, 1000.5, 1001.5, 1005.0):
        reporter.report(now)
        dues.append(reporter.next_deadline(now))

    assert dues == [1001.0, 1001.0, 1002.5, 1006.0]


def test_a_progress_bar_hears_ten_times_a_second(rooms: Rooms) -> None:
    """It does so whether or not there is news."""
    told: list[Status] = []
    reporter = reporter_of(rooms, told)
    for tenth in range(5):
        reporter.report(1000.0 + tenth / 20)

    assert len(told) == 3


def test_the_outbox_has_a_copy(rooms: Rooms) -> None:
    """The herald writes it, and again only when the status has changed and a second has passed."""
    copy, path = OutboxCopy(rooms.loop, rooms.spool), rooms.spool.paths.shared_status
    first = rooms.composer.compose("starting", 0.0)
    second = rooms.composer.compose("ready", 0.0)
    copy.update(first, 1000.0)
    while_writing = copy.due(second)
    rooms.until(lambda: copy.due(second) < float("inf"), "the copy")
    copy.update(second, 1000.5)
    state = json.loads(path.read_bytes())["state"]

    assert while_writing == copy.due(first) == float("inf")
    assert copy.due(second) == 1000.0 + STATUS_SECONDS
    assert state == "starting"


def test_the_last_word_is_that_it_stops(rooms: Rooms) -> None:
    """status.json always says so; the outbox only if it does not hang."""
    reporter = reporter_of(rooms)
    reporter.report_last(1000.0, share=False)

    assert written(rooms)["state"] == "stopping"
    assert not rooms.spool.paths.shared_status.exists()
