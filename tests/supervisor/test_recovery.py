"""After a start, jobs of the last life are handed on in slices."""

import time

from promptdrop.spool.job import DEATHS_FAILED
from rooms import Rooms


def recovered(rooms: Rooms) -> None:
    """Look at the disk, and wait for the result."""
    rooms.recovery.start()
    rooms.until(lambda: not rooms.recovery.is_looking, "the recovery")


def test_a_turn_hands_on_only_so_many_jobs(rooms: Rooms) -> None:
    """A turn stays short, and the recovery is not over until all are handed on."""
    for n in range(3):
        rooms.job(f"{n}.txt")
    recovered(rooms)
    rooms.recovery.go_on(now=time.monotonic() - 1)  # no time for any in this turn
    early = list(rooms.work.running), rooms.recovery.is_over
    while not rooms.recovery.is_over:
        rooms.recovery.go_on(time.monotonic())

    assert early == ([], False)
    assert [running.job.path for running in rooms.work.running.values()] == [
        "0.txt", "1.txt", "2.txt",
    ]  # fmt: skip


def test_an_empty_spool_is_recovered_at_once(rooms: Rooms) -> None:
    """The recovery is over at once, so commands need not wait."""
    recovered(rooms)

    assert rooms.recovery.is_over


def test_an_image_that_daemons_died_of_is_given_up(rooms: Rooms) -> None:
    """It fails after DEATHS_FAILED deaths in a row with it in hand; other images are rendered."""
    job = rooms.job(images=2)
    (job.home / "0001.begun").write_text(f'{{"attempts": 0, "deaths": {DEATHS_FAILED}}}')
    recovered(rooms)
    rooms.recovery.go_on(time.monotonic())
    (running,) = rooms.work.running.values()

    assert running.left == 1
    assert running.job.states[1].error == (
        f"the daemon died {DEATHS_FAILED} times with this image in hand"
    )
