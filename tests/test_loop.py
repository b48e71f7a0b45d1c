"""The daemon's loop: work goes to rooms, results come back, trouble with a disk is waited out."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from promptdrop.errors import DiskTrouble
from promptdrop.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop that tries again at once."""
    made = Loop(retry_seconds=0.0)
    yield made
    assert made.close()


def turn(loop: Loop, condition: Callable[[], Any]) -> None:
    """Turn the loop until the condition holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        loop.wait([], [], deadline)
        loop.run_results()


def test_work_runs_in_its_room_and_comes_back(loop: Loop) -> None:
    """The room's thread has its name, and what follows runs on the loop's own thread."""
    came: list[tuple[str, str]] = []

    def note(room: str) -> None:
        came.append((room, threading.current_thread().name))

    loop.off("clerk", lambda: threading.current_thread().name, note)
    turn(loop, lambda: came)

    assert came == [("clerk_0", threading.current_thread().name)]


def test_the_clerk_does_one_thing_after_another(loop: Loop) -> None:
    """It does work in the order in which it was asked."""
    done: list[int] = []
    for n in range(50):
        loop.off("clerk", lambda n=n: n, done.append)
    turn(loop, lambda: len(done) == 50)

    assert done == list(range(50))


@pytest.mark.parametrize("error", [OSError(28, "full"), DiskTrouble("full")])
def test_trouble_with_a_disk_is_tried_again(loop: Loop, error: Exception) -> None:
    """It is tried until the disk is cured; the log says it once for all work, and the result comes once."""
    tries, came = [], []

    def work() -> str:
        tries.append(len(tries))
        if len(tries) < 4:
            raise error
        return "done"

    with capture_logs() as lines:
        loop.off("clerk", work, came.append)
        turn(loop, lambda: loop.troubles)
        held = loop.troubles.everybodys()
        turn(loop, lambda: came)

    assert (held, bool(loop.troubles)) == ("full", False)
    assert (len(tries), came) == (4, ["done"])
    assert [line["event"] for line in lines] == ["disk.trouble", "disk.cured"]


def test_any_other_error_comes_out(loop: Loop) -> None:
    """It is a bug, so the daemon ends rather than go on with half a state."""
    loop.off("clerk", lambda: 1 // 0, lambda _: None)

    with pytest.raises(ZeroDivisionError):
        turn(loop, lambda: False)


def test_what_has_not_begun_at_the_end_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only work that has begun is waited for."""
    loop, begun, release = Loop(1.0), threading.Event(), threading.Event()
    ran: list[str] = []

    def first() -> None:
        begun.set()
        release.wait(60)
        ran.append("first")

    loop.off("clerk", first, ran.append)
    loop.off("clerk", lambda: ran.append("second"), ran.append)
    assert begun.wait(60)
    monkeypatch.setattr(loop, "wake", release.set)  # called when the second is cancelled

    assert loop.close()
    assert ran == ["first"]
