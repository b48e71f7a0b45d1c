"""What lies in the inbox and which of it is complete. Events only mean "look now"; the scan is the truth.

Completeness is quiet time on our own clock: modification times are old after rsync or unzip, and
CLOSE_WRITE comes too early (WebDAV, appenders) or never (mv, ln). See proc(5), inotify(7).
"""

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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

from promptdrop import fs, names
from promptdrop.config import Watch
from promptdrop.untrusted import Signature, signature

SUB_BYTES = 1024  # longest path below the inbox that is entered: it must fit below our folders too
_NOT_OURS = (FileNotFoundError, NotADirectoryError, PermissionError)  # withdrawn, or not to be read

LOOKS = 2  # a file must look the same at least this often
# watchdog holds every move out of a folder, and all events behind it, back for half a second in case
# the other half of the move comes. Our claims are moves out of the inbox, and we pair nothing.
InotifyMoveEventGrouper.delay = 0.0

WRITER_SECONDS = 0.25  # how often a file that somebody has open for writing is probed again

Mode = Literal["inotify", "poll"]

# File systems whose other writers inotify cannot see: inotify(7), "Limitations".
REMOTE = ("nfs", "cifs", "smb", "9p", "virtiofs", "fuse", "afs", "ceph", "lustre", "glusterfs")


@dataclass(frozen=True, slots=True)
class Offer:
    """A file to take. `give_up` says why it is refused, when it has waited long enough for that."""

    sub: str  # folder below the inbox, "" at the root
    file: str
    signature: Signature
    settled: float  # monotonic seconds
    give_up: str | None = None

    @property
    def path(self) -> str:
        """SUB/FILE."""
        return f"{self.sub}/{self.file}" if self.sub else self.file


@dataclass(slots=True)
class Seen:
    """One job file that is not taken yet."""

    signature: Signature
    since: float  # unchanged since, monotonic seconds
    looks: int = 1
    objection: str | None = None  # why it would be refused as it stands
    obstacle: str | None = None  # why it could not be moved
    obstacle_until: float = 0.0  # when that is tried again
    offered: bool = False


@dataclass(frozen=True, slots=True)
class Scan:
    """What one look found."""

    started: float
    offers: tuple[Offer, ...]
    waiting: dict[str, str]  # SUB/FILE -> why it is not taken yet
    blocked: dict[str, str]  # of these, what no time will cure: not ready, not to be moved
    next_look: float  # monotonic seconds; inf: nothing is due
    found: int  # job files, taken or not
    cancels: dict[str, float]  # SUB/NAME.cancel of what is not in the inbox -> first seen


@dataclass(slots=True)
class Inbox:
    """Remembers what it has seen; `scan` is the only thing that looks. `now` is an argument."""

    root: Path
    _seen: dict[str, Seen] = field(default_factory=dict)
    _cancels: dict[str, float] = field(default_factory=dict)  # SUB/NAME.cancel -> first seen

    def scan(self, now: float, watch: Watch, recursive: bool) -> Scan:
        """Look at everything once. Raises OSError: the inbox itself cannot be read."""
        arrived: list[tuple[float, str, Offer]] = []
        waiting: dict[str, str] = {}
        next_look = float("inf")
        found = set()
        cancels: dict[str, float] = {}
        for sub, entry, siblings in _files(self.root, recursive):
            path = f"{sub}/{entry.name}" if sub else entry.name
            if names.is_cancel(entry.name):
                cancels[path] = self._cancels.get(path, now)
                continue
            found.add(path)
            if path in self._seen and self._seen[path].offered:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except _NOT_OURS:
                continue  # withdrawn while we looked
            except OSError as e:  # one sick file stops no other
                waiting[path] = f"cannot be looked at: {e.strerror}"
                continue
            seen = self._look(path, signature(status), now)
            ready = watch.ready_suffix is None or entry.name + watch.ready_suffix in siblings
            why, due, give_up = self._judge(entry, seen, now, watch, ready)
            next_look = min(next_look, due)
            if why is None or give_up:
                seen.offered = True
                offer = Offer(sub, entry.name, seen.signature, now, why if give_up else None)
                arrived.append((seen.since, path, offer))
            else:
                waiting[path] = why
        for path in self._seen.keys() - found:
            del self._seen[path]  # taken or withdrawn
        blocked = {
            path: why
            for path, why in waiting.items()
            if path not in self._seen or self._seen[path].obstacle == why
        }
        self._cancels = cancels
        for path in _named(cancels, found):
            waiting[path] = "waits until the file it names is taken"
            cancels[path] = now  # its own time begins when that is gone
        offers = tuple(offer for _, _, offer in sorted(arrived))  # a path comes once
        cancels = {path: since for path, since in cancels.items() if path not in waiting}
        return Scan(now, offers, waiting, blocked, next_look, len(found), cancels)

    def object(self, path: str, objection: str) -> None:
        """The offered file would be refused; it may still be arriving, so it waits."""
        if seen := self._seen.get(path):
            seen.objection, seen.offered = objection, False

    def block(self, path: str, obstacle: str, until: float) -> None:
        """The offered file could not be moved out; it is offered again at `until`."""
        if seen := self._seen.get(path):
            seen.obstacle, seen.obstacle_until, seen.offered = obstacle, until, False

    def put_back(self, path: str) -> None:
        """The offered file was not taken: it changed or could not be moved. It settles anew."""
        self._seen.pop(path, None)

    def _look(self, path: str, signature: Signature, now: float) -> Seen:
        seen = self._seen.get(path)
        if seen is None or seen.signature != signature:
            seen = self._seen[path] = Seen(signature, now)
        else:
            seen.looks += 1
        return seen

    def _judge(
        self, entry: os.DirEntry[str], seen: Seen, now: float, watch: Watch, ready: bool
    ) -> tuple[str | None, float, bool]:
        """(why it waits, when to look again, whether to give up on it)."""
        settles = seen.since + watch.settle_seconds
        if not ready:
            seen.obstacle = f"waiting for {entry.name}{watch.ready_suffix}"
            return seen.obstacle, float("inf"), False
        if seen.obstacle and now < seen.obstacle_until:
            return seen.obstacle, seen.obstacle_until, False
        waits_for_writer = now < settles + watch.writer_seconds
        objection = seen.objection or ("is empty" if seen.signature[1] == 0 else None)
        if objection:
            gives_up = seen.since + max(watch.give_up_seconds, watch.settle_seconds)
            why = f"would be refused: {objection}"
            if now < gives_up or seen.looks < LOOKS:
                return why, max(gives_up, now), False
            if waits_for_writer and is_open_for_writing(entry.path):
                return f"{why}; open for writing", now + WRITER_SECONDS, False
            return objection, now, True
        if now < settles or seen.looks < LOOKS:
            return "still settling", max(settles, now), False
        if waits_for_writer and is_open_for_writing(entry.path):
            return "open for writing", now + WRITER_SECONDS, False
        return None, float("inf"), False


class Watcher:
    """Calls `wake` from a thread of its own when something moves; heals itself in `check`."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._handler = _Handler(wake)
        self._observer: BaseObserver | None = None
        self._watched: dict[Path, tuple[int, int]] = {}

    def check(self, folders: dict[Path, bool]) -> None:
        """Watch `folders` (path -> recursive); one that was made again or mounted over, anew."""
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
        except (
            RecursionError
        ):  # deeper than os.walk gets: below `path` only the periodic scan looks
            observer.schedule(self._handler, path, recursive=False, event_filter=_EVENTS)

    def _is_alive(self) -> bool:
        """Whether every thread is: one that hears and one for each folder."""
        threads = [self._observer, *self._observer.emitters] if self._observer else []
        return bool(threads) and all(thread.is_alive() for thread in threads)

    def close(self) -> None:
        """Stop watching."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None
        self._watched = {}


def watch_mode(wanted: Literal["auto", "inotify", "poll"], kind: str) -> tuple[Mode, str]:
    """`watch.mode`, decided by the inbox's kind of file system, and the reason in words."""
    if wanted != "auto":
        return wanted, f"{wanted} (watch.mode)"
    if kind.startswith(REMOTE):
        return "poll", f"poll: inotify does not see every writer on {kind}"
    return "inotify", f"inotify on {kind}"


def is_open_for_writing(path: str | Path) -> bool:
    """Whether somebody on this host has the file open for writing, where the system can tell.

    A read lease is refused with EAGAIN then (fcntl(2), F_SETLEASE); any other refusal (not our
    file, a network file system) says nothing. Closing gives the lease back.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        # Whoever opens the file meanwhile makes the kernel signal us: by default SIGIO, which kills.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # ignored unless a program asks for it
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as e:
        return e.errno == errno.EAGAIN
    finally:
        os.close(fd)
    return False


def strangers(root: Path) -> Iterator[tuple[str, str]]:
    """What in the inbox is named like a job or folder but is never entered: (path, why)."""
    for _, listed in fs.walk(root):
        for entry in listed:
            path = os.path.relpath(entry.path, root)
            if entry.is_symlink():
                yield path, "a symbolic link is not followed"
            elif entry.is_dir(follow_symlinks=False):
                if os.path.ismount(entry.path):
                    yield path, "another file system is not entered"
                elif len(os.fsencode(path)) > SUB_BYTES:
                    yield path, f"a path of more than {SUB_BYTES} bytes is not entered"
                elif names.is_job_name(entry.name):
                    yield path, "a folder, though named like a job"
            elif not entry.is_file(follow_symlinks=False):
                yield path, "not a regular file"


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
        """Called in watchdog's thread, which an exception would end."""
        self._wake()


def _files(root: Path, recursive: bool) -> Iterator[tuple[str, os.DirEntry[str], set[str]]]:
    """Every regular file with a name for us: (folder below root, entry, names beside it)."""
    device = os.stat(root).st_dev
    folders = [""]
    while folders:
        sub = folders.pop()
        with os.scandir(root / sub) if not sub else _scandir_if_there(root / sub) as scan:
            listed = list(scan)
        siblings = {entry.name for entry in listed}
        for entry in listed:
            if _is_folder(entry):
                if (
                    recursive
                    and not names.is_ignored_folder(entry.name)
                    and _device(entry) == device
                ):
                    inner = f"{sub}/{entry.name}" if sub else entry.name
                    if len(os.fsencode(inner)) <= SUB_BYTES:
                        folders.append(inner)
            elif (names.is_job_name(entry.name) or names.is_cancel(entry.name)) and _may_be_file(
                entry
            ):
                yield sub, entry, siblings


def _named(cancels: Iterable[str], files: Iterable[str]) -> list[str]:
    """Those of `cancels` whose file is among `files`: SUB/cat.cancel and cat.txt.cancel name cat.txt."""
    marks = {names.fold(names.split(path)[0]): path for path in cancels}
    if not marks:
        return []
    known = {names.fold(name) for path in files for name in (path, names.split(path)[0])}
    return [path for name, path in marks.items() if name in known]


class _Nothing:
    """An empty os.scandir."""

    def __enter__(self) -> Iterator[os.DirEntry[str]]:
        return iter(())

    def __exit__(self, *args: object) -> None:
        return None


def _scandir_if_there(path: Path) -> "os._ScandirIterator[str] | _Nothing":
    try:
        return os.scandir(path)
    except _NOT_OURS:
        return _Nothing()  # a sub-folder that went away or is not ours to read (doctor says so)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False  # a sick one: what it is cannot be told, and is said of a file


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return True  # whoever looks at it next meets the error


def _device(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat(follow_symlinks=False).st_dev
    except OSError:
        return None  # gone or sick: not entered


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
