"""Jobs whose images cannot be saved: theirs are held back, nobody else's."""

from parts import Parts
from promptdrop.spool.job import Job
from promptdrop.supervisor.holding import STUCK_IN_ALL, STUCK_OF_LANE
from promptdrop.supervisor.work import Running


def queued(parts: Parts, path: str, images: int = 1) -> Running:
    """A job of so many images that waits for an engine."""
    parts.accept(job := parts.job(path, images))
    return parts.work.running[job.id]


def next_jobs(parts: Parts) -> list[str]:
    """Take every image that may begin now, and return the files of their jobs."""
    taken: list[str] = []
    while found := parts.feeder._take():
        taken.append(found[0].path)
    return taken


def test_a_job_whose_image_cannot_be_saved_waits_alone(parts: Parts) -> None:
    """Its other images are set aside until that one is saved; others of its folder go on."""
    stuck, other = queued(parts, "a/stuck.txt", images=3), queued(parts, "a/other.txt")
    parts.holding.stalled(stuck, begins=True)
    while_held = next_jobs(parts)
    aside = parts.holding.images
    parts.holding.stalled(stuck, begins=False)

    assert while_held == [other.job.path]
    assert (aside, parts.holding.images) == (3, 0)
    assert next_jobs(parts) == [stuck.job.path] * 3


def test_several_such_jobs_hold_their_lane(parts: Parts) -> None:
    """What they have rendered lies in memory: none of their lane is begun, those of other lanes are."""
    stuck = [queued(parts, f"a/{n}.txt") for n in range(STUCK_OF_LANE)]
    behind, free = queued(parts, "a/behind.txt"), queued(parts, "b/free.txt")
    for running in stuck:
        parts.holding.stalled(running, begins=True)
    while_held = next_jobs(parts)
    parts.holding.stalled(stuck[0], begins=False)

    assert while_held == [free.job.path]
    assert sorted(next_jobs(parts)) == sorted([stuck[0].job.path, behind.job.path])


def test_a_cancelled_job_is_not_queued_again(parts: Parts) -> None:
    """Nothing of it stays behind when its lane is let go."""
    stuck, gone = queued(parts, "a/stuck.txt"), queued(parts, "a/gone.txt")
    for running in (stuck, gone):
        parts.holding.stalled(running, begins=True)
    next_jobs(parts)
    parts.holding.forget(gone.job)
    for running in (stuck, gone):
        parts.holding.stalled(running, begins=False)

    assert next_jobs(parts) == [stuck.job.path]
    assert parts.holding.images == 0


def test_a_recalled_image_of_a_held_job_waits_too(parts: Parts) -> None:
    """An engine gave it back meanwhile; it is set aside with the others of its job, in their order."""
    stuck = queued(parts, "a/stuck.txt", images=3)
    job: Job = stuck.job
    first = parts.work.queue.take()
    parts.holding.stalled(stuck, begins=True)
    held = next_jobs(parts)
    parts.work.queue.put_back(job, 1)
    held += next_jobs(parts)
    parts.holding.stalled(stuck, begins=False)
    numbers = [parts.work.queue.take() for _ in range(3)]

    assert first == (job, 1)
    assert held == []
    assert numbers == [(job, 1), (job, 2), (job, 3)]


def test_an_image_that_is_queued_again_meanwhile_is_not_lost(parts: Parts) -> None:
    """Nobody has taken it since an engine gave it back: it is queued with those that were set aside."""
    stuck = queued(parts, "a/stuck.txt", images=3)
    queue = parts.work.queue
    taken = [queue.take(), queue.take()]
    parts.holding.stalled(stuck, begins=True)
    held = next_jobs(parts)
    queue.put_back(stuck.job, 2)
    parts.holding.stalled(stuck, begins=False)
    left = [queue.take(), queue.take()]

    assert taken == [(stuck.job, 1), (stuck.job, 2)]
    assert held == []
    assert left == [(stuck.job, 2), (stuck.job, 3)]
    assert len(queue) == 0


def test_many_such_jobs_hold_all_lanes_of_their_owner(parts: Parts) -> None:
    """A new sub-folder is a new lane: the memory that one person's images may take is bounded all the same."""
    stuck = [queued(parts, f"{n}/a.txt") for n in range(STUCK_IN_ALL)]
    for running in stuck:
        parts.holding.stalled(running, begins=True)
    more, other = queued(parts, "new/a.txt"), queued(parts, "other/a.txt")
    other.job.owner += 1
    held = [parts.holding.is_held(running.job) for running in (more, other)]
    parts.holding.stalled(stuck[0], begins=False)

    assert held == [True, False]
    assert not parts.holding.is_held(more.job)
