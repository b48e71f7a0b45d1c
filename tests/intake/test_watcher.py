"""What wakes the daemon when a folder changes, and how it is let go."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from promptdrop.intake.watcher import STOP_SECONDS, Watcher, watch_mode

EVENT_SECONDS = 10  # longest wait for an event


@pytest.fixture
def woken() -> threading.Event:
    """Set by the watcher."""
    return threading.Event()


@pytest.fixture
def watcher(woken: threading.Event) -> Watcher:
    """A watcher that watches nothing yet."""
    return Watcher(woken.set)


def heard(woken: threading.Event, change: Callable[[], object]) -> bool:
    """Make a change; whether the watcher wakes us for it."""
    woken.clear()
    change()
    return woken.wait(EVENT_SECONDS)


def test_a_folder_replaced_by_another_of_its_name_hinders_nobody(
    watcher: Watcher, woken: threading.Event, tmp_path: Path
) -> None:
    """watchdog then keeps two watches for one path and trips over the second: the watcher can be closed
    all the same, and watch again."""
    inbox, folder = tmp_path / "inbox", tmp_path / "inbox" / "a.txt"
    inbox.mkdir()
    watcher.check({inbox: True})
    moved = tmp_path / "moved"
    for change in (folder.mkdir, lambda: folder.rename(moved), folder.mkdir, folder.rmdir):
        assert heard(woken, change)
    watcher.close()
    watcher.close()
    watcher.check({inbox: True})

    assert heard(woken, folder.mkdir)
    watcher.close()


def test_threads_that_do_not_end_are_not_waited_for(watcher: Watcher, tmp_path: Path) -> None:
    """A stop of the daemon takes at most STOP_SECONDS here; the threads end with the process."""
    watcher.check({tmp_path: True})
    observer = watcher._observer
    assert observer
    with observer._lock:  # type: ignore[attr-defined]  # BaseObserver has it, its stub does not
        closing = threading.Thread(target=watcher.close)
        closing.start()
        closing.join(STOP_SECONDS + EVENT_SECONDS)
        has_returned = not closing.is_alive()
    observer.join(EVENT_SECONDS)

    assert has_returned
    assert not observer.is_alive()


def test_a_dead_watcher_thread_is_replaced(tmp_path: Path) -> None:
    """Events are heard again after any thread of watchdog's has ended, also the one that reads them."""
    woken = threading.Event()
    watcher = Watcher(woken.set)
    watcher.check({tmp_path: True})
    first = watcher._observer
    assert first is not None
    emitter = next(iter(first.emitters))
    emitter.stop()
    emitter.join()
    watcher.check({tmp_path: True})
    second = watcher._observer
    woken.clear()
    (tmp_path / "a.txt").write_text("a\n")
    heard = woken.wait(10)
    watcher.close()

    assert second is not first
    assert heard


@pytest.mark.parametrize(
    ("kind", "wanted", "mode"),
    [
        ("ext4", "auto", "inotify"), ("xfs", "auto", "inotify"), ("tmpfs", "auto", "inotify"),
        ("nfs4", "auto", "poll"), ("cifs", "auto", "poll"), ("smb3", "auto", "poll"), ("9p", "auto", "poll"),
        ("virtiofs", "auto", "poll"), ("fuse.sshfs", "auto", "poll"), ("fuse", "auto", "poll"),
        ("nfs", "inotify", "inotify"), ("ext4", "poll", "poll"),
    ],
)  # fmt: skip
def test_the_mode_follows_the_file_system(kind: str, wanted: Any, mode: str) -> None:
    """`auto` means inotify only where it hears every writer; a configured mode is kept."""
    chosen, why = watch_mode(wanted, kind)

    assert chosen == mode
    assert wanted != "auto" or kind in why
