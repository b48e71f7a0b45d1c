"""Turn a file in the inbox into a job that is being rendered: claim, resolve, take."""

import errno
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from promptdrop import clock, fs, untrusted
from promptdrop.nouns import Request
from promptdrop.spool.detail import ClaimedSettings, Detail, Settled
from promptdrop.spool.job import Job, Unresolved
from promptdrop.spool.paths import DROP, READY, state_of
from promptdrop.spool.spool import Spool


def claim(spool: Spool, sub: str, file: str) -> Unresolved:
    """Take a file out of the inbox.

    Raises FileNotFoundError: it was withdrawn. NotPlain: a folder above it is a link by now.

    Thread: clerk.
    """
    job_id = spool.ids.new()
    home = spool.paths.home("pending", job_id)
    folder = home / DROP / sub
    source = spool.paths.inbox / sub / file
    try:
        _make_home(spool, home, sub)
        with untrusted.below(spool.paths.inbox, sub) as inner:
            status = os.lstat(inner / file)
            fs.rename(inner / file, folder / file)
            with suppress(OSError):  # the claim stands, on a sick disk too
                status = os.lstat(folder / file)
            if stat.S_ISDIR(status.st_mode):  # it was swapped in: put it back
                fs.rename(folder / file, inner / file)
                raise untrusted.NotPlain(errno.EISDIR, os.strerror(errno.EISDIR), str(source))
            with suppress(OSError):  # the same
                fs.sync_directory(inner)
    except OSError as e:
        fs.remove_empty_tree(home)  # keeps the file, if it was moved after all
        if (
            e.filename2
        ):  # which of two folders has no room, nobody can tell; each try has another id
            e.filename2 = str(home.parent)
        raise
    take_marker(spool, home, sub, file)
    between = [folder, *folder.parents]
    for path in between[: between.index(home.parent) + 1]:
        with suppress(OSError):  # the same
            fs.sync_directory(path)
    return Unresolved(job_id, home, sub, file, status.st_ino)


def _make_home(spool: Spool, home: Path, sub: str) -> None:
    """Make pending/ID/drop/SUB, with the modes of our records whatever the umask."""
    mode = spool.config.output.record_folder_mode
    folder = home
    fs.make_directory(folder, mode)
    for part in (DROP, *filter(None, sub.split("/"))):
        folder /= part
        fs.make_directory(folder, mode)


def take_marker(spool: Spool, home: Path, sub: str, file: str) -> None:
    """Move FILE.done out of the inbox with FILE, as the next file of this name needs its own marker.

    Thread: clerk.
    """
    suffix = spool.config.watch.ready_suffix
    if suffix:
        with (
            suppress(OSError),  # gone, or moved before a crash; the claim of the file stands
            untrusted.below(spool.paths.inbox, sub) as inner,
        ):
            if not fs.exists(inner / file):
                fs.rename(inner / f"{file}{suffix}", home / READY)


def resolve(
    spool: Spool,
    claimed: Unresolved,
    request: Request,
    settled: Settled,
    settings: ClaimedSettings,
) -> Job:
    """Record what a claimed file asks for, seeds included, then make its outbox folder.

    This happens once in a job's life.

    Thread: clerk.
    """
    job = Job(
        id=claimed.id,
        paths=spool.paths,
        place=state_of(claimed.home),  # active, if its record was torn
        sub=sys.intern(claimed.sub),
        file=claimed.file,
        inode=claimed.inode,
        owner=os.lstat(claimed.drop).st_uid,
        folder="",
        priority=request.priority,
        images=len(request.images),
        must_fit=settings.prompt.overflow == "refuse",
        detail_in_memory=Detail(clock.timestamp(), settled, settings, request.images),
    )
    spool.outbox.choose_folder(job)
    return job


def take(job: Job) -> None:
    """Move a job whose first image is on its way from pending to active.

    Its detail is read first, so that trouble with a disk shows here and not later. This takes the reading
    of one small file if the job is closed, and one rename. Raises OSError.

    Thread: loop; clerk, once the loop has failed.
    """
    job.open()
    if job.place == "pending":
        fs.rename(job.home, job.paths.home("active", job.id))
        job.place = "active"


def take_cancel(spool: Spool, path: str) -> None:
    """Remove SUB/NAME.cancel, which was obeyed.

    One that cannot be removed does no harm: it names no job any more.

    Thread: clerk.
    """
    sub, _, file = path.rpartition("/")
    try:
        with untrusted.below(spool.paths.inbox, sub) as folder:
            fs.remove_file(folder / file)
    except (FileNotFoundError, PermissionError, untrusted.NotPlain):
        pass  # withdrawn, in a folder that we may not change, or swapped
