"""Which files and folders in the state folder are ours, so that what they say is believed."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

# No record but request.json comes near it: failing.json names at most 1,000,000 missing images.
RECORD_BYTES = 64 << 20
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


class NotOurs(ValueError):
    """The file is not ours, no regular file, or larger than any that we write."""


class Trust:
    """Believes what belongs to our user, to the owner of the state folder or to root, and only they may write.

    asks_modes: False on a share that gives each file one mode, whatever is asked for (CIFS, some of FUSE).
    """

    def __init__(self, state: Path) -> None:
        self._state = state
        # `Folders.prepare` finds out what our files get: a share may give all of them one owner and mode.
        self.owner, self.asks_modes = os.geteuid(), True

    def why_not(self, status: os.stat_result) -> str | None:
        """Say why a file or folder of this lstat(2) is not ours; None if it is.

        Thread: any.
        """
        mode, owner = status.st_mode, status.st_uid
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return "it is a link, or no file or folder at all"
        if owner not in (self.owner, 0) and owner != os.stat(self._state).st_uid:
            return f"it belongs to uid {owner}"
        if mode & _WRITABLE and self.asks_modes:
            return f"others may write it, mode {stat.S_IMODE(mode):04o}"
        return None

    def why_not_home(self, path: Path | str) -> str | None:
        """Say why the folder of a job is not ours, or of no use to us; None if it is. Raises OSError.

        Thread: any.
        """
        status = os.lstat(path)
        why = self.why_not(status) if stat.S_ISDIR(status.st_mode) else "it is no folder"
        is_plain = status.st_uid == self.owner and status.st_mode & stat.S_IRWXU == stat.S_IRWXU
        if not (why or is_plain or os.access(path, os.R_OK | os.W_OK | os.X_OK)):
            return f"uid {os.geteuid()} may not write it"
        return why

    def read(self, path: Path | str, limit: int = RECORD_BYTES) -> bytes:
        """Read a file of ours, with the fewest system calls. Raises NotOurs; OSError as open(2).

        Thread: any.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            if e.errno not in (errno.ELOOP, errno.ENXIO):
                raise
            raise NotOurs(f"{path}: it is a link or a socket") from None
        try:
            status = os.fstat(fd)
            why = self.why_not(status) if stat.S_ISREG(status.st_mode) else "it is no file"
            if why or status.st_size > limit:
                raise NotOurs(f"{path}: {why or 'it is too large'}")
            parts, left = [], status.st_size  # it does not grow: records are replaced, not changed
            while left > 0 and (part := os.read(fd, left)):
                parts.append(part)
                left -= len(part)
        finally:
            os.close(fd)
        return b"".join(parts)

    def read_json(self, path: Path | str, limit: int = RECORD_BYTES) -> dict[str, Any]:
        """Read a record of ours; empty if it is gone, torn, not ours or no JSON object.

        Thread: any.
        """
        try:
            return parse_json(self.read(path, limit))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return {}


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a record. Raises ValueError: it is none; RecursionError."""
    found = json.loads(data.decode())
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found
