"""The gate lets images begin after a first look and while nothing holds them, engines until a stop."""

import pytest

from rooms import Rooms


def test_no_image_begins_before_the_first_look(rooms: Rooms) -> None:
    """Neither the disks nor a pause are known until then."""
    before = rooms.gate.lets_images_begin
    rooms.look()

    assert not before
    assert rooms.gate.lets_images_begin


@pytest.mark.parametrize("what", ["paused", "trouble"])
def test_a_hold_ends_with_its_reason(rooms: Rooms, what: str) -> None:
    """A pause and trouble with a disk hold images back until a look finds them gone."""
    rooms.look(**{what: "because"})
    held = rooms.gate.lets_images_begin, rooms.gate.why_held()
    rooms.look()

    assert held == (False, "because")
    assert (rooms.gate.lets_images_begin, rooms.gate.why_held()) == (True, None)


def test_a_pause_is_news_once(rooms: Rooms) -> None:
    """Its begin and its end are news, so that images are recalled and engines loaded once."""
    looks = [rooms.look(paused=paused) for paused in (None, "because", "because", None, None)]

    assert looks == [False, True, False, True, False]


def test_a_stop_begins_nothing(rooms: Rooms) -> None:
    """It lets neither an image nor an engine begin."""
    rooms.look()
    rooms.gate.stop_at = 5.0
    rooms.hear()

    assert not rooms.gate.lets_images_begin
    assert rooms.backend.begun == 0


def test_no_engine_is_started_at_the_end(rooms: Rooms) -> None:
    """Once the exit status is known no engine is started, since it would not be used."""
    rooms.gate.end(1, "because")
    rooms.hear()

    assert rooms.backend.begun == 0
    assert rooms.gate.ending == "because"


def test_trouble_with_a_send_is_cured_by_the_next_look(rooms: Rooms) -> None:
    """It is the look that finds out whether the disk is well again."""
    rooms.look()
    rooms.gate.disk_failed(OSError(28, "No space left on device"))
    held = rooms.gate.why_held()
    rooms.look()

    assert held == "No space left on device"
    assert rooms.gate.lets_images_begin
