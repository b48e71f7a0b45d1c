"""Feeding: which images are sent to which engine, and when none is."""

from collections.abc import Callable

from parts import Parts
from promptdrop.supervisor.feeding import PUBLISHERS

MakeParts = Callable[..., Parts]


def test_nothing_is_sent_while_work_is_held(parts: Parts) -> None:
    """Afterwards two are sent: one to render and one ahead, so that the engine never waits."""
    (engine,) = parts.warm()
    parts.accept(parts.job(images=3))
    parts.feed()
    before = engine.renders()
    parts.look()
    parts.feed()

    assert before == []
    assert [render.spec.image for render in engine.renders()] == [1, 2]
    assert len(parts.work.tickets) == 2


def test_images_that_are_saved_slowly_hold_back_the_next(parts: Parts) -> None:
    """Memory holds only so many pictures that are not on the disk yet."""
    parts.look()
    (engine,) = parts.warm()
    parts.accept(parts.job())
    parts.publishing.under_way = PUBLISHERS
    parts.feed()

    assert engine.renders() == []


def test_a_job_that_cannot_be_taken_is_held_alone(make_parts: Callable[..., Parts]) -> None:
    """Its folder cannot be moved to the active ones: it waits with the reason until it can, others go on."""
    parts = make_parts(slots=2)
    parts.look()
    parts.warm()
    parts.accept(sick := parts.job("sick/a.txt"))
    parts.accept(well := parts.job("well/b.txt"))
    away = sick.home.rename(parts.spool.paths.root / "away")
    parts.feed()
    sent = [running.job for running in parts.work.tickets.values()]
    parts.until(lambda: list(parts.gate.stuck()), "trouble")
    (stuck,) = parts.gate.stuck()
    away.rename(sick.home)
    parts.until(lambda: not parts.loop.troubles, "the cure")
    parts.feed()

    assert sent == [well]
    assert (stuck.name, "No such file" in stuck.why) == ("sick/a.txt", True)
    assert [running.job for running in parts.work.tickets.values()] == [well, sick]
    assert parts.gate.why_held() is None


def test_only_what_may_not_be_poison_is_rendered_together(parts: Parts) -> None:
    """An image that failed, or whose batch did, has no kind in common with any other."""
    parts.look()
    (engine,) = parts.warm()
    parts.accept(job := parts.job(images=4))
    parts.work.running[job.id].alone.add(1)
    job.state(2).attempts = 1
    kinds = []
    for _ in range(2):
        parts.feed()
        kinds += [render.kind for render in engine.renders()]
        parts.work.tickets.clear()
        parts.pool.slots[0].link.in_hand.clear()  # as if they had come back

    assert kinds[:2] == [None, None]
    assert kinds[2] == kinds[3] is not None


def test_the_engine_with_the_least_in_hand_is_next(make_parts: MakeParts) -> None:
    """If there are two images and two engines, each engine gets one."""
    parts = make_parts(slots=2)
    parts.look()
    engines = parts.warm()
    parts.accept(parts.job(images=2))
    parts.feed()

    assert [len(engine.renders()) for engine in engines] == [1, 1]


def test_a_job_that_cannot_be_taken_can_be_cancelled(parts: Parts) -> None:
    """It ends once its folder is there again, and nothing of it stays stuck."""
    parts.look()
    parts.warm()
    parts.accept(job := parts.job("a.txt"))
    away = job.home.rename(parts.spool.paths.root / "away")
    parts.feed()
    parts.until(lambda: list(parts.gate.stuck()), "trouble")
    parts.jobs.cancel([job.id], lambda: None, lambda progress: None, "a command")
    away.rename(job.home)
    parts.until(lambda: not parts.work.running, "the end of the job")

    assert (parts.spool.paths.failed / "a.txt").exists()
    assert list(parts.gate.stuck()) == []
    assert not parts.holding.is_held(parts.job("b.txt"))
