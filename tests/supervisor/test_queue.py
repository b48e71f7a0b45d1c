"""The queue chooses the next image by priority, then in turn between lanes or by arrival."""

from parts import Parts
from promptdrop.spool.job import ImageState
from promptdrop.supervisor.queue import Queue


def turns(queue: Queue) -> list[str]:
    """Every image in the order it is taken."""
    order = []
    while taken := queue.take():
        order.append(f"{taken[0].path}:{taken[1]}")
    return order


def queue_of(parts: Parts, policy: str) -> Queue:
    """Two jobs of one folder, one of another, one at the root, one urgent."""
    queue = Queue(policy)
    for sub, file, priority, images in (
        ("ann", "1.txt", 0, 2), ("ann", "2.txt", 0, 1), ("bob", "1.txt", 0, 2),
        ("", "x.txt", 0, 2), ("ann/deep", "hot.txt", 5, 1),
    ):  # fmt: skip
        job = parts.job(f"{sub}/{file}" if sub else file, images, priority)
        queue.add(job, job.todo())
    return queue


def test_fair_takes_turns_between_folders(parts: Parts) -> None:
    """One image from each top-level folder with work; a job at the root is a lane of its own."""
    assert turns(queue_of(parts, "fair")) == [
        "ann/deep/hot.txt:1", "ann/1.txt:1", "bob/1.txt:1", "x.txt:1",
        "ann/1.txt:2", "bob/1.txt:2", "x.txt:2", "ann/2.txt:1",
    ]  # fmt: skip


def test_fifo_goes_by_arrival(parts: Parts) -> None:
    """Within a priority, who came first is rendered first."""
    assert turns(queue_of(parts, "fifo")) == [
        "ann/deep/hot.txt:1", "ann/1.txt:1", "ann/1.txt:2", "ann/2.txt:1",
        "bob/1.txt:1", "bob/1.txt:2", "x.txt:1", "x.txt:2",
    ]  # fmt: skip


def test_an_image_that_daemons_die_of_goes_behind(parts: Parts) -> None:
    """After three deaths in a row it goes behind all other work, also when it is put back."""
    queue = Queue()
    suspect = parts.job("suspect.txt", images=2, priority=9)
    suspect.states[1] = ImageState(deaths=3)
    other = parts.job("other.txt", priority=-9)
    queue.add(suspect, suspect.todo())
    queue.add(other, other.todo())
    first = [queue.take() for _ in range(3)]
    queue.put_back(suspect, 1)
    queue.put_back(other, 1)

    assert [(t[0].path, t[1]) for t in first if t] == [
        ("suspect.txt", 2), ("other.txt", 1), ("suspect.txt", 1),
    ]  # fmt: skip
    assert turns(queue) == ["other.txt:1", "suspect.txt:1"]


def test_an_image_that_was_put_back_is_next(parts: Parts) -> None:
    """It is the next of its job, but the last if it may be poison. The queue counts both."""
    queue, job = Queue(), parts.job(images=3)
    queue.add(job, job.todo())
    for behind in (False, True):
        taken = queue.take()
        assert taken
        queue.put_back(*taken, behind)

    assert len(queue) == 3
    assert turns(queue) == ["a.txt:2", "a.txt:3", "a.txt:1"]


def test_a_dropped_job_leaves_no_image(parts: Parts) -> None:
    """The queue counts and takes only the images of other jobs."""
    queue = queue_of(parts, "fair")
    first = queue.take()
    assert first
    queue.drop(first[0])
    cancelled = parts.job("late.txt")
    queue.add(cancelled, cancelled.todo())
    queue.drop(cancelled)

    assert len(queue) == len(turns(queue)) == 7
