"""End a job: move its file to the outbox or to failed/, remove or park its folder."""

import errno
import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from promptdrop import clock, fs, names
from promptdrop.errors import Problem
from promptdrop.nouns import ImageSpec, JobOutcome
from promptdrop.records import (
    HOST,
    VERSION,
    ErrorProblem,
    ErrorRecord,
    JobSummary,
    SummaryImage,
    SummaryTime,
    Totals,
    summary_bytes,
    to_bytes,
)
from promptdrop.spool import record
from promptdrop.spool.failed import move_to_failed, share_drop
from promptdrop.spool.job import ImageState, Job, Unresolved
from promptdrop.spool.paths import REQUEST, REQUEST_STEM, SUMMARY
from promptdrop.spool.spool import Spool


def finish(spool: Spool, job: Job) -> JobOutcome:
    """Move the dropped file to its last place, write job.json, remove or park the job. Repeatable.

    Thread: clerk.
    """
    outcome = outcome_of(job)
    if fs.exists(job.home):  # else it has left already, and that was not flushed
        _move_file_and_summary(spool, job, outcome)
    leave(spool, job.home, "finished" if outcome == "done" else "parked")
    spool.outbox.release(job)
    return outcome


def _move_file_and_summary(spool: Spool, job: Job, outcome: JobOutcome) -> None:
    """Move the dropped file to its last place, and write job.json."""
    if outcome != "done":
        spool.duplicates.forget(job, spool.job_file_bytes)
        move_to_failed(spool, job, _error_record(job, outcome))
    with spool.outbox.renewed_folder(job) as folder:
        if outcome == "done":
            _move_request(spool, job, folder)
        _write_summary(job, outcome, folder)


def refuse(spool: Spool, claimed: Unresolved, problems: Iterable[Problem]) -> ErrorRecord:
    """Move a file that is no job to failed/, with the reason.

    Thread: clerk.
    """
    listed = tuple(problems)
    reason = ErrorRecord(
        file=names.printable(claimed.file),
        outcome="refused",
        error="; ".join(str(p) for p in listed),
        problems=[ErrorProblem(line=p.line, field=p.field, message=p.message) for p in listed],
        retry=f"promptdrop retry {shlex.quote(names.printable(claimed.path))}",
        time=clock.timestamp(),
        host=HOST,
        version=VERSION,
    )
    if fs.exists(claimed.home):  # else it has left already, and that was not flushed
        move_to_failed(spool, claimed, reason)
    leave(spool, claimed.home, "finished")
    return reason


def refuse_job(spool: Spool, job: Job, problems: Iterable[Problem]) -> ErrorRecord:
    """Refuse a resolved job before its first image, and remove its empty outbox folder.

    Thread: clerk.
    """
    spool.duplicates.forget(job, spool.job_file_bytes)
    fs.remove_file(job.home / REQUEST)
    spool.outbox.remove_empty(job)
    return refuse(spool, job.unresolved(), problems)


def leave(spool: Spool, home: Path, state: Literal["finished", "parked"]) -> None:
    """Move the folder of a job that has ended to `state`; a finished one is removed.

    Thread: clerk.
    """
    target = spool.paths.home(state, home.name)
    if fs.exists(home):
        fs.rename(home, target)
    fs.sync_directory(target.parent)
    if state == "finished":
        fs.remove_tree(target)


def outcome_of(job: Job) -> JobOutcome:
    """Return `done` if every image was rendered, else `cancelled`, `partial` (some) or `failed` (none)."""
    rendered = sum(state.outcome == "rendered" for state in job.states.values())
    if rendered == job.images:
        return "done"
    if job.cancelled:
        return "cancelled"
    return "partial" if rendered else "failed"


def summary(job: Job, outcome: JobOutcome) -> JobSummary:
    """Return the job.json of a job at its end."""
    images = [_summary_image(job, spec) for spec in job.specs]
    counts = {
        kind: sum(image.outcome == kind for image in images) for kind in ("rendered", "cancelled")
    }
    lasted = job.settled.milliseconds_to(time.monotonic(), clock.boot_id())
    return JobSummary(
        id=job.id,
        name=job.name,
        file=names.printable(job.file),
        folder=job.folder,
        outcome=outcome,
        images=images,
        totals=Totals(
            images=len(images),
            rendered=counts["rendered"],
            cancelled=counts["cancelled"],
            failed=len(images) - counts["rendered"] - counts["cancelled"],
            seconds=None if lasted is None else round(lasted / 1e3, 3),
        ),
        time=SummaryTime(claimed=job.claimed, finished=clock.timestamp()),
        host=HOST,
        version=VERSION,
    )


def _write_summary(job: Job, outcome: JobOutcome, folder: Path) -> None:
    """Write job.json, over an older one of the same job. Raises FileExistsError: somebody else's is there."""
    path = folder / SUMMARY
    if fs.exists(path) and record.job_id_of(path, summary_bytes(job.images)) != job.id:
        raise FileExistsError(errno.EEXIST, "is not this job's; move it away", str(path))
    fs.write_durably(path, to_bytes(summary(job, outcome)), job.settings.file_mode)


def _move_request(spool: Spool, job: Job, folder: Path) -> None:
    """Move the dropped file to its images, as request.EXT, or request~2.EXT where one stands."""
    suffix = names.split(job.file)[1].lower()
    n = 1
    share_drop(job.drop, int(spool.config.output.mode, 8), folder)
    while fs.exists(job.drop):
        try:
            fs.move(job.drop, folder / names.numbered(REQUEST_STEM, suffix, n))
        except FileExistsError:
            n += 1


def _summary_image(job: Job, spec: ImageSpec) -> SummaryImage:
    state = job.states.get(spec.image, ImageState())
    assert spec.seed is not None
    return SummaryImage(
        image=spec.image,
        file=state.file,
        seed=spec.seed,
        error=state.error,
        outcome="cancelled" if state.outcome == "todo" else state.outcome,
    )


def _error_record(job: Job, outcome: Literal["partial", "failed", "cancelled"]) -> ErrorRecord:
    images = [_summary_image(job, spec) for spec in job.specs]
    missing = [image for image in images if image.outcome != "rendered"]
    reasons = [f"image {image.image}: {image.error}" for image in missing if image.error]
    return ErrorRecord(
        file=names.printable(job.file),
        outcome=outcome,
        error="; ".join(reasons[:10]) or "cancelled on request",
        id=job.id,
        folder=job.folder,
        missing=[image.image for image in missing],
        retry=f"promptdrop retry {job.id}",
        time=clock.timestamp(),
        host=HOST,
        version=VERSION,
    )
