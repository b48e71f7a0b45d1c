"""The progress bar and the messages for people who wait for jobs."""

from typing import Any

import pytest
from rich.progress import Progress

from promptdrop.cli.client import Dropped
from promptdrop.cli.progress import Bar, Follower, bar
from statuses import image, status

DROPS = [Dropped("cat.txt", 5, "2026-11-28T10:00:00.000Z")]


@pytest.fixture
def shown() -> Progress:
    """rich's progress behind a bar, which is not drawn."""
    return Progress(disable=True)


def task(progress: Progress) -> tuple[str, float, float | None]:
    """Text, images done and images in all, as the bar shows them."""
    (only,) = progress.tasks
    return only.description, only.completed, only.total


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (None, "no daemon runs on this spool; the job waits for: promptdrop run"),
        ({"reason": "outbox is full"}, "the daemon waits: outbox is full"),
        ({"waiting": [{"file": "cat.txt", "why": "is open"}]}, "cat.txt: is open"),
        ({"waiting": [{"file": "cat.txt", "why": "still settling"}]}, ""),
        ({"waiting": [{"file": "dog.txt", "why": "is open"}]}, ""),
    ],
)
def test_why_nothing_happens(
    capsys: pytest.CaptureFixture[str], changes: dict[str, Any] | None, said: str
) -> None:
    """Each reason is one line on stderr when it comes up; a file that settles is no reason."""
    follower = Follower(None)
    look = None if changes is None else status(**changes)
    for _ in range(3):
        follower(look, DROPS)
    follower(status(), DROPS)
    follower(look, DROPS)

    assert capsys.readouterr().err == f"{said}\n" * 2 * bool(said)


def test_the_bar_counts_the_images_of_our_jobs(shown: Progress) -> None:
    """Images of other jobs are not counted; before the job is known the bar says where the file is."""
    follower = Follower(Bar(shown))
    ours = {"id": "a", "file": "cat.txt", "inode": 5, "folder": "cat", "images": 4, "done": 1}
    follower(status(), DROPS)
    before = task(shown)
    follower(status(state="rendering", jobs=[ours, {**ours, "inode": 6}]), DROPS)

    assert before == ("cat.txt: inbox", 0, None)
    assert task(shown) == ("cat.txt: rendering", 1, 4)


def test_the_bar_of_a_drain(shown: Progress) -> None:
    """It counts images and the steps of the one in hand; without one it shows stage or reason to wait."""
    drawn = Bar(shown)
    queue = {"jobs": 1, "images": 3, "publishing": 1}
    drawn.show(status(current=image(), queue=queue, images_published=2))
    working = task(shown)
    drawn.show(status(state="starting"))
    starting = task(shown)
    drawn.show(status(state="waiting", reason="outbox is full"))

    assert working == ("cat.txt 1/4, step 2/8", 2.25, 6)
    assert starting[0] == "warm"
    assert task(shown)[0] == "outbox is full"


def test_no_bar_where_nobody_sees_it() -> None:
    """There is no bar where stderr is no terminal."""
    with bar() as drawn:
        assert drawn is None
