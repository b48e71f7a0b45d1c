"""Carry out `promptdrop retry`: resume a parked job, or drop a refused file again."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from promptdrop import fs, names, untrusted
from promptdrop.errors import UsageError
from promptdrop.spool import record
from promptdrop.spool.failed import read_plan
from promptdrop.spool.job import Job
from promptdrop.spool.paths import (
    CANCELLED,
    FAILING,
    REASON,
    SUB_BYTES,
    parse_image_record,
    reason_file,
)
from promptdrop.spool.permissions import SHARED_MODE
from promptdrop.spool.record import read_json
from promptdrop.spool.spool import Spool

_INCURABLE = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)  # waiting does not make the path good


def retry(spool: Spool, target: str) -> Job | None:
    """Resume the job whose file is failed/`target`.

    Returns None where there is no job to resume, because the file was refused or the job's record is
    torn: the file is dropped anew.

    Raises UsageError: nothing there can be retried. OSError: a disk is in trouble, or the job has not quite ended.

    Thread: clerk.
    """
    if (home := _parked_home(spool, target)) and (job := unpark(spool, home)):
        spool.parked.forget(target)
        return job
    _require_file(spool.paths.failed, target)
    _drop_again(spool, target)
    return None


def unpark(spool: Spool, home: Path) -> Job | None:
    """Give a parked job its dropped file back, forget its failures, make it pending. Repeatable.

    Returns None, and changes nothing, where the job's record is torn.

    Thread: clerk.
    """
    pending = spool.paths.home("pending", home.name)
    if not fs.exists(pending) and not _make_whole(spool, home):
        return None
    if fs.exists(home):
        fs.rename(home, pending)
    fs.sync_directory(pending.parent)
    job = record.load(spool.paths, pending, os.listdir(pending))
    spool.outbox.hold(job)
    return job


def _make_whole(spool: Spool, home: Path) -> bool:
    """Give a parked job its file back and forget its failures. False: its record cannot be believed."""
    if spool.paths.trust.why_not_home(home):
        return False
    job = record.load_if_whole(spool.paths, str(home), os.listdir(home))
    if job is None:
        return False
    plan = read_plan(spool, home)
    if plan:
        _take_back(spool, plan[0], job.drop)
    _forget_failures(home)
    if plan:
        _remove_reason(spool.paths.failed, plan[0])
    fs.remove_file(home / CANCELLED)
    fs.remove_file(home / FAILING)
    return True


def _take_back(spool: Spool, target: str, drop: Path) -> None:
    """Move the file of a job back from failed/`target`, if that is not done yet."""
    sub, file = os.path.split(target)
    if not fs.exists(drop):
        with untrusted.below(spool.paths.failed, sub) as folder:
            _move_file(folder / file, drop, spool.job_file_bytes)
        return
    with suppress(OSError), untrusted.below(spool.paths.failed, sub) as folder:
        fs.move(folder / file, drop)  # the rest of a copy to another file system, if it is that


def _require_plain(source: Path, folder: Path, limit: int) -> None:
    """Raise NotPlain unless `source` is a regular file; UsageError if moving it to `folder` takes too long.

    limit: bytes that may be copied to another file system.
    """
    status = os.lstat(source)
    if not stat.S_ISREG(status.st_mode):
        raise untrusted.NotPlain(errno.EINVAL, "not a regular file", str(source))
    if status.st_size > limit and status.st_dev != os.stat(folder).st_dev:
        raise UsageError(f"{status.st_size} bytes; expected at most {limit}: limits.job_file_kib")


def _move_file(source: Path, target: Path, limit: int) -> None:
    """Move a regular file, as `_require_plain`. What was swapped in for it at the last moment is put back.

    Raises FileExistsError.
    """
    _require_plain(source, target.parent, limit)
    fs.move(source, target)
    if not stat.S_ISREG(os.lstat(target).st_mode):
        fs.rename(target, source)
        raise untrusted.NotPlain(errno.EINVAL, "changed while it was moved", str(source))


def _forget_failures(home: Path) -> None:
    """Remove the records of images that were not rendered, so that they are todo again."""
    for entry in fs.entries(home):
        if (known := parse_image_record(entry.name)) is None:
            continue
        is_placeholder = (
            known[1] == "published" and read_json(entry.path).get("outcome") == "placeholder"
        )
        if known[1] in ("failed", "begun") or is_placeholder:
            os.unlink(entry.path)


def _remove_reason(failed: Path, target: str) -> None:
    """Remove the reason of a file that is retried. One that cannot be removed says nothing any more."""
    sub, file = os.path.split(target)
    with suppress(OSError), untrusted.below(failed, sub) as folder:
        os.unlink(reason_file(folder / file))


def _parked_home(spool: Spool, target: str) -> Path | None:
    """Find the folder of the parked job whose file is failed/`target`; None if there is none."""
    if (job_id := spool.parked.id_of(target)) is None:
        return None
    home, pending = (spool.paths.home(state, job_id) for state in ("parked", "pending"))
    is_halfway = fs.exists(pending) and not fs.exists(pending / FAILING)  # of this retry
    if fs.exists(home) or is_halfway:
        return home
    if spool.paths.is_in_hand(job_id):
        text = f"its job {job_id} has not ended yet"
        raise OSError(errno.EBUSY, text, str(spool.paths.failed / target))
    return None


def _is_reason(path: Path) -> bool:
    """Whether a file says why another one lies beside it, and is no job of its own."""
    other = path.name.removesuffix(REASON)
    return other not in ("", path.name) and fs.exists(path.with_name(other))


def _require_file(failed: Path, target: str) -> None:
    """Raise UsageError unless failed/`target` is a regular file: anybody in the group may name it."""
    sub, file = os.path.split(target)
    status = None
    try:
        is_ours = names.is_job_name(file) or names.is_cancel(file)  # what a refusal moved there
        if is_ours and names.is_below(target) and len(os.fsencode(sub)) <= SUB_BYTES:
            with untrusted.below(failed, sub) as folder:
                if not _is_reason(folder / file):
                    status = fs.status_of(folder / file)
    except (ValueError, FileNotFoundError, untrusted.NotPlain):
        pass  # half a surrogate pair; gone; a link on the way there
    except OSError as e:
        if e.errno not in _INCURABLE:
            raise
    if status is None or not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{names.printable(target[:300])}: no such file in {failed}")


def _drop_again(spool: Spool, target: str) -> None:
    """Move a refused file back to the inbox. Its reason is removed first: a crash repeats the command."""
    sub, file = os.path.split(target)
    stem, suffix = names.split(file)
    root, ready = spool.paths.inbox, spool.config.watch.ready_suffix
    longest = 255 - len(os.fsencode(ready or ""))
    fs.make_directories(root, sub, SHARED_MODE)
    with untrusted.below(spool.paths.failed, sub) as failed, untrusted.below(root, sub) as inbox:
        _require_plain(failed / file, inbox, spool.job_file_bytes)
        _remove_reason(failed, file)
        n = 1
        while True:
            drop = inbox / names.numbered(stem, suffix, n, longest)
            marker = drop.with_name(f"{drop.name}{ready}") if ready else None
            if not fs.exists(drop) and _drop(failed / file, drop, marker, spool.job_file_bytes):
                return
            n += 1


def _drop(source: Path, drop: Path, marker: Path | None, limit: int) -> bool:
    """Move a file into the inbox, with its marker; False if another has taken the name meanwhile.

    The marker comes first, so that no crash leaves the file without. Nobody else's file is taken for
    its sake: one that was made just now has not settled.
    """
    is_marked = marker is not None and _make_marker(marker)
    try:
        _move_file(source, drop, limit)
    except (OSError, UsageError) as e:
        was_taken = isinstance(e, FileExistsError)
        if marker and is_marked and (was_taken or not fs.exists(drop)):
            fs.remove_file(marker)
        if was_taken:
            return False
        raise
    return True


def _make_marker(path: Path) -> bool:
    """Make an empty file, following no link; False if something has its name."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        os.close(os.open(path, flags, 0o666))
    except FileExistsError:
        return False
    return True
