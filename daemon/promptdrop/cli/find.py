"""Find the jobs that a NAME on the command line fits."""

from dataclasses import dataclass

from promptdrop import names
from promptdrop.cli import client
from promptdrop.errors import UsageError
from promptdrop.records import ErrorRecord, fitting
from promptdrop.spool.failed import failures
from promptdrop.spool.paths import FAILING
from promptdrop.spool.record import read_json
from promptdrop.spool.spool import Spool

_ERROR_SHOWN = 80  # characters


@dataclass(frozen=True, slots=True)
class Match:
    """A job or file that a NAME fits. `target`: a job id to cancel, or a path below failed/ to retry."""

    target: str
    description: str


def unfinished(spool: Spool, name: str) -> list[Match]:
    """Find the pending and active jobs that NAME (an id, SUB/FILE or SUB/JOB) fits."""
    return [
        Match(job.id, f"{job.id}  {names.printable(job.path)}  -> {job.folder}")
        for job in client.jobs_in_hand(spool)
        if name in (job.id, job.path, names.printable(job.path), job.folder)
    ]


def failed(spool: Spool, name: str | None) -> list[Match]:
    """Find the files in failed/ that NAME (an id, SUB/FILE or SUB/JOB) fits; all of them for None."""
    matches = []
    known = {**_parked(spool), **dict(failures(spool.paths.failed))}
    for target, record in sorted(known.items(), key=lambda one: one[0]):
        shown = names.printable(target)
        if (
            name is None
            or name in (target, shown)
            or (record and name in (record.id, record.folder))
        ):
            matches.append(Match(target, _describe(shown, record)))
    return matches


def _parked(spool: Spool) -> dict[str, ErrorRecord | None]:
    """Read which files in failed/ the daemon can go on with, also where their reason was taken away."""
    plans = (read_json(f"{home}/{FAILING}") for home in spool.paths.homes("parked"))
    found = ((plan.get("target"), plan.get("record")) for plan in plans)
    return {
        target: fitting(ErrorRecord, record)
        for target, record in found
        if isinstance(target, str) and isinstance(record, dict)
    }


def _describe(shown: str, record: ErrorRecord | None) -> str:
    if record is None:
        return f"unknown  {shown}: its reason cannot be read"
    return f"{record.id or 'refused'}  {shown}: {record.error[:_ERROR_SHOWN]}"


def only(matches: list[Match], name: str, where: str) -> Match:
    """Return the one match. Raises UsageError: none, or several, which are listed."""
    if not matches:
        raise UsageError(f"{name}: no such job {where}; see: promptdrop status")
    if len(matches) > 1:
        raise UsageError(
            f"{name}: fits {len(matches)} jobs, nothing was done; name one by its id:",
            more_lines=[f"  {match.description}" for match in matches],
        )
    return matches[0]
