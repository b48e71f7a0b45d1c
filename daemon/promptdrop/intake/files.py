"""Walk the inbox: find the files that may be jobs, and name those that are never taken."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from promptdrop import fs, names, untrusted
from promptdrop.spool.paths import SUB_BYTES

NOT_OURS = (
    FileNotFoundError,
    NotADirectoryError,
    PermissionError,
    untrusted.NotPlain,
)  # withdrawn, or unreadable for us


# A regular file that is a job or a cancel mark by its name: the folder below the inbox ("" at the
# root), its entry, and all names in that folder. A plain tuple, as there may be 100,000 of them.
Found = tuple[str, os.DirEntry[str], set[str]]


def below(sub: str, name: str) -> str:
    """Return SUB/NAME; NAME at the root of the inbox."""
    return f"{sub}/{name}" if sub else name


def job_files(root: Path, recursive: bool, sick: Callable[[str, OSError], None]) -> Iterator[Found]:
    """Find every job file and cancel mark in the inbox; an entry's path holds until the next one.

    What cannot be looked at below the inbox is given to `sick`, a folder as SUB/. Raises OSError: the inbox
    itself cannot be read.

    Thread: scanner.
    """
    device = os.stat(root).st_dev
    folders = [""]
    while folders:
        sub = folders.pop()
        try:
            with untrusted.below(root, sub) as folder:
                for entry, siblings in _listed(folder):
                    try:
                        is_folder = entry.is_dir(follow_symlinks=False)
                    except OSError as e:
                        sick(below(sub, entry.name), e)
                        continue
                    if is_folder:
                        if recursive and is_entered(entry, sub, device):
                            folders.append(below(sub, entry.name))
                    elif _is_ours(entry.name) and entry.is_file(follow_symlinks=False):
                        yield sub, entry, siblings
        except OSError as e:
            if not sub:
                raise
            sick(f"{sub}/", e)


def _listed(folder: Path) -> Iterator[tuple[os.DirEntry[str], set[str]]]:
    """Yield the entries of a folder, each with the names of all."""
    with os.scandir(folder) as scan:
        listed = list(scan)
    siblings = {entry.name for entry in listed}
    for entry in listed:
        yield entry, siblings


def strangers(root: Path) -> Iterator[tuple[str, str]]:
    """Find what looks like a job or folder but is never taken: (path below the inbox, why)."""
    for sub, listed in fs.walk(root):
        for entry in listed:
            path = below(sub, entry.name)
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


def _is_ours(name: str) -> bool:
    return names.is_job_name(name) or names.is_cancel(name)


def is_entered(entry: os.DirEntry[str], sub: str, device: int) -> bool:
    """Whether a sub-folder is entered: not another program's own, no mount point, not too deep."""
    return (
        not names.is_ignored_folder(entry.name)
        and _device(entry) == device
        and len(os.fsencode(below(sub, entry.name))) <= SUB_BYTES
    )


def _device(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat(follow_symlinks=False).st_dev
    except OSError:
        return None  # gone, or stat failed: not entered
