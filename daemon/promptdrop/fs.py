"""Files and folders of our own: durable writes, exclusive moves, listing, removal.

A durable write is a hidden temporary, fsync, rename, fsync of the directory; there is no other place
that does it. Moves are exclusive (renameat2, RENAME_NOREPLACE), so that no file of others is
overwritten. Every temporary starts with `.promptdrop-`, by which a later start finds leftovers.
Everything here may wait for a disk. Any thread may call it, since there is no state.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from promptdrop.untrusted import below, open_plain

TEMPORARY = ".promptdrop-"
_COMPARED = 64 << 20  # bytes: more than limits.job_file_kib allows by far
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1  # renameat2(2); glibc 2.28
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # NFS, some FUSE file systems

_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def rename(source: Path, target: Path) -> None:
    """Rename within a file system, never onto an existing name.

    Raises FileExistsError: the target exists. FileNotFoundError: the source is gone.
    """
    try:
        _rename_exclusively(source, target)
    except OSError as e:
        if e.errno in (errno.EEXIST, errno.EXDEV) or not _took_place(source, target):
            raise


def move(source: Path, target: Path) -> None:
    """Move a file, durably, also across file systems (hidden copy, fsync, rename, then unlink).

    A target that is already the same file, byte for byte, is a move that a crash cut short: the
    source goes. Raises FileExistsError: the target is another file.
    """
    try:
        _rename_or_copy(source, target)
    except FileExistsError:
        if not _is_rest_of_move(source, target):
            raise
        os.unlink(source)
    sync_directory(target.parent)
    sync_directory(source.parent)


def write_durably(path: Path, data: bytes, mode: int) -> None:
    """Write a file that replaces any older one in one step and survives a power cut."""
    with temporary(path.parent, mode) as (file, name):
        file.write(data)
        sync(file)
        os.replace(name, path)
    sync_directory(path.parent)


def write_once(path: Path, data: bytes, mode: int) -> None:
    """Write a new file durably. Raises FileExistsError: the name is taken."""
    with temporary(path.parent, mode) as (file, name):
        file.write(data)
        sync(file)
        rename(name, path)
    sync_directory(path.parent)


def write_quickly(path: Path, data: bytes, mode: int) -> None:
    """Replace a file in one step, without flushing: a power cut may lose it. One writer at a time.

    Each path has one temporary, so that the next write removes what a crash has left.
    """
    leftover: Path | None = path.parent / f"{TEMPORARY}{path.name}.tmp"
    try:
        remove_file(path.parent / f"{TEMPORARY}{path.name}.tmp")
    except OSError:
        leftover = None  # somebody's folder has that name: another one does
    with temporary(path.parent, mode, name=leftover) as (file, name):
        file.write(data)
        file.flush()
        os.replace(name, path)


def touch_durably(path: Path) -> None:
    """Make an empty file that survives a power cut, in one step; it may exist already."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.fsync(fd)
    except OSError as e:
        e.filename = str(path)  # fsync(2) names no file, and a message must
        raise
    finally:
        os.close(fd)
    sync_directory(path.parent)


def write_temporary(directory: Path, data: bytes, mode: int) -> Path:
    """Write `data` durably under a hidden name in `directory`, to be renamed later."""
    with temporary(directory, mode, keep=True) as (file, name):
        file.write(data)
        sync(file)
        sync_directory(directory)
    return name


@contextlib.contextmanager
def temporary(
    directory: Path, mode: int, keep: bool = False, name: Path | None = None
) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a new hidden file, which is unlinked at the end unless it was renamed.

    With `keep` it is unlinked only after an error.
    """
    name = name or directory / f"{TEMPORARY}{secrets.token_hex(8)}.tmp"
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            _share(fd, mode, directory)
            yield file, name
    except BaseException as e:
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(directory)  # write(2) and fsync(2) name no file, and a message must
        remove_file(name)
        raise
    if not keep:
        remove_file(name)


def sync(file: BinaryIO) -> None:
    """Flush a file's content to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, where the file system can (some FUSE cannot)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            e.filename = str(path)
            raise
    finally:
        os.close(fd)


def make_directories(root: Path, sub: str, mode: int) -> None:
    """Make the folder root/sub and what is missing above it, each with `mode`; follow no link below `root`.

    Raises NotPlain: a part of `sub` is a link or no folder. FileNotFoundError: `root` is gone.
    """
    missing = []
    while True:
        try:
            with below(root, sub):
                break
        except FileNotFoundError:
            if not sub:
                raise
        sub, name = os.path.split(sub)
        missing.append(name)
    for name in reversed(missing):
        with below(root, sub) as outer, contextlib.suppress(FileExistsError):  # somebody was faster
            make_directory(outer / name, mode)
            sync_directory(outer)
        sub = os.path.join(sub, name)
    with below(root, sub):
        pass  # it is a folder


def make_directory(path: Path, mode: int) -> None:
    """Make a folder with this mode, whatever the umask, and its parent's group.

    Raises FileExistsError.
    """
    os.mkdir(path)
    share(path, mode, path.parent, os.O_DIRECTORY)


def share(path: Path, mode: int, folder: Path, kind: int = 0) -> None:
    """Give a file or folder this mode and the group of `folder`, as far as we may.

    Every program of the group can then fetch and delete it, also where setgid is not set.
    A link is not followed. kind: os.O_DIRECTORY, if nothing but a folder is meant.
    """
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags | kind)
    except OSError as e:
        _refused(e)  # not ours and unreadable for us, or a link
        return
    try:
        _share(fd, mode, folder)
    finally:
        os.close(fd)


def _share(fd: int, mode: int, folder: Path) -> None:
    """Do what `share` does for an open file."""
    try:
        group = os.stat(folder).st_gid
        if os.fstat(fd).st_gid != group:
            os.fchown(fd, -1, group)
    except OSError as e:
        _refused(e)  # we are not in that group: the file keeps ours, and doctor says so
    try:
        os.fchmod(fd, mode)
    except OSError as e:
        _refused(e)  # not ours, or on a share with forced modes (CIFS, FUSE): its mode stays


def _refused(error: OSError) -> None:
    """Ignore an error that means: not ours to change, or not supported by the file system."""
    if error.errno not in (errno.EPERM, errno.EACCES, errno.ELOOP, errno.ENOTDIR, *_UNSUPPORTED):
        raise error


def exists(path: Path) -> bool:
    """Whether something has this name, even a dangling link. Raises OSError: this cannot be told now.

    Path.exists and os.path.lexists return False then, and a file taken for gone may be given up.
    """
    return status_of(path) is not None


def status_of(path: Path) -> os.stat_result | None:
    """Return lstat(2) of a path; None if nothing has this name. Raises OSError: this cannot be told now."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder; none if it is gone. Raises OSError: some of it cannot be read."""
    for entry in entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from files(Path(entry.path))
        else:
            yield Path(entry.path)


def walk(root: Path) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yield every folder at and below `root` that can be read, as a path below it, with its entries.

    No link is followed, not even one that was put there meanwhile; the entries' own paths hold until the
    next folder. It goes to any depth: os.walk and Path.rglob recurse, and anybody can make a tree too deep
    for them.
    """
    folders = [""]
    while folders:
        sub = folders.pop()
        with contextlib.ExitStack() as stack:
            try:
                with os.scandir(stack.enter_context(below(root, sub))) as scan:
                    listed = list(scan)
                inner = [entry.name for entry in listed if entry.is_dir(follow_symlinks=False)]
            except OSError:
                continue  # gone, closed to us, or its path is too long
            folders += [os.path.join(sub, name) for name in inner]
            yield sub, listed


def remove_empty_tree(path: Path) -> None:
    """Remove a directory of our own with all folders in it, unless one of them holds a file."""
    for parent, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(parent)
        except OSError:
            pass  # it holds a file, or the disk is sick: it is looked at after the next start


def remove_tree(path: Path) -> None:
    """Remove a directory of our own with all it holds; it may be gone already."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass  # somebody tidied up


def remove_file(path: Path) -> None:
    """Unlink a file of our own; it may be gone already."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # renamed into place, never written, or somebody was faster


def remove_temporaries(directory: Path) -> None:
    """Remove what a crash left half-written in a directory of ours."""
    for entry in entries(directory):
        if entry.name.startswith(TEMPORARY) and entry.is_file(follow_symlinks=False):
            remove_file(Path(entry.path))


def entries(directory: Path) -> list[os.DirEntry[str]]:
    """List the entries of a directory; none if it is gone."""
    try:
        with os.scandir(directory) as scan:
            return list(scan)
    except FileNotFoundError:
        return []


def _rename_or_copy(source: Path, target: Path) -> None:
    try:
        rename(source, target)
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        _copy(source, target)
        os.unlink(source)


def _rename_exclusively(source: Path, target: Path) -> None:
    if _renameat2 is not None:
        arguments = (os.fsencode(source), os.fsencode(target))
        if not _renameat2(_AT_FDCWD, arguments[0], _AT_FDCWD, arguments[1], _RENAME_NOREPLACE):
            return
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), str(source), None, str(target))
    if exists(target):  # the best there is without RENAME_NOREPLACE
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def _took_place(source: Path, target: Path) -> bool:
    """Whether a rename that was reported as failed was done: network file systems repeat requests.

    A server that has done the first request answers ENOENT to the second; if its answer is lost, the
    client reports EIO or ETIMEDOUT (rename(2), "BUGS").
    """
    return exists(target) and not exists(source)


def _copy(source: Path, target: Path) -> None:
    """Copy a file durably, never onto an existing name.

    A link, pipe or device is made anew, without reading through it.
    """
    status = os.lstat(source)
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(source), target)
        return
    if not stat.S_ISREG(status.st_mode):
        os.mknod(target, status.st_mode, status.st_rdev)
        return
    with open_plain(source) as original, temporary(target.parent, 0o600) as (file, name):
        shutil.copyfileobj(original, file, 1 << 20)
        file.flush()  # a later write would change the time again
        # By descriptor, and without setuid and setgid: the copy belongs to our user.
        os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode) & 0o777)
        os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
        sync(file)
        rename(name, target)


def _is_rest_of_move(source: Path, target: Path) -> bool:
    """Whether a crash came between the copy of a file and the removal of the original.

    The target may be anybody's: it is opened without waiting, and no more is compared than a job file has.
    """
    there, here = os.lstat(target), os.lstat(source)
    is_copy = there.st_dev != here.st_dev and there.st_size == here.st_size <= _COMPARED
    if not is_copy or not (stat.S_ISREG(there.st_mode) and stat.S_ISREG(here.st_mode)):
        return False
    with open_plain(source) as original, open_plain(target) as copy:
        return original.read(_COMPARED) == copy.read(_COMPARED)
