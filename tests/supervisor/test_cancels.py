"""NAME.cancel in the inbox withdraws the one job it names, exactly once, or is turned away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from promptdrop.intake.inbox import Inbox
from rooms import Rooms

MakeRooms = Callable[..., Rooms]
Logged = Callable[[str], list[dict[str, Any]]]


def touch(rooms: Rooms, path: str) -> Path:
    """Make SUB/NAME.cancel in the inbox."""
    file = rooms.spool.paths.inbox / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file


def listing(rooms: Rooms, now: float = 0.0) -> dict[str, float]:
    """The cancel marks that a look at the inbox finds: SUB/NAME.cancel -> when it was first seen."""
    return Inbox(rooms.spool.paths.inbox).scan(now, rooms.config.watch, True).cancels


def heed(rooms: Rooms, found: dict[str, float]) -> None:
    """Take in what a look has found, and turn until the clerk is done with it."""
    rooms.cancels.surveyed(found)
    rooms.until(lambda: not rooms.cancels.is_busy, "the end of a cancel")


def until_refused(rooms: Rooms) -> None:
    """Turn until a file that was turned away lies in failed/."""
    ends = len(rooms.jobs.finished)
    rooms.until(lambda: len(rooms.jobs.finished) > ends, "a refused file")


def test_a_cancel_names_a_file_a_job_or_an_id(rooms: Rooms, logged: Logged) -> None:
    """Upper and lower case are the same. A FILE or JOB counts in its own folder, an id anywhere."""
    jobs = [rooms.job(path) for path in ("a.txt", "sub/b.txt", "c.txt")]
    for job in jobs:
        rooms.accept(job)
    for name in ("A.TXT.cancel", "sub/b.cancel", f"{jobs[2].id}.cancel"):
        touch(rooms, name)
    heed(rooms, listing(rooms))

    assert {line["job"] for line in logged("job.cancelling")} == {job.id for job in jobs}
    assert listing(rooms) == {}


def test_a_cancel_that_a_stale_look_lists_spares_the_next_job(rooms: Rooms, logged: Logged) -> None:
    """The next file of that name is another job, which nobody has cancelled."""
    rooms.accept(rooms.job("a.txt"))
    touch(rooms, "a.txt.cancel")
    found, stale = listing(rooms), listing(rooms)
    heed(rooms, found)
    rooms.until(lambda: not rooms.work.running, "the end of the job")
    rooms.accept(rooms.job("a.txt"))
    heed(rooms, stale)

    assert len(logged("job.cancelling")) == 1
    assert [running.job.cancelled for running in rooms.work.running.values()] == [False]


def test_a_cancel_of_the_next_job_is_heeded(rooms: Rooms, logged: Logged) -> None:
    """Though it has the name of the first one, the look after the one that may be stale brings it."""
    for _ in range(2):
        rooms.accept(rooms.job("a.txt"))
        touch(rooms, "a.txt.cancel")
        for _ in range(2):
            heed(rooms, listing(rooms))
        rooms.until(lambda: not rooms.work.running, "the end of the job")

    assert len(logged("job.cancelling")) == 2


def test_a_cancel_that_names_nothing_waits_and_is_turned_away(make_rooms: MakeRooms) -> None:
    """It is turned away after watch.give_up_seconds; until then its job may still be claimed."""
    rooms = make_rooms({"watch": {"give_up_seconds": 1}})
    touch(rooms, "a.cancel")
    heed(rooms, listing(rooms, now=1e18))
    early = listing(rooms)
    heed(rooms, listing(rooms, now=-1.0))
    until_refused(rooms)

    assert list(early) == ["a.cancel"]
    assert rooms.jobs.finished[-1].error == "names no job that waits or is being rendered"
    assert (rooms.spool.paths.failed / "a.cancel").exists()


def test_a_name_that_fits_two_jobs_cancels_neither(make_rooms: MakeRooms) -> None:
    """Both are named in the reason."""
    rooms = make_rooms({"watch": {"give_up_seconds": 0}})
    for path in ("a.txt", "a.md"):
        rooms.accept(rooms.job(path))
    rooms.accept(rooms.job("a.txt"))
    touch(rooms, "a.txt.cancel")
    heed(rooms, listing(rooms, now=-1.0))
    until_refused(rooms)

    assert str(rooms.jobs.finished[-1].error).startswith("names 2 jobs: ")
    assert not any(running.job.cancelled for running in rooms.work.running.values())


def test_the_name_of_one_turned_away_is_free_again(make_rooms: MakeRooms, logged: Logged) -> None:
    """Another NAME.cancel may stand there before any look has missed the first."""
    rooms = make_rooms({"watch": {"give_up_seconds": 0}})
    touch(rooms, "a.cancel")
    heed(rooms, listing(rooms, now=-1.0))
    until_refused(rooms)
    rooms.accept(rooms.job("a.txt"))
    touch(rooms, "a.cancel")
    for _ in range(2):
        heed(rooms, listing(rooms, now=-1.0))

    assert len(logged("job.cancelling")) == 1
