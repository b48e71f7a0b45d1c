"""What commands do with a spool that a daemon owns, or will: drop, find, wait. No torch, no socket."""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptdrop import fs, names
from promptdrop.errors import ConfigError, PromptdropError, UsageError
from promptdrop.spool import Spool, failures, read_json

POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Dropped:
    """A file that was put into the inbox. Its inode stays its own through every rename."""

    path: str  # SUB/FILE
    inode: int


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
    folder = spool.inbox / sub
    if not folder.is_dir():
        if not spool.inbox.is_dir():
            raise ConfigError(
                f"{spool.inbox}: no such inbox; make the spool with: promptdrop init DIR"
            )
        fs.make_directories(folder, 0o2775, below=spool.inbox)
    stem, suffix = names.split(file)
    n = 1
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
    return Dropped(f"{sub}/{name}" if sub else name, inode)


def name_of_prompt(prompt: str) -> str:
    """A job file's name that reminds of its prompt: `a_red_fox-3f9a.json`."""
    words = re.sub(r"\W+", "_", prompt[:60]).strip("_")
    return f"{names.cut(words, 40) or 'prompt'}-{secrets.token_hex(2)}.json"


def read_status(spool: Spool) -> dict[str, Any] | None:
    """What the daemon wrote last, or None: no daemon owns this spool."""
    return read_json(spool.own / "status.json") if spool.daemon_pid() is not None else None


def wait(
    spool: Spool, dropped: Dropped, on_poll: Callable[[dict[str, Any] | None, str], None]
) -> Ended:
    """Wait until the job of a dropped file has ended.

    `on_poll(status, where)` is called at every look; status is None while no daemon runs.
    Raises PromptdropError: the file is nowhere any more (withdrawn by somebody).
    """
    job_id, lost_since = "", 0.0
    while True:
        status = read_json(spool.own / "status.json")
        if ended := _find_end(status, dropped, job_id):
            return ended
        where = _where(spool, dropped)
        if where in ("pending", "active"):
            job_id = _id_of(spool, dropped) or job_id
        if where == "gone":
            lost_since = lost_since or time.monotonic()
            if time.monotonic() > lost_since + 5:
                raise PromptdropError(
                    f"{dropped.path}: no longer in the spool; somebody withdrew it"
                )
        else:
            lost_since = 0.0
        on_poll(status if spool.daemon_pid() is not None else None, where)
        time.sleep(POLL_SECONDS)


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
    for target, record in failures(spool.failed):
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
    home = spool.outbox / folder
    sidecars = [
        read_json(Path(entry.path)) for entry in fs.entries(home) if entry.name.endswith(".json")
    ]
    for sidecar in sorted(
        (s for s in sidecars if s.get("schema") == "promptdrop.image/1"),
        key=lambda s: s["job"]["image"],
    ):
        yield home / sidecar["image"]["file"], sidecar


def _unfinished(spool: Spool) -> Iterator[dict[str, Any]]:
    for state in ("pending", "active"):
        for entry in sorted(fs.entries(spool.own / state), key=lambda entry: entry.name):
            if record := read_json(Path(entry.path) / "request.json"):
                yield record


def _id_of(spool: Spool, dropped: Dropped) -> str | None:
    return next((r["id"] for r in _unfinished(spool) if r["inode"] == dropped.inode), None)


def _where(spool: Spool, dropped: Dropped) -> str:
    if (spool.inbox / dropped.path).exists():
        return "inbox"
    for state in ("pending", "active"):
        for entry in fs.entries(spool.own / state):
            if (Path(entry.path) / "drop" / dropped.path).exists():
                return state
    return "gone"


def _find_end(status: dict[str, Any], dropped: Dropped, job_id: str) -> Ended | None:
    for end in reversed(status.get("finished", [])):
        if end["id"] == job_id or (
            end["inode"] == dropped.inode and end["file"] == names.printable(dropped.path)
        ):
            return Ended(end["outcome"], end["folder"], end["error"])
    return None
