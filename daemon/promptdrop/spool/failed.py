"""Files in failed/, each with its reason beside it."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promptdrop import fs, names, untrusted
from promptdrop.records import ERROR_BYTES, ErrorRecord, fitting, to_bytes
from promptdrop.spool.ids import is_job_id
from promptdrop.spool.job import Job, Unresolved
from promptdrop.spool.paths import FAILING, REASON, dropped_path, reason_file
from promptdrop.spool.permissions import is_for_us
from promptdrop.spool.record import read_failing, read_json
from promptdrop.spool.spool import Spool


def failures(failed: Path) -> Iterator[tuple[str, ErrorRecord | None]]:
    """Yield every file in failed/ that has a reason beside it: (path below failed/, its error record).

    The record is None if it cannot be read, or is none that we can have written.

    Thread: any.
    """
    found = ((sub, e.name) for sub, listed in fs.walk(failed) for e in listed)
    for sub, reason in sorted(one for one in found if one[1].endswith(REASON)):
        file = reason.removesuffix(REASON)
        try:
            with untrusted.below(failed, sub) as folder:
                if (status := fs.status_of(folder / file)) and stat.S_ISREG(status.st_mode):
                    yield dropped_path(sub, file), _reason(folder / reason)
        except (FileNotFoundError, PermissionError, untrusted.NotPlain):
            continue  # taken away, closed or swapped since it was listed


def _reason(path: Path) -> ErrorRecord | None:
    """Read an error record, which anybody of the group may have written; None if it is not ours."""
    try:
        record = fitting(ErrorRecord, read_json(path, ERROR_BYTES))
    except OSError:
        return None
    return record if record and (record.id is None or is_job_id(record.id)) else None


def move_to_failed(spool: Spool, job: Job | Unresolved, record: ErrorRecord) -> None:
    """Record the file's place in failed/, move it there, write the reason beside it. Repeatable.

    Thread: clerk.
    """
    planned = read_plan(spool, job.home)
    target, record = planned or (_plan(spool, job, record), record)
    while fs.exists(job.drop):
        if isinstance(job, Job):
            spool.parked.add(target, job.id)
        try:
            with _folder_of(spool, target) as folder:
                share_drop(job.drop, _file_mode(spool), folder)
                fs.move(job.drop, folder / os.path.basename(target))
        except (FileExistsError, untrusted.NotPlain):
            spool.parked.forget(target)
            target = _plan(spool, job, record)
    if isinstance(job, Job):
        spool.parked.add(target, job.id)
    _write_reason(spool, target, record)


def read_plan(spool: Spool, home: Path) -> tuple[str, ErrorRecord] | None:
    """Read where in failed/ the file of a job goes, as a path below it, and why; None if that is not recorded.

    Thread: clerk.
    """
    plan = read_failing(spool.paths, home)
    return (plan["target"], ErrorRecord.model_validate(plan["record"])) if plan else None


def share_drop(drop: Path, mode: int, folder: Path) -> None:
    """Let the whole group use a dropped file, which is about to move to `folder`.

    Thread: clerk.
    """
    # A file with further hard links keeps its mode, because those links are somebody else's.
    if (status := fs.status_of(drop)) and stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        fs.share(drop, mode, folder)


def _plan(spool: Spool, job: Job | Unresolved, record: ErrorRecord) -> str:
    """Choose a free name in failed/ and record it with the reason."""
    sub = _mirror(spool.paths.failed, job.sub)
    target = os.path.join(sub, _free_name(spool.paths.failed, sub, job.file))
    document = {"target": target, "record": record.model_dump(mode="json")}
    fs.write_durably(
        job.home / FAILING, json.dumps(document).encode(), spool.config.output.record_mode
    )
    return target


def _free_name(failed: Path, sub: str, file: str) -> str:
    """Return FILE, or FILE~2 ... where a file or its reason has that name in failed/SUB."""
    stem, suffix = names.split(file)
    n = 1
    try:
        with untrusted.below(failed, sub) as folder:
            while True:
                name = names.numbered(stem, suffix, n, 255 - len(REASON))
                if not fs.exists(folder / name) and not fs.exists(reason_file(folder / name)):
                    return name
                n += 1
    except FileNotFoundError:
        return names.numbered(stem, suffix, n, 255 - len(REASON))  # the folder is not made yet


def _mirror(failed: Path, sub: str) -> str:
    """Return SUB, or SUB~2 where a file or link has that name in failed/ or we may not use the folder."""
    mirror = ""
    for part in Path(sub).parts:
        n = 1
        while True:
            inner = failed / mirror / names.numbered(part, "", n)
            status = fs.status_of(inner)
            if status is None or (stat.S_ISDIR(status.st_mode) and is_for_us(inner)):
                break
            n += 1
        mirror = os.path.join(mirror, inner.name)
    return mirror


@contextmanager
def _folder_of(spool: Spool, target: str) -> Iterator[Path]:
    """Yield the folder of failed/`target`, made if need be. Raises NotPlain: a part of it is a link or file."""
    sub = os.path.dirname(target)
    spool.folders.require_inner("failed", target)
    fs.make_directories(spool.paths.failed, sub, int(spool.config.output.directory_mode, 8))
    with untrusted.below(spool.paths.failed, sub) as folder:
        yield folder


def _write_reason(spool: Spool, target: str, record: ErrorRecord) -> None:
    """Write why a file lies in failed/, unless something has the name of its reason already."""
    try:
        with _folder_of(spool, target) as folder:
            reason = reason_file(folder / os.path.basename(target))
            if not fs.exists(reason):
                fs.write_once(reason, to_bytes(record), _file_mode(spool))
    except (FileExistsError, untrusted.NotPlain):
        pass  # somebody was faster, or has put a link or a file in the place of the folder


def _file_mode(spool: Spool) -> int:
    return int(spool.config.output.mode, 8)
