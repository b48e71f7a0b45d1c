"""A job's records on the disk: request.json, and one for each image in hand or ended."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from promptdrop import fs, untrusted
from promptdrop.spool import detail
from promptdrop.spool.job import CLOSED_IMAGES, ImageState, Job
from promptdrop.spool.paths import (
    CANCELLED,
    DROP,
    REQUEST,
    Paths,
    dropped_path,
    parse_image_record,
    state_of,
)

# What anything but the request of a large job fits in: 16,000 images of job.json with long errors.
_LIMIT = 64 << 20  # bytes


def read_json(path: Path | str, limit: int | None = _LIMIT) -> dict[str, Any]:
    """Read a record of our own; empty if it is gone, torn, no regular file or no JSON object.

    Thread: any.
    """
    try:
        data = untrusted.read_plain(Path(path), limit)[0]
        loaded = json.loads(data) if limit is None or len(data) <= limit else {}
    except (FileNotFoundError, NotADirectoryError, untrusted.NotPlain, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def job_id_of(document: Path) -> str | None:
    """Return the id of the job that a job.json or sidecar in the outbox is of; None if it is no such file.

    Raises OSError: nobody can tell.

    Thread: any.
    """
    known = read_json(document)
    owner = known.get("job") if known.get("schema") == "promptdrop.image/1" else known
    job_id = owner.get("id") if isinstance(owner, dict) else None
    return job_id if isinstance(job_id, str) else None


def files_on_their_way(job: Job) -> Iterator[str]:
    """Yield the names in the job's outbox folder of images that are being published.

    Thread: any.
    """
    for entry in fs.entries(job.home):
        if (known := parse_image_record(entry.name)) and known[1] == "publishing":
            image = read_json(entry.path).get("image")
            if isinstance(image, dict) and isinstance(image.get("file"), str):
                yield image["file"]


def write(job: Job) -> None:
    """Record durably what the job asks for.

    Thread: clerk.
    """
    document = {
        "id": job.id,
        "sub": job.sub,
        "file": job.file,
        "inode": job.inode,
        "owner": job.owner,
        "folder": job.folder,
        "priority": job.priority,
        **job.detail.to_json(),
    }
    fs.write_durably(job.home / REQUEST, json.dumps(document).encode())


def load(paths: Paths, home: str | Path, listed: Iterable[str]) -> Job:
    """Read the job in a folder, whose names are `listed`. A field that its record lacks has its default.

    Raises OSError; AttributeError, LookupError, TypeError, ValueError: request.json is torn.

    Thread: clerk, and the threads that help it to recover.
    """
    record = json.loads(fs.read_whole(f"{home}/{REQUEST}"))
    detail.require_whole(record)
    images = len(record["images"])
    job = Job(
        id=record["id"],
        paths=paths,
        place=state_of(home),
        sub=sys.intern(record["sub"]),
        file=record["file"],
        inode=record.get("inode", 0),
        owner=record["owner"] if "owner" in record else _owner_of_drop(home, record),
        folder=record["folder"],
        priority=record.get("priority", 0),
        images=images,
        must_fit=record["settings"]["prompt"].get("overflow") == "refuse",
        detail_in_memory=detail.parse(record) if images > CLOSED_IMAGES else None,
    )
    for name in listed:
        job.cancelled |= name == CANCELLED
        if known := parse_image_record(name):
            number, kind = known
            _load_image(job.state(number), kind, read_json(f"{home}/{name}"))
    return job


def load_if_whole(paths: Paths, home: str, listed: list[str]) -> Job | None:
    """Read the job in a folder; None if it is not recorded yet, or torn by a disk that lied about fsync.

    Thread: clerk, and the threads that help it to recover.
    """
    try:
        return load(paths, home, listed) if REQUEST in listed else None
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _owner_of_drop(home: str | Path, record: dict[str, Any]) -> int:
    """Return the uid of the dropped file, which promptdrop 0.1 did not record; 0 if it is gone."""
    try:
        return os.lstat(f"{home}/{DROP}/{dropped_path(record['sub'], record['file'])}").st_uid
    except FileNotFoundError:
        return 0


def _load_image(state: ImageState, kind: str, record: dict[str, Any]) -> None:
    """Add to an image's state what one of its records says."""
    if kind == "published" and record:
        state.outcome, state.file = record["outcome"], record["image"]["file"]
        state.error = record.get("error")
    elif kind == "failed":
        state.outcome, state.error = "failed", record.get("error")
    elif kind == "begun":
        state.attempts, state.deaths = record.get("attempts", 0), record.get("deaths", 1)


def begin_image(job: Job, number: int) -> None:
    """Count a daemon death in advance; it is taken back when the image ends while the daemon lives.

    Writes one small file, which is not flushed to the disk.

    Thread: loop.
    """
    state = job.state(number)
    _write_begun(job, number, state.attempts, state.deaths + 1)


def end_attempt(job: Job, number: int) -> None:
    """Take back the death counted by `begin_image`; charged attempts stay.

    Writes one small file, which is not flushed to the disk.

    Thread: loop.
    """
    state = job.state(number)
    _write_begun(job, number, state.attempts, state.deaths)


def fail_image(job: Job, number: int, error: str) -> None:
    """Record durably that an image has failed.

    Thread: clerk.
    """
    fs.write_durably(job.record_path(number, "failed"), json.dumps({"error": error}).encode())
    fs.remove_file(job.record_path(number, "begun"))
    job.states[number] = ImageState("failed", None, error)


def cancel(job: Job) -> None:
    """Record durably that a job is cancelled, unless it has ended.

    The loop may move the job from pending to active meanwhile; then it is recorded there.

    Thread: clerk.
    """
    for home in (job.home, job.paths.home("active", job.id)):
        try:
            fs.touch_durably(home / CANCELLED)
            return
        except FileNotFoundError:
            pass


def _write_begun(job: Job, number: int, attempts: int, deaths: int) -> None:
    path = job.record_path(number, "begun")
    if attempts or deaths:
        fs.write_quickly(path, json.dumps({"attempts": attempts, "deaths": deaths}).encode())
    else:
        fs.remove_file(path)
