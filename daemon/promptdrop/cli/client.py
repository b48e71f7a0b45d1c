"""Use a spool from outside the daemon: drop files, read what it has written, wait for jobs.

Everything goes through files; there is no socket.
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from promptdrop import clock, fs, names, records, untrusted
from promptdrop.errors import ConfigError, PromptdropError, UsageError
from promptdrop.nouns import SUFFIX_OF_FORMAT
from promptdrop.records import JobSummary, Sidecar, Status
from promptdrop.spool import paths
from promptdrop.spool.permissions import SHARED_MODE
from promptdrop.spool.record import read_json
from promptdrop.spool.spool import Spool

POLL_SECONDS = 0.1
LOST_SECONDS = 5.0  # a file that is nowhere for so long was withdrawn
PICTURE_BYTES = 64 << 20  # more than a png of 16.8 megapixels, the most there is, uncompressed
_ERRORS_SHOWN = 3
_SIDECAR_NAME = re.compile(r"-(\d{4,})\.json\Z", re.ASCII)  # JOB-0001.json
_PICTURE_SUFFIXES = tuple(SUFFIX_OF_FORMAT.values())


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
    id: str | None = None  # of the job; None for one that never was


class Picture(NamedTuple):
    """A published image, which is open until the next one is asked for."""

    path: Path
    file: BinaryIO
    sidecar: Sidecar


class InHand(NamedTuple):
    """A job that the daemon has resolved and not finished."""

    id: str
    path: str  # SUB/FILE, as dropped
    folder: str  # SUB/JOB, below the outbox
    inode: int | None  # of the dropped file


def drop(spool: Spool, data: bytes, file: str, sub: str = "") -> Dropped:
    """Put a job file into the inbox in one step; where the name is taken, as FILE~2.

    Raises ConfigError: there is no inbox. UsageError: SUB leads through a link. OSError: it cannot
    be written.
    """
    inbox, moment = spool.paths.inbox, clock.timestamp()
    if not inbox.is_dir():
        raise ConfigError(f"{inbox}: no such inbox; make the spool with: promptdrop init DIR")
    try:
        fs.make_directories(inbox, sub, _folder_mode(spool))
        with untrusted.below(inbox, sub) as folder:
            name, inode = _put(spool, folder, data, file)
    except untrusted.NotPlain as e:
        raise UsageError(
            f"{e.filename}: a link, or no folder; expected a sub-folder of the inbox"
        ) from None
    return Dropped(paths.dropped_path(sub, name), inode, moment)


def _put(spool: Spool, folder: Path, data: bytes, file: str) -> tuple[str, int]:
    """Write a job file, then its marker where one is wanted. Returns its name and inode."""
    ready, mode = spool.config.watch.ready_suffix or "", _file_mode(spool)
    with fs.temporary(folder, mode) as (handle, temporary):
        handle.write(data)
        fs.sync(handle)
        name = rename_to_free_name(temporary, folder, file, marker=ready)
        inode = os.fstat(handle.fileno()).st_ino
    if ready:
        with suppress(FileExistsError):  # of somebody else, this very moment; its name is enough
            fs.write_once(folder / f"{name}{ready}", b"", mode)
    return name, inode


def _file_mode(spool: Spool) -> int:
    """The mode of a drop: what output.mode keeps from people, it keeps, too.

    But the daemon must read it, which is of the inbox's group, and we may be another user than it.
    """
    is_ours = os.stat(spool.paths.inbox).st_uid == os.geteuid()
    return 0o664 & int(spool.config.output.mode, 8) | (0o600 if is_ours else 0o640)


def _folder_mode(spool: Spool) -> int:
    """The mode of a new sub-folder of the inbox, from which the daemon must move files."""
    return SHARED_MODE & (int(spool.config.output.directory_mode, 8) | 0o2770)


def rename_to_free_name(source: Path, folder: Path, file: str, marker: str = "") -> str:
    """Rename to the first free name of FILE, FILE~2, FILE~3 ... Returns that name.

    marker: the end of another name that must be free, too; a link there may be a trap.
    """
    stem, suffix = names.split(file)
    n = 1
    while True:
        name = names.numbered(stem, suffix, n, 255 - len(os.fsencode(marker)))
        try:
            if not (marker and fs.exists(folder / f"{name}{marker}")):
                fs.rename(source, folder / name)
                return name
        except FileExistsError:
            pass
        n += 1


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


def pictures(spool: Spool, job_id: str | None, folder: str) -> Iterator[Picture]:
    """Yield the published images of a job in order, one for each number.

    Readers may have taken some away, and anybody of the group may have put others there: what is not
    this job's, no document of ours or no plain file is passed over.
    """
    home, last = spool.paths.outbox / folder, 0
    try:
        with untrusted.below(spool.paths.outbox, folder) as held:
            for number, name in sorted(_sidecars(held)):
                if number > last and (found := _picture(home, held / name, number, job_id)):
                    last = number
                    with found.file:
                        yield found
    except (FileNotFoundError, untrusted.NotPlain):
        return  # the whole folder was taken away


def _sidecars(home: Path) -> Iterator[tuple[int, str]]:
    """Yield what is named like the sidecar of an image: (number, name)."""
    for entry in fs.entries(home):
        if named := _SIDECAR_NAME.search(entry.name):
            yield int(named[1]), entry.name


def _picture(home: Path, path: Path, number: int, job_id: str | None) -> Picture | None:
    """Open the image of a sidecar; None where one of them is not the job's, not ours, or gone."""
    try:
        sidecar = records.fitting(Sidecar, read_json(path, records.SIDECAR_BYTES))
        if sidecar is None or (sidecar.job.id, sidecar.job.image) != (job_id, number):
            return None
        name = sidecar.image.file
        if not _is_picture_name(name):
            return None
        file = untrusted.open_plain(path.with_name(name))
    except OSError:
        return None
    if os.fstat(file.fileno()).st_size > PICTURE_BYTES:
        file.close()
        return None
    return Picture(home / name, file, sidecar)


def _is_picture_name(name: str) -> bool:
    """Whether an image of ours can be named so: in its own folder, and of plain characters."""
    is_plain = "/" not in name and not name.startswith(".") and names.printable(name) == name
    return is_plain and name.endswith(_PICTURE_SUFFIXES)


def jobs_in_hand(spool: Spool) -> Iterator[InHand]:
    """Yield the jobs that are resolved and not finished: pending ones, then active ones, by id."""
    for state in paths.IN_HAND:
        for home in sorted(spool.paths.homes(state)):
            if job := _in_hand(home):
                yield job


def _in_hand(home: str) -> InHand | None:
    """Read the record of a job in its folder; None if it is not resolved yet, torn or gone."""
    record = read_json(f"{home}/{paths.REQUEST}", limit=None)  # only the daemon writes there
    named = [record.get(key) for key in ("id", "sub", "file", "folder")]
    if not all(isinstance(value, str) for value in named):
        return None
    job_id, sub, file, folder = map(str, named)
    return InHand(job_id, paths.dropped_path(sub, file), folder, record.get("inode"))


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
    if _inode(spool.paths.inbox, one.path) == one.inode:
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


def _inode(inbox: Path, path: str) -> int | None:
    sub, _, file = path.rpartition("/")
    try:
        with untrusted.below(inbox, sub) as folder:
            return os.lstat(folder / file).st_ino
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
            return Ended(end.outcome, end.folder, end.error, end.id)
    if one.job_id is None or one.folder is None:
        return None
    summary = _summary(spool, one.folder)
    if summary is None or summary.id != one.job_id:
        return None
    errors = [image.error for image in summary.images if image.error]
    error = "; ".join(errors[:_ERRORS_SHOWN]) or None
    return Ended(summary.outcome, one.folder, error, summary.id)


def _summary(spool: Spool, folder: str) -> JobSummary | None:
    """Read job.json, which anybody of the group may replace; None if there is none of ours."""
    limit = spool.config.limits.images_per_job * records.SUMMARY_BYTES_OF_IMAGE
    try:
        with untrusted.below(spool.paths.outbox, folder) as home:
            return records.fitting(JobSummary, read_json(home / paths.SUMMARY, limit))
    except OSError:
        return None
