"""Notice changes in the inbox. An event only means "look now"; the periodic scan finds the rest."""

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from watchdog.observers.inotify_c import CallbackId, InotifyConstants, InotifyEvent, InotifyFD, Mask
from watchdog.observers.inotify_c import WatchDescriptor as Watch

from promptdrop.intake.files import below, is_entered

Mode = Literal["inotify", "poll"]

STOP_SECONDS = 2.0  # longest wait for the end of watchdog's thread
# File systems whose other writers inotify cannot see: inotify(7), "Limitations".
REMOTE = ("nfs", "cifs", "smb", "9p", "virtiofs", "fuse", "afs", "ceph", "lustre", "glusterfs")


# Not *opened* and *closed without write*: our own looking would wake us for ever.
_CHANGES = (
    InotifyConstants.IN_CREATE
    | InotifyConstants.IN_DELETE
    | InotifyConstants.IN_MOVE
    | InotifyConstants.IN_MODIFY
    | InotifyConstants.IN_ATTRIB
    | InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_DELETE_SELF
    | InotifyConstants.IN_MOVE_SELF
    | InotifyConstants.IN_ONLYDIR
    | InotifyConstants.IN_EXCL_UNLINK
)
_ROOT = Mask(_CHANGES)
_BELOW = Mask(_CHANGES | InotifyConstants.IN_DONT_FOLLOW)
_OURS = CallbackId(0)  # the name of our callback, of which each watch has one
_EXHAUSTED = (
    errno.ENOSPC,
    errno.ENOMEM,
    errno.EMFILE,
)  # no more watches; any other error is a folder's

_Identity = tuple[int, int]  # device and inode


class Watcher:
    """Calls `wake`, from a thread of watchdog's, when something in the watched folders changes.

    It has one inotify descriptor and one thread, whoever makes, moves and replaces folders. watchdog's
    own observers follow folders by their paths: 7.1.0 warns of nested mkdir, and raises KeyError where a
    folder was replaced, which leaves threads that nothing ends. Here a watch is a folder's, not a path's,
    and a folder that came or went only means that they are walked again.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._inotify: InotifyFD | None = None
        self._roots: dict[Path, tuple[bool, _Identity | None]] = {}  # as they were last walked
        self._watched: dict[_Identity, Watch] = {}
        self._gone: deque[Watch] = deque()  # watches that the kernel has removed with their folders
        self._is_stale = True  # a folder came or went since they were last walked

    def check(self, folders: dict[Path, bool]) -> None:
        """Watch `folders` (path -> recursive) and what is below them now.

        Thread: scanner.
        """
        roots = {path: (recursive, _identity(path)) for path, recursive in folders.items()}
        try:
            if (inotify := self._inotify) is None or not inotify.is_alive():
                self.close()
                inotify = InotifyFD()
                inotify.start()
                self._inotify = inotify  # only now, as the loop may close what it sees here
            if self._is_stale or roots != self._roots:
                self._is_stale, self._roots = False, roots
                self._walk(inotify)
        except OSError:
            self._is_stale = (
                True  # out of inotify watches: the periodic scan still finds everything
            )

    def close(self) -> None:
        """Stop watching. Waits at most STOP_SECONDS, if a disk that hangs holds a lock of watchdog's."""
        inotify, self._inotify = self._inotify, None
        self._watched, self._gone, self._is_stale = {}, deque(), True
        if inotify is not None:
            stopping = threading.Thread(target=_stop, args=(inotify,), name="watch", daemon=True)
            stopping.start()
            stopping.join(STOP_SECONDS)

    # --- called by watchdog, in its thread, which an exception would end --------------------------

    def on_event(self, event: InotifyEvent) -> None:
        """Wake the loop; note whether a folder has come or gone."""
        if event.is_directory:
            self._is_stale = True
        self._wake()

    def on_watch_deleted(self, watch: Watch) -> None:
        """Forget a watch whose folder is gone."""
        self._gone.append(watch)
        self._is_stale = True
        self._wake()

    def on_queue_overflow(self) -> None:
        """Look everywhere: events were lost."""
        self._is_stale = True
        self._wake()

    # --- the folders ------------------------------------------------------------------------------

    def _walk(self, inotify: InotifyFD) -> None:
        """Watch what is there and is not watched; let go of what is no longer there.

        Each folder is watched before it is listed, so that what is made in it meanwhile is an event.
        """
        gone = {self._gone.popleft() for _ in range(len(self._gone))}
        self._watched = {
            identity: watch for identity, watch in self._watched.items() if watch not in gone
        }
        there: set[_Identity] = set()
        for root, (recursive, identity) in self._roots.items():
            todo = [("", identity)] if identity else []
            while todo:
                sub, identity = todo.pop()
                if self._watch(inotify, root, sub, identity):
                    there.add(identity)
                    todo += _below(root, sub, identity[0]) if recursive else []
        for identity in self._watched.keys() - there:
            if (watch := self._watched.pop(identity, None)) is not None:  # else it was closed
                inotify.remove_callbacks([(watch, _OURS)])

    def _watch(self, inotify: InotifyFD, root: Path, sub: str, identity: _Identity) -> bool:
        """Watch a folder, unless it is watched. False: it is gone, or not ours to read."""
        if identity in self._watched:
            return True
        path, mask = os.fsencode(root / sub), _BELOW if sub else _ROOT
        try:
            watch = inotify.add_callback(path, mask, self, _OURS)
        except OSError as e:
            if e.errno in _EXHAUSTED:
                raise
            return False
        if watch < 0:  # not permitted, of which watchdog makes no error
            inotify.remove_callbacks([(watch, _OURS)])
            return False
        self._watched[identity] = watch
        return True


def _below(root: Path, sub: str, device: int) -> list[tuple[str, _Identity]]:
    """List the sub-folders of a folder that are entered, each with what it is."""
    found = []
    try:
        with os.scandir(root / sub) as scan:
            for entry in scan:
                if entry.is_dir(follow_symlinks=False) and is_entered(entry, sub, device):
                    found.append((below(sub, entry.name), (device, entry.inode())))
    except OSError:
        pass  # gone, or not ours to read
    return found


def _stop(inotify: InotifyFD) -> None:
    inotify.stop()
    inotify.join()


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
