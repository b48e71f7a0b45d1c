"""Notice changes in the inbox. An event only means "look now"; the periodic scan finds the rest."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.observers.inotify_move_event_grouper import InotifyMoveEventGrouper

# watchdog holds every move out of a folder, and all events behind it, back for half a second in case
# the other half of the move comes. Our claims are moves out of the inbox, and we pair nothing.
InotifyMoveEventGrouper.delay = 0.0

Mode = Literal["inotify", "poll"]

STOP_SECONDS = 2.0  # longest wait for the end of watchdog's threads
# File systems whose other writers inotify cannot see: inotify(7), "Limitations".
REMOTE = ("nfs", "cifs", "smb", "9p", "virtiofs", "fuse", "afs", "ceph", "lustre", "glusterfs")


_EVENTS: list[type[FileSystemEvent]] = [
    # Not *opened* and *closed without write*: our own looking would wake us for ever.
    FileCreatedEvent,
    FileMovedEvent,
    FileModifiedEvent,
    FileClosedEvent,
    FileDeletedEvent,
    DirCreatedEvent,
    DirMovedEvent,
    DirDeletedEvent,
]


class _Handler(FileSystemEventHandler):
    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Wake the loop. Called in watchdog's thread, which an exception would end."""
        self._wake()


class Watcher:
    """Calls `wake`, from a thread of its own, when something in the watched folders changes."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._handler = _Handler(wake)
        self._observer: BaseObserver | None = None
        self._watched: dict[Path, tuple[int, int]] = {}

    def check(self, folders: dict[Path, bool]) -> None:
        """Watch `folders` (path -> recursive). Begins anew if a thread has ended or a folder was replaced.

        Thread: scanner.
        """
        there = {path: _identity(path) for path in folders}
        if self._is_alive() and there == self._watched:
            return
        self.close()
        observer = Observer()
        try:
            observer.start()
            for path, recursive in folders.items():
                if there[path] is not None:
                    self._schedule(observer, str(path), recursive)
        except OSError:
            observer.stop()  # out of inotify watches: the periodic scan still finds everything
            return
        self._observer = observer
        self._watched = {path: identity for path, identity in there.items() if identity}

    def _schedule(self, observer: BaseObserver, path: str, recursive: bool) -> None:
        try:
            observer.schedule(self._handler, path, recursive=recursive, event_filter=_EVENTS)
        except RecursionError:  # too deep for os.walk: below `path` only the periodic scan looks
            observer.schedule(self._handler, path, recursive=False, event_filter=_EVENTS)

    def _is_alive(self) -> bool:
        """Whether all of watchdog's threads run: one that calls us and one for each folder."""
        threads = [self._observer, *self._observer.emitters] if self._observer else []
        return bool(threads) and all(thread.is_alive() for thread in threads)

    def close(self) -> None:
        """Stop watching. Waits at most STOP_SECONDS for watchdog's threads; those left end with the process."""
        observer, self._observer, self._watched = self._observer, None, {}
        if observer is not None:
            stopping = threading.Thread(target=_stop, args=(observer,), name="watch", daemon=True)
            stopping.start()
            stopping.join(STOP_SECONDS)


def _stop(observer: BaseObserver) -> None:
    """End an observer's threads, if watchdog can.

    Where a watched folder was replaced by another of its name, watchdog 7.1.0 keeps two watches for one
    path. Removing the second raises KeyError (InotifyWatchGroup._remove_watch_internally), which leaves
    threads that nothing ends any more: a second `stop` waits for them for ever.
    """
    try:
        observer.stop()
    except KeyError:
        return
    observer.join()


def watch_mode(wanted: Literal["auto", "inotify", "poll"], kind: str) -> tuple[Mode, str]:
    """Resolve `watch.mode` by the inbox's kind of file system; returns the mode and why, in words."""
    if wanted != "auto":
        return wanted, f"{wanted} (watch.mode)"
    if kind.startswith(REMOTE):
        return "poll", f"poll: inotify does not see every writer on {kind}"
    return "inotify", f"inotify on {kind}"


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
