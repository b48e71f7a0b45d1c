"""What commands do with a spool that a daemon owns, or will: drop, find, wait. No torch, no socket."""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptdrop import clock, fs, names
from promptdrop.errors import ConfigError, PromptdropError, UsageError
from promptdrop.spool import paths
from promptdrop.spool.failed import failures
from promptdrop.spool.permissions import SHARED_MODE
from promptdrop.spool.record import read_json
from promptdrop.spool.spool import Spool

POLL_SECONDS = 0.1
LOST_SECONDS = 5.0  # a file that is nowhere for so long was withdrawn


@dataclass(slots=True)
class Dropped:
    """A file that was put into the inbox. Its inode stays its own through every rename."""

    path: str  # SUB/FILE
    inode: int
    moment: str  # timestamp; what ended before is another's
    job_id: str | None = None  # once it is resolved
    folder: str | None = None
    where: str = "inbox"
    gone_since: float | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended. `folder` is below the outbox; None for a refused file."""

    outcome: str
    folder: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Match:
    """A job or file that a NAME fits. `target`: a job id to cancel, or a path below failed/ to retry."""

    target: str
    description: str


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
        fs.make_directories(folder, SHARED_MODE, below=spool.paths.inbox)
    stem, suffix = names.split(file)
    moment, n = clock.timestamp(), 1
    with fs.temporary(folder, 0o664) as (handle, temporary):
        handle.write(data)
        fs.sync(handle)
        while True:
            name = names.numbered(stem, suffix, n)
            try:
                fs.rename(temporary, folder / name)
                break
            except FileExistsError:
                n += 1
        inode = os.fstat(handle.fileno()).st_ino
    if ready := spool.config.watch.ready_suffix:
        (folder / f"{name}{ready}").touch()
    return Dropped(f"{sub}/{name}" if sub else name, inode, moment)


def name_of_prompt(prompt: str) -> str:
    """A job file's name that reminds of its prompt: `a_red_fox-3f9a.json`."""
    words = re.sub(r"\W+", "_", prompt[:60]).strip("_")
    return f"{names.cut(words, 40) or 'prompt'}-{secrets.token_hex(2)}.json"


def read_status(spool: Spool) -> dict[str, Any] | None:
    """What the daemon wrote last, or None: no daemon owns this spool, or it has only just begun."""
    return (read_json(spool.paths.status) or None) if spool.lock.daemon_pid() is not None else None


def wait(
    spool: Spool,
    drops: list[Dropped],
    on_poll: Callable[[dict[str, Any] | None, list[Dropped]], None],
) -> list[Ended]:
    """Wait until the jobs of all dropped files have ended; how they ended, in the drops' order.

    `on_poll(status, open)` is called at every look; status is None while no daemon runs.
    Raises PromptdropError: a file is nowhere any more (withdrawn by somebody).
    """
    ends: dict[int, Ended] = {}
    homes: dict[str, dict[str, Any]] = {}
    while len(ends) < len(drops):
        status = read_json(spool.paths.status)
        _look_at_homes(spool, homes)
        waiting = [(n, one) for n, one in enumerate(drops) if n not in ends]
        for n, one in waiting:
            _locate(spool, one, homes)
            if one.where == "gone" and (end := _find_end(spool, status, one)):
                ends[n] = end
            elif one.gone_since and time.monotonic() > one.gone_since + LOST_SECONDS:
                raise PromptdropError(
                    f"{names.printable(one.path)}: no longer in the spool; somebody withdrew it"
                )
        alive = (status or None) if spool.lock.daemon_pid() is not None else None
        on_poll(alive, [one for n, one in waiting if n not in ends])
        if len(ends) < len(drops):
            time.sleep(POLL_SECONDS)
    return [ends[n] for n in range(len(drops))]


def find_unfinished(spool: Spool, name: str) -> list[Match]:
    """Pending and active jobs that NAME (an id, SUB/FILE or SUB/JOB) fits."""
    found = []
    for record in _unfinished(spool):
        path = f"{record['sub']}/{record['file']}" if record["sub"] else record["file"]
        if name in (record["id"], path, names.printable(path), record["folder"]):
            found.append(
                Match(
                    record["id"], f"{record['id']}  {names.printable(path)}  -> {record['folder']}"
                )
            )
    return found


def find_failed(spool: Spool, name: str | None) -> list[Match]:
    """Files in failed/ that NAME (an id, SUB/FILE or SUB/JOB) fits; all of them for None."""
    found = []
    for target, record in failures(spool.paths.failed):
        known = {target, names.printable(target), record.get("id"), record.get("folder")}
        if name is None or name in known:
            found.append(
                Match(
                    target,
                    f"{record.get('id') or 'refused'}  {names.printable(target)}: {record.get('error', '')[:80]}",
                )
            )
    return found


def only(found: list[Match], name: str, where: str) -> Match:
    """The one match. Raises UsageError: none, or several, which are listed."""
    if not found:
        raise UsageError(f"{name}: no such job {where}; see: promptdrop status")
    if len(found) > 1:
        listed = "\n".join(f"  {match.description}" for match in found)
        raise UsageError(
            f"{name}: fits {len(found)} jobs, nothing was done; name one by its id:\n{listed}"
        )
    return found[0]


def pictures(spool: Spool, folder: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The published images of an outbox folder, in order, each with its sidecar."""
    home = spool.paths.outbox / folder
    sidecars = [
        read_json(Path(entry.path)) for entry in fs.entries(home) if entry.name.endswith(".json")
    ]
    for sidecar in sorted(
        (s for s in sidecars if s.get("schema") == "promptdrop.image/1"),
        key=lambda s: s["job"]["image"],
    ):
        yield home / sidecar["image"]["file"], sidecar


def _unfinished(spool: Spool) -> Iterator[dict[str, Any]]:
    for state in paths.IN_HAND:
        for home in sorted(spool.paths.homes(state)):
            if record := read_json(f"{home}/{paths.REQUEST}"):
                yield record


def _look_at_homes(spool: Spool, homes: dict[str, dict[str, Any]]) -> None:
    """Bring the records of jobs in hand up to date, each read once; unresolved ones are empty."""
    there = {os.path.basename(home): home for home in spool.paths.homes(*paths.IN_HAND)}
    for name in homes.keys() - there.keys():
        del homes[name]
    for name, home in there.items():
        if not homes.get(name):
            homes[name] = read_json(f"{home}/{paths.REQUEST}")


def _locate(spool: Spool, one: Dropped, homes: dict[str, dict[str, Any]]) -> None:
    """Where the file is now, by its inode."""
    record = next((r for r in homes.values() if r.get("inode") == one.inode), None)
    if _inode(spool.paths.inbox / one.path) == one.inode:
        one.where = "inbox"
    elif record:
        one.where, one.job_id, one.folder = "in hand", record["id"], record["folder"]
    elif not all(homes.values()):
        one.where = "being claimed"  # perhaps one of those without a record
    else:
        one.where = "gone"
    if one.where != "gone":
        one.gone_since = None
    elif one.gone_since is None:
        one.gone_since = time.monotonic()


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return None


def _find_end(spool: Spool, status: dict[str, Any], one: Dropped) -> Ended | None:
    """What the daemon says of its last jobs, else what it left on the disk."""
    for end in reversed(status.get("finished", [])):
        is_this = (
            end["id"] == one.job_id
            if one.job_id
            else end["finished"] >= one.moment
            and (end["inode"], end["file"]) == (one.inode, names.printable(one.path))
        )
        if is_this:
            return Ended(end["outcome"], end["folder"], end["error"])
    if one.job_id is None or one.folder is None:
        return None
    summary = read_json(spool.paths.outbox / one.folder / paths.SUMMARY)
    if summary.get("id") == one.job_id:
        errors = [image["error"] for image in summary["images"] if image["error"]]
        return Ended(summary["outcome"], one.folder, "; ".join(errors[:3]) or None)
    return None
