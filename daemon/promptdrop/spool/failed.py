"""Files in failed/, each with its reason beside it."""

import json
import os
import stat
from collections.abc import Iterator
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
    found = (Path(entry.path) for _, listed in fs.walk(failed) for entry in listed)
    for reason in sorted(path for path in found if path.name.endswith(REASON)):
        sub, file = os.path.relpath(reason.parent, failed), reason.name.removesuffix(REASON)
        sub = "" if sub == "." else sub
        try:
            with untrusted.below(failed, sub) as folder:
                if (status := status_of(folder / file)) and stat.S_ISREG(status.st_mode):
                    yield dropped_path(sub, file), _reason(folder / reason.name)
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
    if planned := read_failing(spool.paths, job.home):
        target = spool.paths.failed / planned["target"]
        record = ErrorRecord.model_validate(planned["record"])
    else:
        target = _plan(spool, job, record)
    while fs.exists(job.drop):
        _make_folder_of(spool, target)
        share_drop(job.drop, _file_mode(spool), target.parent)
        try:
            fs.move(job.drop, target)
        except FileExistsError:
            target = _plan(spool, job, record)
    reason = reason_file(target)
    if not fs.exists(reason):
        _make_folder_of(spool, target)
        fs.write_durably(reason, to_bytes(record), _file_mode(spool))


def share_drop(drop: Path, mode: int, folder: Path) -> None:
    """Let the whole group use a dropped file, which is about to move to `folder`.

    Thread: clerk.
    """
    # A file with further hard links keeps its mode, because those links are somebody else's.
    if (status := status_of(drop)) and stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        fs.share(drop, mode, folder)


def status_of(path: Path) -> os.stat_result | None:
    """Return lstat(2) of a path; None if it is gone."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _plan(spool: Spool, job: Job | Unresolved, record: ErrorRecord) -> Path:
    """Choose a free name in failed/ and record it with the reason."""
    stem, suffix = names.split(job.file)
    folder = _mirror(spool.paths.failed, job.sub)
    n = 1
    while True:
        target = folder / names.numbered(stem, suffix, n, 255 - len(REASON))
        if not fs.exists(target) and not fs.exists(reason_file(target)):
            break
        n += 1
    document = {
        "target": os.path.relpath(target, spool.paths.failed),
        "record": record.model_dump(mode="json"),
    }
    mode = spool.config.output.record_mode
    fs.write_durably(job.home / FAILING, json.dumps(document).encode(), mode)
    return target


def _mirror(failed: Path, sub: str) -> Path:
    """Return failed/SUB, or SUB~2 where a file has that name or we may not use the folder."""
    folder = failed
    for part in Path(sub).parts:
        n = 1
        while True:
            inner = folder / names.numbered(part, "", n)
            if not fs.exists(inner) or is_for_us(inner):
                break
            n += 1
        folder = inner
    return folder


def _make_folder_of(spool: Spool, target: Path) -> None:
    mode = int(spool.config.output.directory_mode, 8)
    failed = spool.paths.failed
    fs.make_directories(failed, str(target.parent.relative_to(failed)), mode)


def _file_mode(spool: Spool) -> int:
    return int(spool.config.output.mode, 8)
