"""NAME.cancel in the inbox withdraws the one job it names, exactly once, or is turned away."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts import Parts
from promptdrop.intake.inbox import Inbox
from spools import put

MakeParts = Callable[..., Parts]
Logged = Callable[[str], list[dict[str, Any]]]


def touch(parts: Parts, path: str) -> Path:
    """Make SUB/NAME.cancel in the inbox."""
    file = parts.spool.paths.inbox / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file


def listing(parts: Parts, now: float = 0.0) -> dict[str, float]:
    """The cancel marks that a look at the inbox finds: SUB/NAME.cancel -> when it was first seen."""
    return Inbox(parts.spool.paths.inbox).scan(now, parts.config.watch, True).cancels


def heed(parts: Parts, found: dict[str, float]) -> None:
    """Take in what a look has found, and turn until the clerk is done with it."""
    parts.cancels.surveyed(found)
    parts.until(lambda: not parts.cancels.is_busy, "the end of a cancel")


def until_refused(parts: Parts) -> None:
    """Turn until a file that was turned away lies in failed/."""
    ends = len(parts.jobs.finished)
    parts.until(lambda: len(parts.jobs.finished) > ends, "a refused file")


def test_a_cancel_names_a_file_a_job_or_an_id(parts: Parts, logged: Logged) -> None:
    """Upper and lower case are the same. A FILE or JOB counts in its own folder, an id anywhere."""
    jobs = [parts.job(path) for path in ("a.txt", "sub/b.txt", "c.txt")]
    for job in jobs:
        parts.accept(job)
    for name in ("A.TXT.cancel", "sub/b.cancel", f"{jobs[2].id}.cancel"):
        touch(parts, name)
    heed(parts, listing(parts))

    assert {line["job"] for line in logged("job.cancelling")} == {job.id for job in jobs}
    assert listing(parts) == {}


def test_a_cancel_that_a_stale_look_lists_spares_the_next_job(parts: Parts, logged: Logged) -> None:
    """The next file of that name is another job, which nobody has cancelled."""
    parts.accept(parts.job("a.txt"))
    touch(parts, "a.txt.cancel")
    found, stale = listing(parts), listing(parts)
    heed(parts, found)
    parts.until(lambda: not parts.work.running, "the end of the job")
    parts.accept(parts.job("a.txt"))
    heed(parts, stale)

    assert len(logged("job.cancelling")) == 1
    assert [running.job.cancelled for running in parts.work.running.values()] == [False]


def test_a_cancel_of_the_next_job_is_heeded(parts: Parts, logged: Logged) -> None:
    """Though it has the name of the first one, the look after the one that may be stale brings it."""
    for _ in range(2):
        parts.accept(parts.job("a.txt"))
        touch(parts, "a.txt.cancel")
        for _ in range(2):
            heed(parts, listing(parts))
        parts.until(lambda: not parts.work.running, "the end of the job")

    assert len(logged("job.cancelling")) == 2


def test_a_cancel_that_names_nothing_waits_and_is_turned_away(make_parts: MakeParts) -> None:
    """It is turned away after watch.give_up_seconds; until then its job may still be claimed."""
    parts = make_parts({"watch": {"give_up_seconds": 1}})
    touch(parts, "a.cancel")
    heed(parts, listing(parts, now=1e18))
    early = listing(parts)
    heed(parts, listing(parts, now=-1.0))
    until_refused(parts)

    assert list(early) == ["a.cancel"]
    assert parts.jobs.finished[-1].error == "names no job that waits or is being rendered"
    assert (parts.spool.paths.failed / "a.cancel").exists()


def test_a_cancel_waits_while_its_file_is_on_the_way(make_parts: MakeParts, logged: Logged) -> None:
    """However long it takes to read and record a file, its mark is not turned away meanwhile."""
    parts = make_parts({"watch": {"give_up_seconds": 0}})
    reader_may_go_on = threading.Event()
    parts.loop.off("reader", reader_may_go_on.wait, lambda _: None)
    put(parts.spool, "sub/a.txt")
    now = time.monotonic()
    for look in (now, now + 60):
        parts.intake.look(look)
        parts.until(lambda look=look: parts.intake.next_look() < float("inf"), "the end of a look")
    touch(parts, "sub/A.cancel")
    heed(parts, {"sub/A.cancel": -1.0})
    early = list(logged("job.cancelling")), list(parts.jobs.finished), parts.intake.is_idle()
    reader_may_go_on.set()
    parts.until(lambda: parts.work.running, "a job")
    heed(parts, {"sub/A.cancel": -1.0})

    assert early == ([], [], False)
    assert len(logged("job.cancelling")) == 1


def test_images_begin_once_the_first_marks_are_obeyed(parts: Parts) -> None:
    """A job that was withdrawn while no daemon ran is not rendered first."""
    (engine,) = parts.warm()
    parts.accept(parts.job("a.txt"))
    touch(parts, "a.cancel")
    clerk_may_go_on = threading.Event()
    parts.loop.off("clerk", clerk_may_go_on.wait, lambda _: None)
    parts.cancels.surveyed(listing(parts))
    parts.feed()
    early = engine.renders(), parts.gate.lets_images_begin
    clerk_may_go_on.set()
    parts.until(lambda: parts.gate.lets_images_begin, "the gate")
    parts.feed()

    assert early == ([], False)
    assert engine.renders() == []


def test_a_name_that_fits_two_jobs_cancels_neither(make_parts: MakeParts) -> None:
    """Both are named in the reason."""
    parts = make_parts({"watch": {"give_up_seconds": 0}})
    for path in ("a.txt", "a.md"):
        parts.accept(parts.job(path))
    parts.accept(parts.job("a.txt"))
    touch(parts, "a.txt.cancel")
    heed(parts, listing(parts, now=-1.0))
    until_refused(parts)

    assert str(parts.jobs.finished[-1].error).startswith("names 2 jobs: ")
    assert not any(running.job.cancelled for running in parts.work.running.values())


def test_the_name_of_one_turned_away_is_free_again(make_parts: MakeParts, logged: Logged) -> None:
    """Another NAME.cancel may stand there before any look has missed the first."""
    parts = make_parts({"watch": {"give_up_seconds": 0}})
    touch(parts, "a.cancel")
    heed(parts, listing(parts, now=-1.0))
    until_refused(parts)
    parts.accept(parts.job("a.txt"))
    touch(parts, "a.cancel")
    for _ in range(2):
        heed(parts, listing(parts, now=-1.0))

    assert len(logged("job.cancelling")) == 1
