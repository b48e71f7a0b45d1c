"""Open files and folders that others may swap meanwhile, without following links or blocking."""

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

Signature = tuple[int, int, int, int]  # inode, size, mtime ns, ctime ns

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_OPENAT2, _NO_SYMLINKS, _BENEATH = (
    437,
    0x04,
    0x08,
)  # linux/openat2.h; the number is the same everywhere
_syscall = ctypes.CDLL(None, use_errno=True).syscall


class NotPlain(OSError):
    """The path is no regular file, or was swapped for another while it was opened."""


def read_plain(path: Path, limit: int | None) -> tuple[bytes, os.stat_result]:
    """Read a file anybody may have put there: no links, no devices, no blocking, at most `limit` + 1 bytes.

    limit: None for a record of our own, which is read to its end.

    Raises NotPlain: a link, pipe, socket, device, or swapped while opening. OSError as open(2).
    """
    with open_plain(path) as file:
        try:
            data = file.read() if limit is None else file.read(limit + 1)  # never trust st_size
        except OSError as e:
            e.filename = str(path)  # read(2) names no file, and a message must
            raise
        return data, os.fstat(file.fileno())


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file. Raises NotPlain: a link, pipe, socket, device, or swapped while opening."""
    before = os.lstat(path)
    if not stat.S_ISREG(before.st_mode):
        raise NotPlain(errno.EINVAL, "not a regular file", str(path))
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    file = os.fdopen(fd, "rb")
    after = os.fstat(fd)
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
        file.close()
        raise NotPlain(errno.EINVAL, "changed while it was opened", str(path))
    return file


@contextmanager
def below(root: Path, sub: str) -> Iterator[Path]:
    """Yield a path of the folder root/sub; no link below `root` is followed on the way there.

    A mount on the way is entered. The path holds while the context lasts, whatever becomes of the
    names (proc(5), /proc/self/fd); errors name the folder as it was asked for.
    Raises NotPlain: a part of `sub` is `..`, a link or no folder. FileNotFoundError: it is gone.
    """
    asked = os.path.join(root, sub) if sub else str(root)
    folder = _open_below(str(root), sub, asked)
    held = f"/proc/self/fd/{folder}"
    try:
        yield Path(held)
    except OSError as e:
        e.filename = _named(e.filename, held, asked)
        if e.filename2 is not None:  # set, it would be shown
            e.filename2 = _named(e.filename2, held, asked)
        raise
    finally:
        os.close(folder)


def _open_below(root: str, sub: str, asked: str) -> int:
    """Open the folder root/sub with O_PATH, following no link below `root`."""
    if sub.startswith("/") or ".." in sub.split("/") or "\0" in sub:
        raise NotPlain(errno.EINVAL, "leads out of its folder", asked)
    top = os.open(root, _FOLDER)
    if not sub:
        return top
    try:
        return _open_without_links(top, sub)
    except OSError as e:
        if e.errno in (errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
            raise NotPlain(errno.ENOTDIR, "no folder by now", asked) from None
        e.filename = asked
        raise
    finally:
        os.close(top)


def _open_without_links(top: int, sub: str) -> int:
    """Open a folder below an open one by openat2(2), or part by part where the kernel has none (Linux 5.6)."""
    how = struct.pack("=QQQ", _FOLDER, 0, _BENEATH | _NO_SYMLINKS)
    folder = int(_syscall(_OPENAT2, top, os.fsencode(sub), how, len(how)))
    if folder >= 0:
        return folder
    code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EPERM):  # EPERM: a filter of system calls
        raise OSError(code, os.strerror(code))
    return _open_part_by_part(top, sub)


def _open_part_by_part(top: int, sub: str) -> int:
    folder = os.dup(top)
    try:
        for part in filter(None, sub.split("/")):
            inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
    except OSError:
        os.close(folder)
        raise
    return folder


def _named(name: object, held: str, asked: str) -> object:
    """Return a file name of an error with the folder as it was asked for."""
    text = os.fsdecode(name) if isinstance(name, bytes | os.PathLike) else name
    if isinstance(text, str) and (text == held or text.startswith(f"{held}/")):
        return asked + text[len(held) :]
    return name


def signature(status: os.stat_result) -> Signature:
    """Return numbers of a file, at least one of which changes when its content does."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def signature_of(path: Path) -> Signature | None:
    """The signature of a file; None if it is gone or not a regular file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return signature(status) if stat.S_ISREG(status.st_mode) else None
