"""Trouble with disks: whose it is, and what the log says of it."""

import pytest
from structlog.testing import capture_logs

from promptdrop.troubles import Stuck, Troubles


@pytest.fixture
def troubles() -> Troubles:
    """No trouble yet."""
    return Troubles()


def test_a_files_trouble_is_not_everybodys(troubles: Troubles) -> None:
    """Each is known until it ends; a file with several troubles is named once."""
    troubles.note(1, "/outbox: full")
    troubles.note(2, "/outbox/a: no", "a.txt")
    troubles.note(3, "/outbox/a: no, either", "a.txt")
    both = troubles.everybodys(), list(troubles.own())
    troubles.end(1)
    troubles.end(2)
    left = troubles.everybodys(), list(troubles.own())
    troubles.end(3)

    assert both == ("/outbox: full", [Stuck("a.txt", "/outbox/a: no, either")])
    assert left == (None, [Stuck("a.txt", "/outbox/a: no, either")])
    assert not troubles


def test_trouble_may_become_another(troubles: Troubles) -> None:
    """What was a file's trouble is everybody's once the disk of all fails, and the other way round."""
    troubles.note(1, "/outbox/a: no", "a.txt")
    troubles.note(1, "outbox is missing")
    shared = troubles.everybodys(), list(troubles.own())
    troubles.note(1, "/outbox/a: no", "a.txt")

    assert shared == ("outbox is missing", [])
    assert (troubles.everybodys(), list(troubles.own())) == (
        None,
        [Stuck("a.txt", "/outbox/a: no")],
    )


def test_a_reason_is_said_once_until_it_is_over(troubles: Troubles) -> None:
    """However many fail for it, and however often; its end is said once, too."""
    with capture_logs() as lines:
        for key in (1, 2, 1):
            troubles.note(key, "full", f"{key}.txt")
        troubles.end(1)
        troubles.end(2)
        troubles.end(2)

    assert [(line["event"], line["reason"]) for line in lines] == [
        ("disk.trouble", "full"),
        ("disk.cured", "full"),
    ]
