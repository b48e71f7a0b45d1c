"""Make folders, and tell whether this process may use them, in words that name the cure."""

import os
import stat
from pathlib import Path

from promptdrop import fs
from promptdrop.errors import ConfigError

SHARED_MODE = 0o2775  # inbox, outbox, failed and control: the whole group may write
OWN_MODE = 0o2755  # only the daemon writes
_CAP_FOWNER = 3  # linux/capability.h


def describe_permissions(path: Path) -> str:
    """Return `/x (uid 1000, gid 1000, mode 0755; we are uid 990)`, for messages about permissions.

    Thread: any.
    """
    try:
        status = os.stat(path)
    except OSError as e:
        return f"{path} ({e.strerror})"
    return f"{path} (uid {status.st_uid}, gid {status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}; we are uid {os.geteuid()})"


def why_not_moved(folder: Path) -> str | None:
    """Say why this process cannot move files of others out of a folder of the inbox, and the cure.

    Thread: any.
    """
    status = os.stat(folder)
    described = describe_permissions(folder)
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{described} is on a file system mounted read-only; mount it read-write"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{described} is read-only for us; give it to our group and: chmod g+rwx {folder}"
    is_sticky = status.st_mode & stat.S_ISVTX and os.geteuid() != status.st_uid
    if is_sticky and not _may_act_as_owner():
        return f"{described} is sticky: only the owner of a file may move it out; chmod -t {folder}"
    return None


def _may_act_as_owner() -> bool:
    """Whether this process has CAP_FOWNER, which even root may lack: capabilities(7)."""
    with open("/proc/self/status", "rb") as lines:
        effective = next(line for line in lines if line.startswith(b"CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_FOWNER & 1)


def is_for_us(path: Path) -> bool:
    """Whether it is a folder, and no link to one, that we can list and fill. Raises OSError: this cannot be told now.

    A folder on a read-only file system counts: that is trouble which passes, not somebody's wish.

    Thread: clerk.
    """
    status = fs.status_of(path)
    return status is not None and stat.S_ISDIR(status.st_mode) and may_fill(path)


def may_fill(folder: Path) -> bool:
    """Whether we can list and fill a folder, or could if its file system were not read-only now.

    Thread: any.
    """
    is_read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    return is_read_only or os.access(folder, os.R_OK | os.W_OK | os.X_OK)


def make_folder(path: Path, mode: int = SHARED_MODE) -> None:
    """Make a folder and its parents; new files inherit its group. Raises ConfigError."""
    try:
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            fs.make_directory(path, mode)
    except FileExistsError:
        if not path.is_dir():
            raise ConfigError(f"{path} exists and is not a folder") from None
    except OSError as e:
        raise ConfigError(
            f"{path} cannot be made: {e.strerror}: {describe_permissions(path.parent)}"
        ) from None


def refuse_link(path: Path) -> None:
    """Raise ConfigError if a folder of our own is a link: whoever made it would decide where our records lie."""
    if path.is_symlink():
        raise ConfigError(
            f"{path} is a link; remove it, or mount the folder that it names there: mount --bind"
        )


def try_modes(folder: Path) -> tuple[int, bool]:
    """Make a file in a folder of our own and see: (the uid it gets, whether it has the mode that we gave it).

    A share may give everything one owner and one mode. While the disk is full or sick, what is there has to
    tell. Raises ConfigError: we may not make anything there.
    """
    try:
        with fs.temporary(folder, 0o600) as (file, _):
            status = os.fstat(file.fileno())
    except PermissionError:
        described = describe_permissions(folder)
        cure = f"chown -R {os.geteuid()} {folder}"
        raise ConfigError(f"{described} cannot be written; to give it to us: {cure}") from None
    except OSError:
        status = os.stat(folder)
        return status.st_uid, not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid, stat.S_IMODE(status.st_mode) == 0o600
