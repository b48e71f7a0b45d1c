"""Each command in the control folder is carried out exactly once, whatever a look lists."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from promptdrop.intake.intake import Survey
from promptdrop.spool import control
from promptdrop.spool.control import Cancel, Retry
from promptdrop.spool.job import Job
from promptdrop.supervisor import commands
from promptdrop.supervisor.supervisor import Supervisor
from rooms import Rooms

Logged = Callable[[str], list[dict[str, Any]]]


def send(rooms: Rooms, command: control.Command) -> None:
    """Leave a command in the control folder."""
    control.send(rooms.spool.paths.control, command)


def listing(rooms: Rooms) -> tuple[control.Command, ...]:
    """The commands that a look finds in the control folder now."""
    return control.read(rooms.spool.paths.control)


def obey(rooms: Rooms, found: tuple[control.Command, ...]) -> None:
    """Take in what a look has found, and turn until it is carried out."""
    rooms.commands.surveyed(found)
    rooms.until(lambda: not rooms.commands.is_busy, "the end of a command")


def cancelled_job(rooms: Rooms, path: str = "a.txt") -> Job:
    """A job whose file lies in failed/ and waits for a retry."""
    job = rooms.job(path)
    rooms.accept(job)
    send(rooms, Cancel((job.id,)))
    obey(rooms, listing(rooms))
    rooms.until(lambda: not rooms.work.running, "the end of a job")
    obey(rooms, listing(rooms))  # a look that began afterwards
    return job


def test_a_retry_that_a_stale_look_lists_is_not_repeated(rooms: Rooms, logged: Logged) -> None:
    """The look began before the clerk removed the file, and its result came afterwards."""
    send(rooms, Retry(("nothing.txt",)))
    found, stale = listing(rooms), listing(rooms)
    obey(rooms, found)
    obey(rooms, stale)

    assert [c.file for c in stale] == [c.file for c in found]
    assert listing(rooms) == ()
    assert len(logged("job.not_retried")) == 1


def test_a_job_that_failed_again_is_not_retried_by_a_stale_look(
    rooms: Rooms, logged: Logged
) -> None:
    """One `promptdrop retry` is one retry, however fast the job fails."""
    job = cancelled_job(rooms)
    send(rooms, Retry(("a.txt",)))
    found, stale = listing(rooms), listing(rooms)
    obey(rooms, found)
    rooms.jobs.cancel([job.id], lambda: None, lambda: None)
    rooms.until(lambda: not rooms.work.running, "its second end")
    obey(rooms, stale)

    assert len(logged("job.retried")) == 1
    assert (rooms.spool.paths.failed / "a.txt").exists()


def test_a_command_is_not_begun_again_while_it_is_carried_out(rooms: Rooms, logged: Logged) -> None:
    """Looks go on while the clerk is slow."""
    send(rooms, Retry(("nothing.txt",)))
    for _ in range(3):
        rooms.commands.surveyed(listing(rooms))
    rooms.until(lambda: not rooms.commands.is_busy, "the end of the command")

    assert len(logged("job.not_retried")) == 1


def test_a_new_command_under_an_old_name_is_obeyed(rooms: Rooms, logged: Logged) -> None:
    """The first look after the removal may be stale, so it is the next one that obeys."""
    send(rooms, Retry(("nothing.txt",)))
    (command,) = listing(rooms)
    text = (rooms.spool.paths.control / command.file).read_text()
    obey(rooms, (command,))
    (rooms.spool.paths.control / command.file).write_text(text)
    for _ in range(3):
        obey(rooms, listing(rooms))

    assert len(logged("job.not_retried")) == 2
    assert listing(rooms) == ()


def test_a_retry_of_many_leaves_the_clerk_to_others(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    """It is carried out in parts, each target once, and its file goes at the end."""
    monkeypatch.setattr(commands, "RETRY_SECONDS", 0.0)
    send(rooms, Retry(tuple(f"{n}.txt" for n in range(5))))
    found = listing(rooms)
    slices: list[int] = []

    def is_done() -> bool:
        slices.append(len(logged("job.not_retried")))
        return not rooms.commands.is_busy

    rooms.commands.surveyed(found)
    rooms.until(is_done, "the end of the command")

    assert len(slices) > 5
    assert slices[-1] == 5


def test_trouble_with_a_disk_repeats_no_target(rooms: Rooms, logged: Logged) -> None:
    """Targets that were retried are not retried again when the rest is."""
    cancelled_job(rooms, "a.txt")
    send(rooms, Retry(("a.txt", "nothing.txt")))
    failed, away = rooms.spool.paths.failed, rooms.spool.paths.root / "away"
    failed.rename(away)
    rooms.commands.surveyed(listing(rooms))
    rooms.until(lambda: rooms.loop.trouble, "trouble")
    away.rename(failed)
    rooms.until(lambda: not rooms.commands.is_busy, "the end of the command")

    assert len(logged("job.retried")) == 1
    assert len(logged("job.not_retried")) == 1


def test_commands_wait_until_every_job_is_known(rooms: Rooms) -> None:
    """After a start, jobs are handed on in slices, and a cancel may name one that comes later."""
    jobs = [rooms.job(f"{n}.txt") for n in range(3)]
    daemon = Supervisor(rooms.config)
    send(rooms, Cancel((jobs[2].id,)))
    survey = Survey(None, None, None, listing(rooms), {}, 0.0)
    daemon._recovery.start()
    turn(daemon, lambda: not daemon._recovery.is_looking)
    daemon._recovery.go_on(now=-1.0)  # no time for any in this turn
    daemon.surveyed(survey)
    early = daemon._commands.is_busy, listing(rooms)
    while not daemon._recovery.is_over:
        daemon._recovery.go_on(time.monotonic())
    daemon.surveyed(survey)
    turn(daemon, lambda: not daemon._commands.is_busy)

    assert early == (False, survey.commands)
    assert [one.job.cancelled for one in daemon._work.running.values()] == [False, False, True]
    daemon._intake.close()
    assert daemon._loop.close()


def turn(daemon: Supervisor, condition: Callable[[], Any]) -> None:
    """Turn a daemon's loop by hand."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        daemon._loop.wait([], [], deadline)
        daemon._loop.run_results()
