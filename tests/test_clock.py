"""Absences of a loop."""

from promptdrop.clock import AWAY_SECONDS, Presence


def test_being_late_is_no_absence() -> None:
    """Neither a wait as it was planned, nor one that a busy machine has stretched."""
    presence = Presence(100.0)

    assert presence.away(105.0, planned=5.0) == 0.0
    assert presence.away(110.0 + 0.9 * AWAY_SECONDS, planned=5.0) == 0.0


def test_an_absence_is_counted_once_and_as_a_whole() -> None:
    """Deadlines that are moved by it never come too early."""
    presence = Presence(100.0)

    assert presence.away(160.0, planned=0.5) == 60.0
    assert presence.away(160.5, planned=0.5) == 0.0
