"""What wakes the daemon when a folder changes, and how it is let go."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import until
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
    """The watcher can be closed all the same, and watch again."""
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
    inotify = watcher._inotify
    assert inotify
    with inotify._lock:
        closing = threading.Thread(target=watcher.close)
        closing.start()
        closing.join(STOP_SECONDS + EVENT_SECONDS)
        has_returned = not closing.is_alive()
    inotify.join(EVENT_SECONDS)

    assert has_returned
    assert not inotify.is_alive()


def test_a_dead_watcher_thread_is_replaced(tmp_path: Path) -> None:
    """Events are heard again after watchdog's thread has ended."""
    woken = threading.Event()
    watcher = Watcher(woken.set)
    watcher.check({tmp_path: True})
    first = watcher._inotify
    assert first is not None
    first.stop()
    first.join()
    watcher.check({tmp_path: True})
    second = watcher._inotify
    woken.clear()
    (tmp_path / "a.txt").write_text("a\n")
    heard = woken.wait(10)
    watcher.close()

    assert second is not first
    assert heard


def watches() -> list[int]:
    """How many folders each inotify descriptor of this process watches."""
    infos = [path.read_text() for path in Path("/proc/self/fdinfo").iterdir() if path.exists()]
    return [info.count("inotify wd:") for info in infos if "inotify wd:" in info]


@pytest.mark.filterwarnings("error")
def test_folders_that_come_and_go_leave_nothing_behind(
    watcher: Watcher, woken: threading.Event, tmp_path: Path
) -> None:
    """Made nested, moved away, replaced and deleted 50 times, the inbox included: one thread and one
    descriptor all along, a watch for each folder that is there, and what happens in a new one is heard."""
    inbox, elsewhere = tmp_path / "inbox", tmp_path / "elsewhere"
    inbox.mkdir()
    elsewhere.mkdir()
    watcher.check({inbox: True})
    threads = threading.active_count()
    for n in range(50):
        (inbox / "a/b/c").mkdir(parents=True)
        watcher.check({inbox: True})
        assert heard(woken, (inbox / "a/b/c/new.txt").touch)
        (inbox / "a/b").rename(elsewhere / f"b{n}")
        (inbox / "a/b/d").mkdir(parents=True)
        watcher.check({inbox: True})
        assert heard(woken, (inbox / "a/b/d/new.txt").touch)
        if n % 2:
            inbox.rename(elsewhere / f"inbox{n}")
            inbox.mkdir()
        else:
            shutil.rmtree(inbox / "a")
        watcher.check({inbox: True})
        until(lambda: watches() == [1], "the watch of the inbox alone")
        assert heard(woken, (inbox / "new.txt").touch)
        assert threading.active_count() == threads
    woken.clear()
    (elsewhere / "b7" / "c" / "late.txt").touch()
    was_woken = woken.wait(0.2)
    watcher.close()

    assert not was_woken
    assert watches() == []
    assert threading.active_count() == threads - 1


def test_a_folder_that_is_not_entered_is_not_watched(
    watcher: Watcher, woken: threading.Event, tmp_path: Path
) -> None:
    """It may be another program's, and change all the time."""
    for name in ("@eaDir", "ours"):
        (tmp_path / name).mkdir()
    watcher.check({tmp_path: True})

    assert watches() == [2]
    assert heard(woken, (tmp_path / "ours" / "new.txt").touch)
    watcher.close()


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
