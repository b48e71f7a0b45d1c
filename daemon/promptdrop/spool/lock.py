"""The lock in the state folder, which lets only one daemon work on a spool."""

import errno
import fcntl
import os
import secrets
import threading
import time
from pathlib import Path

from promptdrop.errors import ConfigError, DiskTrouble, SpoolBusy
from promptdrop.spool.paths import Paths

_MARK_BYTES = 64
_TRIES = 10  # `status` holds the lock for microseconds when it looks who is there
_TRY_SECONDS = 0.05


class Lock:
    """Is held from `acquire` until this process ends, even if the state folder is mounted anew."""

    def __init__(self, paths: Paths, mode: int) -> None:
        """mode: permission bits of the lock file; others than the group have theirs only if the umask lets them."""
        self._paths, self._mode = paths, mode
        self._descriptor: int | None = None
        self._identity: tuple[int, int] | None = None  # device and inode of the file we locked
        self._mark = f"{os.getpid()}\n{secrets.token_hex(8)}\n"  # what we write into it
        self._relocking = threading.Lock()

    def acquire(self) -> None:
        """Take the lock. Raises SpoolBusy, which names the daemon that has it.

        Thread: loop, before any other runs; `require` calls it in any.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self._paths.lock, flags, 0o644)
        except OSError as e:
            if e.errno not in (errno.ELOOP, errno.EISDIR):
                raise
            raise ConfigError(f"{self._paths.lock} is a link or a folder; remove it") from None
        self._lock(fd)
        os.ftruncate(fd, 0)
        os.pwrite(fd, self._mark.encode(), 0)
        status = os.fstat(fd)
        self._share(fd, status.st_mode)
        old, self._descriptor = self._descriptor, fd
        self._identity = status.st_dev, status.st_ino
        if old is not None:
            _close_quietly(old)

    def _share(self, fd: int, mode: int) -> None:
        """Let the group see who holds the lock, whatever the umask; whoever can read it can hold it, too."""
        try:
            os.fchmod(fd, self._mode & (mode | 0o640))
        except PermissionError:
            pass  # the file is root's, or on a share that forces modes

    def _lock(self, fd: int) -> None:
        """Lock an open file, or close it and raise SpoolBusy."""
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if left:
                    time.sleep(_TRY_SECONDS)
        owner = _pid_in(fd) or "unknown"
        os.close(fd)
        raise SpoolBusy(
            f"{self._paths.root}: another promptdrop daemon (pid {owner}) owns this spool"
        )

    def release(self) -> None:
        """Give the lock back.

        Thread: loop, after all others have ended.
        """
        if self._descriptor is not None:
            _close_quietly(self._descriptor)
            self._descriptor = None

    def require(self) -> None:
        """Raise DiskTrouble if the state folder is not the one we locked: a file system came or went.

        If the same one was mounted anew, it is locked anew: the old lock went with the old mount.
        Raises SpoolBusy: another daemon was faster.

        Thread: any.
        """
        if self._descriptor is None:
            return  # nothing is owned: `init`, `doctor`
        with self._relocking:
            try:
                status = os.stat(self._paths.lock)
            except FileNotFoundError:
                raise DiskTrouble(f"state {self._paths.state} is missing; waiting for it") from None
            if (status.st_dev, status.st_ino) == self._identity:
                return
            if _head_of(self._paths.lock) != self._mark:
                raise DiskTrouble(
                    f"state {self._paths.state} is not the one we own; waiting for that one"
                )
            self.acquire()

    def daemon_pid(self) -> int | None:
        """Return the process id of the daemon that owns this spool, or None. For commands."""
        try:
            fd = os.open(self._paths.lock, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _pid_in(fd)
        else:
            return None
        finally:
            os.close(fd)


def _pid_in(fd: int) -> int:
    """Read the process id in a lock file; 0 if it cannot be read."""
    pid = os.pread(fd, 20, 0).decode("ascii", "replace").partition("\n")[0]
    return int(pid) if pid.isdecimal() else 0


def _head_of(path: Path) -> str:
    """Return as much of a lock file as a daemon writes into it."""
    with path.open("rb") as file:
        return file.read(_MARK_BYTES).decode("ascii", "replace")


def _close_quietly(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass  # its file system is gone
