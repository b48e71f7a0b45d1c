"""The queue chooses the next image by priority, then in turn between owners and lanes or by arrival."""

import gc
from typing import Any

import pytest

from parts import Parts
from promptdrop.spool.job import ImageState, Job
from promptdrop.supervisor.queue import IN_A_ROW, Queue

ANN, BOB, CAT = 1001, 1002, 1003  # uids


def turns(queue: Queue) -> list[str]:
    """Every image in the order it is taken."""
    order = []
    while taken := queue.take():
        order.append(f"{taken[0].path}:{taken[1]}")
    return order


def job_of(parts: Parts, owner: int, path: str, images: int = 1, **more: Any) -> Job:
    """A job whose dropped file belongs to this uid."""
    job = parts.job(path, images, **more)
    job.owner = owner
    return job


def queue_of(parts: Parts, policy: str) -> Queue:
    """Of one owner two jobs of one folder, one of another, two at the root, one urgent."""
    queue = Queue(policy)
    for sub, file, priority, images in (
        ("ann", "1.txt", 0, 2), ("ann", "2.txt", 0, 1), ("bob", "1.txt", 0, 2),
        ("", "x.txt", 0, 2), ("", "y.txt", 0, 1), ("ann/deep", "hot.txt", 5, 1),
    ):  # fmt: skip
        job = parts.job(f"{sub}/{file}" if sub else file, images, priority)
        queue.add(job, job.todo())
    return queue


def test_fair_takes_turns_between_folders(parts: Parts) -> None:
    """One image from each top-level folder with work, the root being one more; within each, jobs finish
    one after the other."""
    assert turns(queue_of(parts, "fair")) == [
        "ann/deep/hot.txt:1", "ann/1.txt:1", "bob/1.txt:1", "x.txt:1",
        "ann/1.txt:2", "bob/1.txt:2", "x.txt:2", "ann/2.txt:1", "y.txt:1",
    ]  # fmt: skip


def test_fair_takes_turns_between_owners_first(parts: Parts) -> None:
    """However many folders somebody has, every second image is the other's; his own lanes share his turns."""
    queue = Queue()
    for path in ("a/1.txt", "b/1.txt", "c/1.txt", "generate-x.json", "y.txt"):
        job = job_of(parts, ANN, path, images=2)
        queue.add(job, job.todo())
    job = job_of(parts, BOB, "a/bob.txt", images=3)
    queue.add(job, job.todo())

    assert turns(queue) == [
        "a/1.txt:1", "a/bob.txt:1", "b/1.txt:1", "a/bob.txt:2", "c/1.txt:1", "a/bob.txt:3",
        "generate-x.json:1", "y.txt:1",
        "a/1.txt:2", "b/1.txt:2", "c/1.txt:2", "generate-x.json:2", "y.txt:2",
    ]  # fmt: skip


@pytest.mark.parametrize("policy", ["fair", "fifo"])
def test_a_long_job_goes_behind_its_lane(parts: Parts, policy: str) -> None:
    """After fifty images in a row the others of its lane come first; not so where all go by arrival."""
    queue = Queue(policy)
    for path, images in (("long.txt", 2 * IN_A_ROW + 1), ("short.txt", 2), ("last.txt", 1)):
        job = parts.job(path, images)
        queue.add(job, job.todo())
    order = [turn.partition(":")[0] for turn in turns(queue)]
    others = ["short.txt"] * 2 + ["last.txt"]
    fair = ["long.txt"] * IN_A_ROW + others + ["long.txt"] * (IN_A_ROW + 1)

    assert order == (fair if policy == "fair" else ["long.txt"] * (2 * IN_A_ROW + 1) + others)


def test_who_comes_late_waits_for_one_turn_of_each_other(parts: Parts) -> None:
    """A new owner is behind the others, and so is one who comes back after his work has ended."""
    queue = Queue()
    for owner in (ANN, BOB):
        job = job_of(parts, owner, f"{owner}.txt", images=9)
        queue.add(job, job.todo())
    queue.take()
    for n in range(2):
        job = job_of(parts, CAT, f"late-{n}.txt")
        queue.add(job, job.todo())
        taken = [queue.take() for _ in range(3)]

        assert [t[0].owner for t in taken if t] == [BOB, ANN, CAT]


def test_fifo_goes_by_arrival(parts: Parts) -> None:
    """Within a priority, who came first is rendered first."""
    assert turns(queue_of(parts, "fifo")) == [
        "ann/deep/hot.txt:1", "ann/1.txt:1", "ann/1.txt:2", "ann/2.txt:1",
        "bob/1.txt:1", "bob/1.txt:2", "x.txt:1", "x.txt:2", "y.txt:1",
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

    assert len(queue) == len(turns(queue)) == 8


def test_what_is_taken_or_dropped_is_forgotten(parts: Parts) -> None:
    """Nothing of a job stays in the queue, also where its turn never comes."""
    queue = Queue()
    urgent = parts.job("urgent.txt", priority=9)
    queue.add(urgent, urgent.todo())
    gone, taken = parts.job("a/gone.txt"), parts.job("b/taken.txt", priority=99)
    for job in (gone, taken):
        queue.add(job, job.todo())
    queue.drop(gone)
    queue.take()
    del gone, taken, job
    gc.collect()

    known = [o for o in gc.get_objects() if type(o) is Job and o.paths is parts.spool.paths]
    assert [job.path for job in known] == ["urgent.txt"]
    assert turns(queue) == ["urgent.txt:1"]
