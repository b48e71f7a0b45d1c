"""Each command in the control folder is carried out exactly once, whatever a look lists."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from parts import Parts
from promptdrop.intake.intake import Survey
from promptdrop.pool import messages
from promptdrop.spool import control, record, retry
from promptdrop.spool.control import Cancel, Retry
from promptdrop.spool.job import Job
from promptdrop.supervisor import errands
from promptdrop.supervisor.supervisor import Supervisor

Logged = Callable[[str], list[dict[str, Any]]]


def send(parts: Parts, command: control.Command) -> None:
    """Leave a command in the control folder."""
    control.send(parts.spool.paths.control, command)


def listing(parts: Parts) -> tuple[control.Command, ...]:
    """The commands that a look finds in the control folder now."""
    return control.CommandFiles(parts.spool.paths.control).read(0.0)


def obey(parts: Parts, found: tuple[control.Command, ...]) -> None:
    """Take in what a look has found, and turn until it is carried out."""
    parts.commands.surveyed(found)
    parts.until(lambda: not parts.commands.is_busy, "the end of a command")


def cancelled_job(parts: Parts, path: str = "a.txt") -> Job:
    """A job whose file lies in failed/ and waits for a retry."""
    job = parts.job(path)
    parts.accept(job)
    send(parts, Cancel((job.id,)))
    obey(parts, listing(parts))
    parts.until(lambda: not parts.work.running, "the end of a job")
    obey(parts, listing(parts))  # a look that began afterwards
    return job


def test_a_retry_that_a_stale_look_lists_is_not_repeated(parts: Parts, logged: Logged) -> None:
    """The look began before the clerk removed the file, and its result came afterwards."""
    send(parts, Retry(("nothing.txt",)))
    found, stale = listing(parts), listing(parts)
    obey(parts, found)
    obey(parts, stale)

    assert [c.file for c in stale] == [c.file for c in found]
    assert listing(parts) == ()
    assert len(logged("job.not_retried")) == 1


def test_a_job_that_failed_again_is_not_retried_by_a_stale_look(
    parts: Parts, logged: Logged
) -> None:
    """One `promptdrop retry` is one retry, however fast the job fails."""
    job = cancelled_job(parts)
    send(parts, Retry(("a.txt",)))
    found, stale = listing(parts), listing(parts)
    obey(parts, found)
    parts.jobs.cancel([job.id], lambda: None, lambda _: None)
    parts.until(lambda: not parts.work.running, "its second end")
    obey(parts, stale)

    assert len(logged("job.retried")) == 1
    assert (parts.spool.paths.failed / "a.txt").exists()


def test_no_image_of_a_cancelled_job_begins_while_the_clerk_is_slow(parts: Parts) -> None:
    """Those that wait are held, and those sent to an engine recalled, at once; the job ends once the
    clerk has recorded why."""
    (engine,) = parts.warm()
    parts.look()
    clerk_may_go_on = threading.Event()
    parts.accept(job := parts.job(images=3))
    parts.feed()
    tickets = engine.begin()
    parts.hear()
    parts.loop.off("clerk", clerk_may_go_on.wait, lambda _: None)
    send(parts, Cancel((job.id,)))
    parts.commands.surveyed(listing(parts))
    told = [message for message in engine.heard() if isinstance(message, messages.Cancel)]
    for ticket in tickets:
        engine.say(messages.Cancelled(ticket))
    parts.hear()
    parts.feed()
    sent, ended = engine.renders(), not parts.work.running
    clerk_may_go_on.set()
    parts.until(lambda: not parts.work.running, "the end of the job")

    assert told == [messages.Cancel(ticket) for ticket in tickets]
    assert (sent, ended) == ([], False)
    assert parts.jobs.finished[-1].outcome == "cancelled"


def test_a_cancel_waits_for_a_job_that_is_not_accepted_yet(parts: Parts, logged: Logged) -> None:
    """Its record may be on the disk, where `promptdrop cancel` finds it, before the loop has heard of it."""
    job = parts.job()
    send(parts, Cancel((job.id, "20260101T000000000000-abcdef", "../..")))
    obey(parts, listing(parts))
    early = listing(parts)
    parts.accept(job)
    obey(parts, listing(parts))

    assert len(early) == 1
    assert listing(parts) == ()
    assert [line["job"] for line in logged("job.cancelling")] == [job.id]


def test_a_command_is_not_begun_again_while_it_is_carried_out(parts: Parts, logged: Logged) -> None:
    """Looks go on while the clerk is slow."""
    send(parts, Retry(("nothing.txt",)))
    for _ in range(3):
        parts.commands.surveyed(listing(parts))
    parts.until(lambda: not parts.commands.is_busy, "the end of the command")

    assert len(logged("job.not_retried")) == 1


def test_a_new_command_under_an_old_name_is_obeyed(parts: Parts, logged: Logged) -> None:
    """The first look after the removal may be stale, so it is the next one that obeys."""
    send(parts, Retry(("nothing.txt",)))
    (command,) = listing(parts)
    text = (parts.spool.paths.control / command.file).read_text()
    obey(parts, (command,))
    (parts.spool.paths.control / command.file).write_text(text)
    for _ in range(3):
        obey(parts, listing(parts))

    assert len(logged("job.not_retried")) == 2
    assert listing(parts) == ()


def test_a_retry_of_many_leaves_the_clerk_to_others(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    """It is carried out in parts, each target once, and its file goes at the end."""
    monkeypatch.setattr(errands, "SLICE_SECONDS", 0.0)
    send(parts, Retry(tuple(f"{n}.txt" for n in range(5))))
    found = listing(parts)
    slices: list[int] = []

    def is_done() -> bool:
        slices.append(len(logged("job.not_retried")))
        return not parts.commands.is_busy

    parts.commands.surveyed(found)
    parts.until(is_done, "the end of the command")

    assert len(slices) > 5
    assert slices[-1] == 5


def test_trouble_with_a_disk_repeats_no_target(parts: Parts, logged: Logged) -> None:
    """Targets that were retried are not retried again when the rest is."""
    cancelled_job(parts, "a.txt")
    send(parts, Retry(("a.txt", "nothing.txt")))
    failed, away = parts.spool.paths.failed, parts.spool.paths.root / "away"
    failed.rename(away)
    parts.commands.surveyed(listing(parts))
    parts.until(lambda: parts.loop.troubles, "trouble")
    away.rename(failed)
    parts.until(lambda: not parts.commands.is_busy, "the end of the command")

    assert len(logged("job.retried")) == 1
    assert len(logged("job.not_retried")) == 1


@pytest.mark.parametrize("error", [MemoryError, RecursionError, KeyError])
@pytest.mark.parametrize("kind", [Cancel, Retry])
def test_a_command_that_ends_the_daemon_ends_no_second_life(
    parts: Parts,
    monkeypatch: pytest.MonkeyPatch,
    logged: Logged,
    kind: type[Cancel] | type[Retry],
    error: type[Exception],
) -> None:
    """Its file is removed and named before an unknown error goes on."""

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(retry, "retry", fail)
    monkeypatch.setattr(record, "cancel", fail)
    parts.accept(job := parts.job())
    send(parts, kind((job.id,)))
    (command,) = listing(parts)
    parts.commands.surveyed([command])

    with pytest.raises(error):
        parts.until(lambda: not parts.commands.is_busy, "the end of the command")
    assert listing(parts) == ()
    assert [line["file"] for line in logged("command.failed")] == [command.file]


def test_a_command_that_cannot_be_read_to_its_end_ends_no_second_life(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if memory runs out while the scanner reads it."""

    def fail(data: bytes) -> None:
        raise MemoryError

    send(parts, Retry(("a.txt",)))
    monkeypatch.setattr(control.json, "loads", fail)

    with pytest.raises(MemoryError):
        listing(parts)
    assert listing(parts) == ()


def test_a_drop_is_claimed_between_the_cancels_of_one_command(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clerk has its other work between two slices, also between those of two commands."""
    monkeypatch.setattr(errands, "SLICE_SECONDS", 0.0)
    jobs = [parts.job(f"{n}.txt") for n in range(8)]
    for job in jobs:
        parts.accept(job)
    for some in (jobs[:4], jobs[4:]):
        send(parts, Cancel(tuple(job.id for job in some)))
    parts.commands.surveyed(listing(parts))
    seen: list[int] = []
    for times in range(1, 4):
        count = lambda: sum((job.home / "cancelled").exists() for job in jobs)  # noqa: E731
        parts.loop.off("clerk", count, seen.append)
        parts.until(lambda times=times: len(seen) == times, "other work")
    parts.until(lambda: not parts.work.running, "the end of all")

    assert all(n < 8 for n in seen)
    assert [end.outcome for end in parts.jobs.finished] == ["cancelled"] * 8


def test_commands_wait_until_every_job_is_known(parts: Parts) -> None:
    """After a start, jobs are handed on in slices, and a cancel may name one that comes later."""
    jobs = [parts.job(f"{n}.txt") for n in range(3)]
    daemon = Supervisor(parts.config)
    send(parts, Cancel((jobs[2].id,)))
    survey = Survey(None, None, None, listing(parts), {}, 0.0)
    daemon._recovery.start()
    turn(daemon, lambda: not daemon._recovery.is_looking)
    daemon._recovery.go_on(now=-1.0)  # no time for any in this turn
    daemon.surveyed(survey)
    early = daemon._commands.is_busy, listing(parts)
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
