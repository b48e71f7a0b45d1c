"""A FUSE file system that shows a folder and fails as it is told: faulty_disk.py FOLDER MOUNT CONTROL.

CONTROL is a JSON file that is read at every call; disks.Faulty.fail says what may stand in it.
"""

import ctypes
import errno
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import mfusepy

_STAT = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino", "st_blocks")
_STATVFS = (
    "f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_frsize",
    "f_namemax",
)  # fmt: skip


_OPERATIONS = (
    "getattr", "readdir", "open", "create", "read", "write", "truncate", "fsync", "fsyncdir",
    "rename", "unlink", "mkdir", "rmdir", "chmod",
)  # fmt: skip


class FaultyDisk(mfusepy.Operations):
    """Passes every call on to a folder, after its fault."""

    use_ns = True

    def __init__(self, folder: str, control: str) -> None:
        self._folder, self._control = folder, control
        self._text, self._faults, self._left = "", {}, 0.0
        for name in _OPERATIONS:
            setattr(self, name, functools.partial(self._call, name, getattr(self, name)))

    def _call(self, name: str, operation: Callable[..., Any], path: str, *rest: Any) -> Any:
        """Carry out a call, or its fault. All calls come through here, one after the other."""
        faults = self._read_faults()
        paths = [path, *(one for one in rest if name == "rename" and isinstance(one, str))]
        match = re.compile(faults.get("match", ""))
        is_hit = name in faults["operations"] and any(map(match.search, paths))
        if not is_hit or self._left <= 0:
            return operation(path, *rest)
        self._left -= 1
        time.sleep(faults.get("delay", 0))
        if not faults["error"]:
            return operation(path, *rest)
        if faults.get("done"):
            operation(path, *rest)
        raise mfusepy.FuseOSError(getattr(errno, faults["error"]))

    def _read_faults(self) -> dict[str, Any]:
        with open(self._control, encoding="utf-8") as file:
            text = file.read()
        if text != self._text:
            self._text, self._faults = text, json.loads(text)
            self._left = self._faults.get("times", float("inf"))
        return self._faults

    def _behind(self, path: str) -> str:
        return self._folder + path

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        status = os.lstat(self._behind(path))
        times = {
            name: getattr(status, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")
        }
        return {**{name: getattr(status, name) for name in _STAT}, **times}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._behind(path))]

    def access(self, path: str, mode: int) -> int:
        return 0

    def open(self, path: str, flags: int) -> int:
        return os.open(self._behind(path), flags & ~os.O_CREAT)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._behind(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._behind(path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._behind(old), self._behind(new))
        return 0

    def link(self, target: str, source: str) -> int:
        os.link(self._behind(source), self._behind(target))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._behind(path))
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._behind(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._behind(path))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._behind(path), mode)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        os.utime(self._behind(path), ns=times)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        status = os.statvfs(self._behind(path))
        return {name: getattr(status, name) for name in _STATVFS}


if __name__ == "__main__":
    # It must not outlive the test run: PR_SET_PDEATHSIG, SIGTERM.
    ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
    # The kernel caches nothing, so that every call comes here.
    mfusepy.FUSE(
        FaultyDisk(sys.argv[1], sys.argv[3]), sys.argv[2], foreground=True, nothreads=True,
        noforget=True, attr_timeout=0, entry_timeout=0, negative_timeout=0,
    )  # fmt: skip
