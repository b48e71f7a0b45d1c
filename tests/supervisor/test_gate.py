"""The gate lets images begin after a first look and while nothing holds them, engines until a stop."""

import pytest

from parts import Parts


def test_no_image_begins_before_the_first_look(parts: Parts) -> None:
    """Neither the disks nor a pause are known until then."""
    before = parts.gate.lets_images_begin
    parts.look()

    assert not before
    assert parts.gate.lets_images_begin


@pytest.mark.parametrize("what", ["paused", "trouble"])
def test_a_hold_ends_with_its_reason(parts: Parts, what: str) -> None:
    """A pause and trouble with a disk hold images back until a look finds them gone."""
    parts.look(**{what: "because"})
    held = parts.gate.lets_images_begin, parts.gate.why_held()
    parts.look()

    assert held == (False, "because")
    assert (parts.gate.lets_images_begin, parts.gate.why_held()) == (True, None)


def test_a_pause_is_news_once(parts: Parts) -> None:
    """Its begin and its end are news, so that images are recalled and engines loaded once."""
    looks = [parts.look(paused=paused) for paused in (None, "because", "because", None, None)]

    assert looks == [False, True, False, True, False]


def test_a_stop_begins_nothing(parts: Parts) -> None:
    """It lets neither an image nor an engine begin."""
    parts.look()
    parts.gate.stop_at = 5.0
    parts.hear()

    assert not parts.gate.lets_images_begin
    assert parts.backend.begun == 0


def test_no_engine_is_started_at_the_end(parts: Parts) -> None:
    """Once the exit status is known no engine is started, since it would not be used."""
    parts.gate.end(1, "because")
    parts.hear()

    assert parts.backend.begun == 0
    assert parts.gate.ending == "because"


def test_trouble_with_a_send_is_cured_by_the_next_look(parts: Parts) -> None:
    """It is the look that finds out whether the disk is well again."""
    parts.look()
    parts.gate.disk_failed(OSError(28, "No space left on device"))
    held = parts.gate.why_held()
    parts.look()

    assert held == "No space left on device"
    assert parts.gate.lets_images_begin
