"""After a start, jobs of the last life are handed on in slices."""

import time

from parts import Parts
from promptdrop.spool import claim, record
from promptdrop.spool.job import DEATHS_FAILED


def recovered(parts: Parts) -> None:
    """Look at the disk, and wait for the result."""
    parts.recovery.start()
    parts.until(lambda: not parts.recovery.is_looking, "the recovery")


def test_a_turn_hands_on_only_so_many_jobs(parts: Parts) -> None:
    """A turn stays short, and the recovery is not over until all are handed on."""
    for n in range(3):
        parts.job(f"{n}.txt")
    recovered(parts)
    parts.recovery.go_on(now=time.monotonic() - 1)  # no time for any in this turn
    early = list(parts.work.running), parts.recovery.is_over
    while not parts.recovery.is_over:
        parts.recovery.go_on(time.monotonic())

    assert early == ([], False)
    assert [running.job.path for running in parts.work.running.values()] == [
        "0.txt", "1.txt", "2.txt",
    ]  # fmt: skip


def test_an_empty_spool_is_recovered_at_once(parts: Parts) -> None:
    """The recovery is over at once, so commands need not wait."""
    recovered(parts)

    assert parts.recovery.is_over


def test_an_image_that_daemons_died_of_is_given_up(parts: Parts) -> None:
    """It fails after DEATHS_FAILED deaths in a row with it in hand; other images are rendered."""
    job = parts.job(images=2)
    (job.home / "0001.begun").write_text(f'{{"attempts": 0, "deaths": {DEATHS_FAILED}}}')
    recovered(parts)
    parts.recovery.go_on(time.monotonic())
    (running,) = parts.work.running.values()

    assert running.left == 1
    assert running.job.states[1].error == (
        f"the daemon died {DEATHS_FAILED} times with this image in hand"
    )


def test_a_job_that_cannot_be_recovered_holds_nobody_up(parts: Parts) -> None:
    """One of its records can be neither read nor removed: it waits with the reason until that is over."""
    sick, well = parts.job("sick/a.txt"), parts.job("well/b.txt")
    for job in (sick, well):
        claim.take(job)
        record.begin_image(job, 1)
    (obstacle := sick.record_path(1, "publishing")).mkdir()
    recovered(parts)
    parts.recovery.go_on(time.monotonic())
    at_first = [running.job.path for running in parts.work.running.values()]
    parts.until(lambda: list(parts.gate.stuck()), "trouble")
    (stuck,) = parts.gate.stuck()
    obstacle.rmdir()
    parts.until(lambda: not parts.recovery.troubled, "the other job")

    assert at_first == ["well/b.txt"]
    assert (stuck.name, "0001.publishing" in stuck.why) == (sick.id, True)
    assert [one.job.path for one in parts.work.running.values()] == ["well/b.txt", "sick/a.txt"]
