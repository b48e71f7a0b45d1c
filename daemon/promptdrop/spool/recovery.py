"""Go on after a crash: every folder in the state folder says what is left of its job."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from promptdrop import fs
from promptdrop.records import ErrorRecord
from promptdrop.spool import claim, cleared, ending, record, retry
from promptdrop.spool.failed import move_to_failed, read_plan
from promptdrop.spool.job import Job, Unresolved
from promptdrop.spool.outbox import FolderLost
from promptdrop.spool.paths import (
    CANCELLED,
    DROP,
    FAILING,
    IN_HAND,
    Paths,
    parse_image_record,
    state_of,
)
from promptdrop.spool.record import read_failing
from promptdrop.spool.spool import Spool

_THREADS, _SLICE = 8, 128  # threads that read folders, and how many folders each at a time

# The names in a job's folder, and the job if it is recorded; or why it cannot be looked at.
_Found = tuple[list[str], Job | None] | OSError
Left = Job | Unresolved  # a job to go on with, or a claim to be read again


def recover(spool: Spool) -> tuple[list[Left], list[Path]]:
    """Return what to go on with, in the order it came, and the folders of jobs that cannot be recovered now.

    Half-made moves are completed here, half-published images by `publish.recover`. Trouble with a disk on
    which one job's files lie holds up that job: `recover_one` it later.
    Repeatable. Raises OSError, DiskTrouble: a folder that all need cannot be used now.

    Thread: clerk.
    """
    paths = spool.paths
    spool.folders.require()
    spool.duplicates.forget_old()
    for finished in spool.folders.homes("finished"):
        fs.remove_tree(Path(finished))
    spool.parked.clear()
    left: list[Left] = []
    troubled: list[Path] = []

    def go_on(home: str, found: _Found) -> None:
        try:
            if isinstance(found, OSError):
                raise found
            one = _recover_home(spool, home, *found)
        except OSError:
            troubled.append(Path(home))
        else:
            left.extend([one] if one else [])

    for home in spool.folders.homes("parked"):  # one that was being retried is pending then
        go_on(home, ([], None))
    homes = sorted(spool.folders.homes(*IN_HAND), key=os.path.basename)
    for home, found in zip(homes, _look_into(paths, homes), strict=True):
        go_on(home, found)
    _remove_temporaries(paths)
    return left, troubled


def recover_one(spool: Spool, home: Path) -> Left | None:
    """Do for the job of one folder what `recover` does for all. Repeatable. Raises OSError.

    Thread: clerk.
    """
    if state_of(home) == "parked":
        _recover_parked(spool, home)
        home = spool.paths.home("pending", home.name)
    if not fs.exists(home):
        return None
    listed = os.listdir(home)
    job = record.load_if_whole(spool.paths, str(home), listed)
    return _recover_home(spool, str(home), listed, job)


def _recover_home(spool: Spool, home: str, listed: list[str], job: Job | None) -> Left | None:
    """Complete what was half-done with one job; returns what to go on with, None if it has ended."""
    if state_of(home) == "parked":
        _recover_parked(spool, Path(home))
        return None
    if any(name.startswith(fs.TEMPORARY) for name in listed):
        fs.remove_temporaries(Path(home))
    is_failing = FAILING in listed and bool(read_failing(spool.paths, home))
    if job:
        return _recover_job(spool, job, is_failing)
    return _recover_claim(spool, Path(home), is_failing)


def _look_into(paths: Paths, homes: list[str]) -> Iterator[_Found]:
    """Yield the content of each folder. Uses eight threads, because nothing is cached after a power cut."""

    def look(some: list[str]) -> list[_Found]:
        return [_look_into_one(paths, home) for home in some]

    slices = [homes[n : n + _SLICE] for n in range(0, len(homes), _SLICE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(look, slices):
            yield from found


def _look_into_one(paths: Paths, home: str) -> _Found:
    try:
        listed = os.listdir(home)
        return listed, record.load_if_whole(paths, home, listed)
    except OSError as e:
        return e


def _recover_job(spool: Spool, job: Job, is_failing: bool) -> Job | None:
    """Return the job to go on with; None if it was at its end, which is completed here.

    Whether its outbox folder still stands is seen when something is put there.
    """
    spool.outbox.hold(job)
    if is_failing:
        _remove_temporaries_of(spool, job)
        ending.finish(spool, job)
        return None
    if job.must_fit and job.is_fresh:
        job.open()  # it is measured first, by the loop
    else:
        job.close()
    return job


def _remove_temporaries_of(spool: Spool, job: Job) -> None:
    try:
        with spool.outbox.folder(job) as folder:
            fs.remove_temporaries(folder)
    except FolderLost:
        pass  # taken away with what was in it


def _recover_claim(spool: Spool, home: Path, is_failing: bool) -> Unresolved | None:
    """Return the claim to be read again; None if it held no file, or was being refused."""
    drop = next(fs.files(home / DROP), None)
    if is_failing:
        claimed = _unresolved(home, drop or home / DROP / "gone")
        planned = ErrorRecord.model_validate(read_failing(spool.paths, home)["record"])
        move_to_failed(spool, claimed, planned)
        ending.leave(spool, home, "finished")
        return None
    if drop is None:
        fs.remove_tree(home)
        return None
    _forget_images(home)
    claimed = _unresolved(home, drop)
    claim.take_marker(spool, home, claimed.sub, claimed.file)
    return claimed


def _forget_images(home: Path) -> None:
    """Remove the records of images of a request that is torn and is made anew."""
    for entry in fs.entries(home):
        if parse_image_record(entry.name):
            fs.remove_file(Path(entry.path))


def _recover_parked(spool: Spool, home: Path) -> None:
    """Complete a retry that had begun; remove a job whose file somebody has taken out of failed/."""
    if any(True for _ in fs.files(home / DROP)):
        if retry.unpark(spool, home) is None:
            _claim_again(spool, home)
    elif plan := read_plan(spool, home):
        target, _ = plan
        if cleared.is_missing(spool, target):
            ending.leave(
                spool, home, "finished"
            )  # the file is a new job now, if it is dropped again
        else:
            spool.parked.add(target, home.name)


def _claim_again(spool: Spool, home: Path) -> None:
    """Turn a job that was being retried and whose record is torn into a claim, to be read again."""
    fs.remove_file(home / CANCELLED)
    fs.remove_file(home / FAILING)
    fs.rename(home, spool.paths.home("pending", home.name))


def _unresolved(home: Path, drop: Path) -> Unresolved:
    inode = os.lstat(drop).st_ino if fs.exists(drop) else 0
    sub = os.path.relpath(drop.parent, home / DROP)
    return Unresolved(home.name, home, "" if sub == "." else sub, drop.name, inode)


def _remove_temporaries(paths: Paths) -> None:
    """Remove what a crash left half-written in the state folder and in failed/."""
    for folder in (paths.state, paths.control):
        fs.remove_temporaries(folder)
    for _, listed in fs.walk(paths.failed):
        for entry in listed:
            if entry.name.startswith(fs.TEMPORARY) and entry.is_file(follow_symlinks=False):
                _remove_if_ours(Path(entry.path))


def _remove_if_ours(path: Path) -> None:
    try:
        fs.remove_file(path)
    except OSError:
        pass  # we may not change its folder, or its disk is sick
