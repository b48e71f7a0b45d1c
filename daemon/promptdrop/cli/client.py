"""Use a spool from outside the daemon: drop files, read what it has written, wait for jobs.

Everything goes through files; there is no socket.
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from promptdrop import clock, fs, names, records
from promptdrop.errors import ConfigError, PromptdropError
from promptdrop.records import JobSummary, Sidecar, Status
from promptdrop.spool import paths
from promptdrop.spool.permissions import SHARED_MODE
from promptdrop.spool.record import read_json
from promptdrop.spool.spool import Spool

POLL_SECONDS = 0.1
LOST_SECONDS = 5.0  # a file that is nowhere for so long was withdrawn
_ERRORS_SHOWN = 3


@dataclass(slots=True)
class Dropped:
    """A file that was put into the inbox. Its inode identifies it, because every rename keeps it."""

    path: str  # SUB/FILE
    inode: int
    moment: str  # timestamp of the drop; a job that ended before it is another one
    job_id: str | None = None  # once it is resolved
    folder: str | None = None
    where: Literal["inbox", "being claimed", "in hand", "gone"] = "inbox"
    gone_since: float | None = None  # seconds on the monotonic clock


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended. `folder` is below the outbox; None for a refused file."""

    outcome: str
    folder: str | None
    error: str | None


class InHand(NamedTuple):
    """A job that the daemon has resolved and not finished."""

    id: str
    path: str  # SUB/FILE, as dropped
    folder: str  # SUB/JOB, below the outbox
    inode: int | None  # of the dropped file


def drop(spool: Spool, data: bytes, file: str, sub: str = "") -> Dropped:
    """Put a job file into the inbox in one step; where the name is taken, as FILE~2.

    Raises ConfigError: there is no inbox. OSError: it cannot be written.
    """
    folder = spool.paths.inbox / sub
    if not folder.is_dir():
        if not spool.paths.inbox.is_dir():
            raise ConfigError(
                f"{spool.paths.inbox}: no such inbox; make the spool with: promptdrop init DIR"
            )
        fs.make_directories(spool.paths.inbox, sub, SHARED_MODE)
    moment = clock.timestamp()
    with fs.temporary(folder, 0o664) as (handle, temporary):
        handle.write(data)
        fs.sync(handle)
        name = _rename_to_free_name(temporary, folder, file)
        inode = os.fstat(handle.fileno()).st_ino
    if ready := spool.config.watch.ready_suffix:
        (folder / f"{name}{ready}").touch()
    return Dropped(paths.dropped_path(sub, name), inode, moment)


def _rename_to_free_name(source: Path, folder: Path, file: str) -> str:
    """Rename to the first free name of FILE, FILE~2, FILE~3 ... Returns that name."""
    stem, suffix = names.split(file)
    n = 1
    while True:
        name = names.numbered(stem, suffix, n)
        try:
            fs.rename(source, folder / name)
        except FileExistsError:
            n += 1
        else:
            return name


def name_of_prompt(prompt: str) -> str:
    """Make a job file's name that reminds of its prompt: `a_red_fox-3f9a.json`."""
    words = re.sub(r"\W+", "_", prompt[:60]).strip("_")
    return f"{names.cut(words, 40) or 'prompt'}-{secrets.token_hex(2)}.json"


def read_status_document(spool: Spool) -> dict[str, Any] | None:
    """Read status.json as the daemon wrote it; None if no daemon runs, or it has only just begun."""
    return _status_document(spool) if spool.lock.daemon_pid() is not None else None


def read_status(spool: Spool) -> Status | None:
    """Read the daemon's status; None if no daemon runs, or it has only just begun."""
    document = read_status_document(spool)
    return records.read(Status, document) if document else None


def _status_document(spool: Spool) -> dict[str, Any] | None:
    """Read what the last daemon wrote, whether or not it still runs."""
    return read_json(spool.paths.status) or None


def pictures(spool: Spool, folder: str) -> Iterator[tuple[Path, Sidecar]]:
    """Yield the published images of an outbox folder in order, each with its sidecar."""
    home = spool.paths.outbox / folder
    documents = [
        read_json(entry.path) for entry in fs.entries(home) if entry.name.endswith(".json")
    ]
    sidecars = [
        records.read(Sidecar, document)
        for document in documents
        if document.get("schema") == "promptdrop.image/1"
    ]
    for sidecar in sorted(sidecars, key=lambda sidecar: sidecar.job.image):
        yield home / sidecar.image.file, sidecar


def jobs_in_hand(spool: Spool) -> Iterator[InHand]:
    """Yield the jobs that are resolved and not finished: pending ones, then active ones, by id."""
    for state in paths.IN_HAND:
        for home in sorted(spool.paths.homes(state)):
            if job := _in_hand(home):
                yield job


def _in_hand(home: str) -> InHand | None:
    """Read the record of a job in its folder; None if it is not resolved yet, torn or gone."""
    record = read_json(f"{home}/{paths.REQUEST}")
    try:
        path = paths.dropped_path(record["sub"], record["file"])
        return InHand(record["id"], path, record["folder"], record.get("inode"))
    except KeyError:
        return None


def wait(
    spool: Spool,
    drops: list[Dropped],
    on_poll: Callable[[Status | None, list[Dropped]], None],
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Ended]:
    """Wait until the jobs of all dropped files have ended; return how, in the drops' order.

    `on_poll(status, open)` is called at every look; status is None while no daemon runs.
    Raises PromptdropError: a file is no longer in the spool, because somebody withdrew it.
    """
    ends: dict[int, Ended] = {}
    homes: dict[str, InHand | None] = {}
    while len(ends) < len(drops):
        document = _status_document(spool)
        status = records.read(Status, document) if document else None
        _look_at_homes(spool, homes)
        waiting = [(n, one) for n, one in enumerate(drops) if n not in ends]
        for n, one in waiting:
            _locate(spool, one, homes, now())
            if one.where == "gone" and (end := _find_end(spool, status, one)):
                ends[n] = end
            elif one.gone_since is not None and now() > one.gone_since + LOST_SECONDS:
                raise PromptdropError(
                    f"{names.printable(one.path)}: no longer in the spool; somebody withdrew it"
                )
        is_daemon_alive = spool.lock.daemon_pid() is not None
        on_poll(status if is_daemon_alive else None, [one for n, one in waiting if n not in ends])
        if len(ends) < len(drops):
            sleep(POLL_SECONDS)
    return [ends[n] for n in range(len(drops))]


def _look_at_homes(spool: Spool, homes: dict[str, InHand | None]) -> None:
    """Update `homes`: the name of each job's folder -> the job, None until it is resolved."""
    there = {os.path.basename(home): home for home in spool.paths.homes(*paths.IN_HAND)}
    for name in homes.keys() - there.keys():
        del homes[name]
    for name, home in there.items():
        if not homes.get(name):
            homes[name] = _in_hand(home)


def _locate(spool: Spool, one: Dropped, homes: Mapping[str, InHand | None], now: float) -> None:
    """Find where the file is now, by its inode."""
    job = next((job for job in homes.values() if job and job.inode == one.inode), None)
    if _inode(spool.paths.inbox / one.path) == one.inode:
        one.where = "inbox"
    elif job:
        one.where, one.job_id, one.folder = "in hand", job.id, job.folder
    elif not all(homes.values()):
        one.where = "being claimed"  # its job may be one of those without a record
    else:
        one.where = "gone"
    if one.where != "gone":
        one.gone_since = None
    elif one.gone_since is None:
        one.gone_since = now


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return None


def _find_end(spool: Spool, status: Status | None, one: Dropped) -> Ended | None:
    """Read how a job ended: from the daemon's list of the last ones, else from its job.json."""
    for end in reversed(status.finished if status else []):
        is_this = (
            end.id == one.job_id
            if one.job_id
            else end.finished >= one.moment
            and (end.inode, end.file) == (one.inode, names.printable(one.path))
        )
        if is_this:
            return Ended(end.outcome, end.folder, end.error)
    if one.job_id is None or one.folder is None:
        return None
    summary = records.read(JobSummary, read_json(spool.paths.outbox / one.folder / paths.SUMMARY))
    if summary.id != one.job_id:
        return None
    errors = [image.error for image in summary.images if image.error]
    return Ended(summary.outcome, one.folder, "; ".join(errors[:_ERRORS_SHOWN]) or None)
