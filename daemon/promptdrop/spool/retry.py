"""Carry out `promptdrop retry`: resume a parked job, or drop a refused file again."""

import errno
import os
import stat
from pathlib import Path

from promptdrop import fs, names, untrusted
from promptdrop.errors import UsageError
from promptdrop.spool import record
from promptdrop.spool.failed import status_of
from promptdrop.spool.ids import is_job_id
from promptdrop.spool.job import Job
from promptdrop.spool.paths import CANCELLED, FAILING, parse_image_record, reason_file
from promptdrop.spool.permissions import SHARED_MODE
from promptdrop.spool.record import read_failing, read_json
from promptdrop.spool.spool import Spool

_INCURABLE = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)  # waiting does not make the path good


def retry(spool: Spool, target: str) -> Job | None:
    """Resume the job whose file is failed/`target`.

    Returns None where there is no job to resume, because the file was refused or the job's record is
    torn: the file is dropped anew.

    Raises UsageError: nothing there can be retried.

    Thread: clerk.
    """
    _require_inside(spool.paths.failed, target)
    if (home := _parked_home(spool, target)) and (job := unpark(spool, home)):
        return job
    if not (spool.paths.failed / target).is_file():
        raise UsageError(f"{names.printable(target)}: no such file in {spool.paths.failed}")
    _drop_again(spool, target)
    return None


def unpark(spool: Spool, home: Path) -> Job | None:
    """Give a parked job its dropped file back, forget its failures, make it pending. Repeatable.

    Returns None, and changes nothing, where the job's record is torn.

    Thread: clerk.
    """
    if spool.paths.trust.why_not_home(home):
        return None
    job = record.load_if_whole(spool.paths, str(home), os.listdir(home))
    if job is None:
        return None
    plan = read_failing(spool.paths, home)
    if plan and not fs.exists(job.drop):
        sub, _, file = plan["target"].rpartition("/")
        with untrusted.below(spool.paths.failed, sub) as folder:
            fs.move(folder / file, job.drop)
    _forget_failures(home)
    if plan:
        fs.remove_file(reason_file(spool.paths.failed / plan["target"]))
    fs.remove_file(home / CANCELLED)
    fs.remove_file(home / FAILING)
    pending = spool.paths.home("pending", job.id)
    fs.rename(home, pending)
    fs.sync_directory(pending.parent)
    spool.outbox.hold(job)
    return record.load(spool.paths, pending, os.listdir(pending))


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


def _require_inside(failed: Path, target: str) -> None:
    """Raise UsageError if `target` cannot be a file in failed/: anybody in the group may name it."""
    sub, _, file = target.rpartition("/")
    try:
        is_inside = bool(file) and ".." not in (file, *Path(sub).parts) and target[0] != "/"
        if is_inside and fs.exists(failed / sub):
            with untrusted.below(failed, sub) as folder:
                status = status_of(folder / file)
            is_inside = status is None or stat.S_ISREG(status.st_mode)
    except ValueError:  # NUL, or half a surrogate pair
        is_inside = False
    except OSError as e:
        if not isinstance(e, untrusted.NotPlain) and e.errno not in _INCURABLE:
            raise
        is_inside = False
    if not is_inside:
        raise UsageError(f"{names.printable(target[:300])}: no file in {failed}")


def _parked_home(spool: Spool, target: str) -> Path | None:
    """Find the folder of the parked job whose file is failed/`target`; None if there is none."""
    known = str(read_json(reason_file(spool.paths.failed / target)).get("id"))
    likely = [str(spool.paths.home("parked", known))] if is_job_id(known) else []
    # All are read only if the reason is gone, as after a retry that trouble with a disk cut short.
    for home in likely or spool.folders.homes("parked"):
        if read_failing(spool.paths, home).get("target") == target:
            return Path(home)
    return None


def _drop_again(spool: Spool, target: str) -> None:
    """Move a refused file back to the inbox. Its reason is removed first: a crash repeats the command."""
    sub, _, file = target.rpartition("/")
    stem, suffix = names.split(file)
    root = spool.paths.inbox
    fs.make_directories(root, sub, SHARED_MODE)
    with untrusted.below(spool.paths.failed, sub) as failed, untrusted.below(root, sub) as inbox:
        fs.remove_file(reason_file(failed / file))
        n = 1
        while fs.exists(failed / file):
            name = names.numbered(stem, suffix, n)
            try:
                fs.move(failed / file, inbox / name)
            except FileExistsError:
                n += 1
                continue
            if ready := spool.config.watch.ready_suffix:
                (inbox / f"{name}{ready}").touch()
