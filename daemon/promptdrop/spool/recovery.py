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
from promptdrop.spool.paths import CANCELLED, DROP, FAILING, IN_HAND, Paths, parse_image_record
from promptdrop.spool.record import read_json
from promptdrop.spool.spool import Spool

_THREADS, _SLICE = 8, 128  # threads that read folders, and how many folders each at a time
NEWEST = 64  # jobs whose outbox folder is looked into after a crash; one is enough

_Found = tuple[list[str], Job | None]  # the names in a job's folder, and the job if it is recorded


def recover(spool: Spool) -> tuple[list[Job], list[Unresolved]]:
    """Return the jobs to go on with, in the order they came, and the claims to be read again.

    Half-made moves are completed here, half-published images by `publish.recover`.
    Repeatable. Raises OSError, DiskTrouble: a folder cannot be used now.

    Thread: clerk.
    """
    paths = spool.paths
    spool.folders.require()
    spool.duplicates.forget_old()
    for finished in paths.homes("finished"):
        fs.remove_tree(Path(finished))
    spool.parked.clear()
    with cleared.held_open(spool) as failed:
        for parked in paths.homes("parked"):
            _recover_parked(spool, Path(parked), failed)
    jobs, unresolved = [], []
    homes = sorted(paths.homes(*IN_HAND), key=os.path.basename)
    newest = frozenset(homes[-NEWEST:])
    for home, (listed, job) in zip(homes, _look_into(paths, homes), strict=True):
        if any(name.startswith(fs.TEMPORARY) for name in listed):
            fs.remove_temporaries(Path(home))
        is_failing = FAILING in listed and bool(read_json(f"{home}/{FAILING}"))
        if job:
            if left := _recover_job(spool, job, is_failing, home in newest):
                jobs.append(left)
        elif claimed := _recover_claim(spool, Path(home), is_failing):
            unresolved.append(claimed)
    _remove_temporaries(paths)
    return jobs, unresolved


def _look_into(paths: Paths, homes: list[str]) -> Iterator[_Found]:
    """Yield the content of each folder. Uses eight threads, because nothing is cached after a power cut."""

    def look(some: list[str]) -> list[_Found]:
        found = []
        for home in some:
            listed = os.listdir(home)
            found.append((listed, record.load_if_whole(paths, home, listed)))
        return found

    slices = [homes[n : n + _SLICE] for n in range(0, len(homes), _SLICE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(look, slices):
            yield from found


def _recover_job(spool: Spool, job: Job, is_failing: bool, is_new: bool) -> Job | None:
    """Return the job to go on with; None if it was at its end, which is completed here."""
    if is_failing:
        fs.remove_temporaries(job.outbox_folder)
        ending.finish(spool, job)
        return None
    spool.outbox.recover_folder(job, is_new)
    job.close()
    return job


def _recover_claim(spool: Spool, home: Path, is_failing: bool) -> Unresolved | None:
    """Return the claim to be read again; None if it held no file, or was being refused."""
    drop = next(fs.files(home / DROP), None)
    if is_failing:
        claimed = _unresolved(home, drop or home / DROP / "gone")
        planned = ErrorRecord.model_validate(read_json(home / FAILING)["record"])
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


def _recover_parked(spool: Spool, home: Path, failed: Path) -> None:
    """Complete a retry that had begun; remove a job whose file somebody has taken out of failed/."""
    if any(True for _ in fs.files(home / DROP)):
        if retry.unpark(spool, home) is None:
            _claim_again(spool, home)
    elif plan := read_plan(home):
        target, _ = plan
        if cleared.missing(failed, [target]):
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
    except PermissionError:
        pass  # we may not change its folder
