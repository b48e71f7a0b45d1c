"""Feeding: which images are sent to which engine, and when none is."""

from collections.abc import Callable

from promptdrop.supervisor.feeding import PUBLISHERS
from rooms import Rooms

MakeRooms = Callable[..., Rooms]


def test_nothing_is_sent_while_work_is_held(rooms: Rooms) -> None:
    """Afterwards two are sent: one to render and one ahead, so that the engine never waits."""
    (engine,) = rooms.warm()
    rooms.accept(rooms.job(images=3))
    rooms.feed()
    before = engine.renders()
    rooms.look()
    rooms.feed()

    assert before == []
    assert [render.spec.image for render in engine.renders()] == [1, 2]
    assert len(rooms.work.tickets) == 2


def test_images_that_are_saved_slowly_hold_back_the_next(rooms: Rooms) -> None:
    """Memory holds only so many pictures that are not on the disk yet."""
    rooms.look()
    (engine,) = rooms.warm()
    rooms.accept(rooms.job())
    rooms.publishing.under_way = PUBLISHERS
    rooms.feed()

    assert engine.renders() == []


def test_trouble_with_a_disk_puts_the_image_back(rooms: Rooms) -> None:
    """The first image moves its job's folder; nothing is sent until a look finds the disk well."""
    rooms.look()
    rooms.warm()
    rooms.accept(job := rooms.job())
    away = job.home.rename(rooms.spool.paths.root / "away")
    rooms.feed()
    held = rooms.gate.why_held()
    away.rename(job.home)
    rooms.feed()
    still = len(rooms.work.tickets)
    rooms.look()
    rooms.feed()

    assert "No such file" in str(held)
    assert (still, len(rooms.work.tickets)) == (0, 1)


def test_only_what_may_not_be_poison_is_rendered_together(rooms: Rooms) -> None:
    """An image that failed, or whose batch did, has no kind in common with any other."""
    rooms.look()
    (engine,) = rooms.warm()
    rooms.accept(job := rooms.job(images=4))
    rooms.work.running[job.id].alone.add(1)
    job.state(2).attempts = 1
    kinds = []
    for _ in range(2):
        rooms.feed()
        kinds += [render.kind for render in engine.renders()]
        rooms.work.tickets.clear()
        rooms.pool.slots[0].link.in_hand.clear()  # as if they had come back

    assert kinds[:2] == [None, None]
    assert kinds[2] == kinds[3] is not None


def test_the_engine_with_the_least_in_hand_is_next(make_rooms: MakeRooms) -> None:
    """If there are two images and two engines, each engine gets one."""
    rooms = make_rooms(slots=2)
    rooms.look()
    engines = rooms.warm()
    rooms.accept(rooms.job(images=2))
    rooms.feed()

    assert [len(engine.renders()) for engine in engines] == [1, 1]
