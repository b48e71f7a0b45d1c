"""Parked jobs whose file somebody has taken out of failed/: nothing can go on with them.

Thread: clerk, all of it.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from promptdrop import fs, untrusted
from promptdrop.errors import DiskTrouble
from promptdrop.spool import ending
from promptdrop.spool.paths import DROP
from promptdrop.spool.spool import Spool

_AT_ONCE = 100  # files that are looked for between two glances at the clock


@contextmanager
def held_open(spool: Spool) -> Iterator[Path]:
    """Yield failed/, so that an unmount meanwhile does not make every file in it look missing.

    Raises OSError, DiskTrouble: it is not there now.
    """
    with untrusted.below(spool.paths.failed, "") as failed:
        spool.folders.require()
        if not failed.samefile(spool.paths.failed):
            raise DiskTrouble(f"failed {spool.paths.failed} was mounted or replaced just now")
        yield failed


def is_missing(spool: Spool, target: str) -> bool:
    """Whether nothing is at failed/`target`. Raises OSError, DiskTrouble: failed/ is not there now."""
    if not missing(spool.paths.failed, [target]):
        return False
    with held_open(spool) as failed:
        return bool(missing(failed, [target])) and _is_all_mounted(spool, target)


def _is_all_mounted(spool: Spool, target: str) -> bool:
    """Whether no mount point on the way to failed/`target` is without its mount now."""
    try:
        spool.folders.require_inner("failed", target)
    except OSError:
        return False
    return True


def missing(failed: Path, targets: Iterable[str]) -> list[str]:
    """Return those of some paths below failed/ at which nothing is, folder by folder.

    What cannot be told, because of a disk or of permissions, is not missing.
    """
    gone: list[str] = []
    for sub, paths in groupby(targets, os.path.dirname):
        here = list(paths)
        try:
            with untrusted.below(failed, sub) as folder:
                gone += [path for path in here if _is_missing(folder / os.path.basename(path))]
        except (FileNotFoundError, untrusted.NotPlain):
            gone += here
        except OSError:
            pass  # this says nothing about the files
    return gone


def _is_missing(path: Path) -> bool:
    try:
        return fs.status_of(path) is None
    except OSError:
        return False


class Sweep:
    """Looks for the file of every parked job, a slice at a time, and removes what is kept of those without.

    A file must be missing at two looks in a row, since an editor that saves it may take it away for a
    moment.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._left: deque[str] = deque()  # targets that this look has not come to yet
        self._missing: set[str] = set()  # those that it has found missing
        self._suspects: set[str] = set()  # those that the last look has found missing

    @property
    def is_over(self) -> bool:
        """Whether the look has come to every file."""
        return not self._left

    def go_on(self, seconds: float) -> list[tuple[str, str]]:
        """Go on with the look for so long, or begin the next one.

        Returns what was removed: job ids, each with the path of its file below failed/.
        """
        if not self._left:
            self._left.extend(self._spool.parked.targets())
            self._suspects, self._missing = self._missing, set()
        try:
            with held_open(self._spool) as failed:
                return self._look(failed, time.monotonic() + seconds)
        except (OSError, DiskTrouble):
            pass  # the scanner says so; nothing is known about the files
        self._left.clear()
        self._missing.clear()
        return []

    def _look(self, failed: Path, until: float) -> list[tuple[str, str]]:
        removed: list[tuple[str, str]] = []
        while self._left and time.monotonic() < until:
            some = [self._left.popleft() for _ in range(min(_AT_ONCE, len(self._left)))]
            gone = [one for one in missing(failed, some) if _is_all_mounted(self._spool, one)]
            self._missing.update(gone)
            for target in self._suspects.intersection(gone):
                job_id = self._spool.parked.id_of(target)
                if job_id and self._remove(target, self._spool.paths.home("parked", job_id)):
                    removed.append((job_id, target))
        return removed

    def _remove(self, target: str, home: Path) -> bool:
        """Remove what is kept of a job; False if it is not parked now, or is being retried."""
        if not fs.exists(home) or any(True for _ in fs.files(home / DROP)):
            return False
        self._spool.parked.forget(target)
        ending.leave(self._spool, home, "finished")
        return True
