"""The turn between lanes."""

from promptdrop.spool.job import ImageState
from promptdrop.spool.spool import Spool
from promptdrop.supervisor.queue import Queue
from spools import claimed_job


def turns(queue: Queue) -> list[str]:
    """Every image in the order it is taken."""
    order = []
    while taken := queue.take():
        order.append(f"{taken[0].path}:{taken[1]}")
    return order


def queue_of(spool: Spool, policy: str) -> Queue:
    """Two jobs of one folder, one of another, one at the root, one urgent."""
    queue = Queue(policy)
    for path, priority, images in (
        ("ann/1.txt", 0, 2), ("ann/2.txt", 0, 1), ("bob/1.txt", 0, 2),
        ("x.txt", 0, 2), ("ann/deep/hot.txt", 5, 1),
    ):  # fmt: skip
        job = claimed_job(spool, path, priority, images)
        queue.add(job, job.todo())
    return queue


def test_fair_takes_turns_between_folders(spool: Spool) -> None:
    """One image from each top-level folder with work; a job at the root is a lane of its own."""
    assert turns(queue_of(spool, "fair")) == [
        "ann/deep/hot.txt:1", "ann/1.txt:1", "bob/1.txt:1", "x.txt:1",
        "ann/1.txt:2", "bob/1.txt:2", "x.txt:2", "ann/2.txt:1",
    ]  # fmt: skip


def test_fifo_goes_by_arrival(spool: Spool) -> None:
    """Within a priority, the job that came first is rendered first."""
    assert turns(queue_of(spool, "fifo")) == [
        "ann/deep/hot.txt:1", "ann/1.txt:1", "ann/1.txt:2", "ann/2.txt:1",
        "bob/1.txt:1", "bob/1.txt:2", "x.txt:1", "x.txt:2",
    ]  # fmt: skip


def test_an_image_that_daemons_die_of_goes_behind(spool: Spool) -> None:
    """Three deaths in a row with it in hand: behind all other work, also when it is put back."""
    queue = Queue()
    suspect = claimed_job(spool, "suspect.txt", priority=9, images=2)
    suspect.states[1] = ImageState(deaths=3)
    other = claimed_job(spool, "other.txt", priority=-9)
    queue.add(suspect, suspect.todo())
    queue.add(other, other.todo())
    first = [queue.take() for _ in range(3)]
    queue.put_back(suspect, 1)
    queue.put_back(other, 1)

    assert [(t[0].path, t[1]) for t in first if t] == [
        ("suspect.txt", 2), ("other.txt", 1), ("suspect.txt", 1),
    ]  # fmt: skip
    assert turns(queue) == ["other.txt:1", "suspect.txt:1"]
