"""A job's records on the disk: request.json, and one for each image in hand or ended."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from promptdrop import fs, names, untrusted
from promptdrop.fields import PRIORITIES
from promptdrop.nouns import SUFFIX_OF_FORMAT
from promptdrop.records import ErrorRecord, Sidecar
from promptdrop.spool import detail
from promptdrop.spool.detail import REQUEST_BYTES
from promptdrop.spool.job import CLOSED_IMAGES, ImageState, Job
from promptdrop.spool.paths import (
    CANCELLED,
    DROP,
    FAILING,
    REQUEST,
    ImageRecord,
    Paths,
    dropped_path,
    parse_image_record,
    state_of,
)
from promptdrop.trust import RECORD_BYTES, parse_json

MAX_COUNT = 1_000_000  # of attempts or deaths of an image, in a record that is believed


def read_json(path: Path | str, limit: int = RECORD_BYTES) -> dict[str, Any]:
    """Read what anybody may have written; empty if it is gone, torn, too large, no file or no JSON object.

    Thread: any.
    """
    try:
        data, _ = untrusted.read_plain(Path(path), limit)
        return parse_json(data) if len(data) <= limit else {}
    except (FileNotFoundError, NotADirectoryError, untrusted.NotPlain, ValueError, RecursionError):
        return {}


def read_publication(
    job: Job, number: int, kind: Literal["publishing", "published"]
) -> dict[str, Any] | None:
    """Read the record of an image on its way to the outbox, or there; None: gone, torn or not believed.

    A `published` one is known to have `outcome`, `image.file` and `error`; a `publishing` one all that a
    sidecar has, and the name of its `temporary`.

    Thread: publisher, clerk.
    """
    record = job.paths.trust.read_json(job.record_path(number, kind))
    try:
        _require_published(record)
        if kind == "publishing":
            _require_publishing(record, job.id, number)
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
    return record


def read_failing(paths: Paths, home: Path | str) -> dict[str, Any]:
    """Read where in failed/ a job's file goes, and why; empty: it goes nowhere, or that cannot be believed.

    Thread: clerk, and the threads that help it to recover.
    """
    plan = paths.trust.read_json(f"{home}/{FAILING}")
    try:
        ErrorRecord.model_validate(plan["record"])
        return plan if names.is_below(plan["target"]) else {}
    except (AttributeError, LookupError, TypeError, ValueError):
        return {}


def _require_published(record: dict[str, Any]) -> None:
    """Raise an error if the record does not say what came of an image, and in which file."""
    file, error = record["image"]["file"], record.setdefault("error", None)
    if record["outcome"] not in ("rendered", "placeholder"):
        raise ValueError(f"outcome: {record['outcome']!r}")
    if not isinstance(file, str) or not names.is_plain(file) or file.startswith("."):
        raise ValueError(f"image.file: {file!r}")
    if not isinstance(error, str | None):
        raise TypeError(f"error: {error!r}")


def _require_publishing(record: dict[str, Any], job_id: str, number: int) -> None:
    """Raise an error if the record is not that of this image, with a temporary in the job's folder."""
    json.dumps(record, allow_nan=False)
    sidecar, temporary = Sidecar.model_validate(record, strict=True), record["temporary"]
    if (sidecar.job.id, sidecar.job.image) != (job_id, number):
        raise ValueError(f"a record of image {sidecar.job.image} of {sidecar.job.id}")
    is_ours = names.is_plain(temporary) and temporary.startswith(fs.TEMPORARY)
    if not is_ours or not sidecar.image.file.endswith(SUFFIX_OF_FORMAT[sidecar.image.format]):
        raise ValueError(f"temporary: {temporary!r}, file: {sidecar.image.file!r}")


def job_id_of(document: Path, limit: int) -> str | None:
    """Return the id of the job that a job.json or sidecar in the outbox is of; None if it is no such file.

    Raises OSError: nobody can tell.

    Thread: any.
    """
    try:
        known = read_json(document, limit)
    except PermissionError:  # somebody's, and closed to us
        return None
    part = known.get("job") if known.get("schema") == "promptdrop.image/1" else known
    job_id = part.get("id") if isinstance(part, dict) else None
    return job_id if isinstance(job_id, str) else None


def files_on_their_way(job: Job) -> Iterator[str]:
    """Yield the names in the job's outbox folder of images that are being published.

    Thread: any.
    """
    for entry in fs.entries(job.home):
        known = parse_image_record(entry.name)
        is_on_its_way = known is not None and known[1] == "publishing"
        if known and is_on_its_way and (record := read_publication(job, known[0], "publishing")):
            yield str(record["image"]["file"])


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
    fs.write_durably(job.home / REQUEST, json.dumps(document).encode(), job.settings.record_mode)


def load(paths: Paths, home: str | Path, listed: Iterable[str]) -> Job:
    """Read the job in a folder, whose names are `listed`. A field that its record lacks has its default.

    Raises OSError; one of detail.INVALID: request.json is torn, damaged or not ours.

    Thread: clerk, and the threads that help it to recover.
    """
    record = parse_json(paths.trust.read(f"{home}/{REQUEST}", REQUEST_BYTES))
    job = _job(paths, os.fspath(home), record)
    for name in listed:
        job.cancelled |= name == CANCELLED
        if (known := parse_image_record(name)) and 1 <= known[0] <= job.images:
            _load_image(job, *known)
    return job


def load_if_whole(paths: Paths, home: str, listed: list[str]) -> Job | None:
    """Read the job in a folder; None if it is not recorded yet, or its record cannot be believed.

    Torn by a disk that lied about fsync, damaged, or not ours: all of them are as if there were none.

    Thread: clerk, and the threads that help it to recover.
    """
    try:
        return load(paths, home, listed) if REQUEST in listed else None
    except detail.INVALID:
        return None


def _job(paths: Paths, home: str, record: dict[str, Any]) -> Job:
    """Make the job of a request.json. Raises one of detail.INVALID."""
    settled, settings, specs = detail.parts_of(record)
    images = len(specs)
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
        must_fit=settings.prompt.overflow == "refuse",
    )
    if images > CLOSED_IMAGES:
        job.detail_in_memory = detail.Detail(record["claimed"], settled, settings, specs)
    if job.id != os.path.basename(home):
        raise ValueError(f"the record of {job.id!r} lies in {home}")
    if not (names.is_plain(job.file) and (job.sub == "" or names.is_below(job.sub))):
        raise ValueError(f"sub, file: {job.sub!r}, {job.file!r}")
    if not names.is_below(job.folder) or "/." in f"/{job.folder}":  # `names.safe` hides none
        raise ValueError(f"folder: {job.folder!r}")
    numbers = job.inode, job.owner, job.priority
    if any(type(number) is not int for number in numbers):
        raise TypeError(f"inode, owner, priority: {numbers!r}")
    if job.inode < 0 or job.owner < 0 or job.priority not in PRIORITIES:
        raise ValueError(f"inode, owner, priority: {numbers!r}")
    return job


def _owner_of_drop(home: str | Path, record: dict[str, Any]) -> int:
    """Return the uid of the dropped file, which promptdrop 0.1 did not record; 0 if it is gone."""
    try:
        return os.lstat(f"{home}/{DROP}/{dropped_path(record['sub'], record['file'])}").st_uid
    except FileNotFoundError:
        return 0


def _load_image(job: Job, number: int, kind: ImageRecord) -> None:
    """Add to an image's state what one of its records says; one that cannot be believed says nothing."""
    if kind == "published":
        if record := read_publication(job, number, kind):
            state = job.state(number)
            state.outcome, state.file = record["outcome"], record["image"]["file"]
            state.error = record["error"]
        return
    record = job.paths.trust.read_json(job.record_path(number, kind))
    if kind == "failed":
        error = record.get("error")
        state = job.state(number)
        state.outcome, state.error = "failed", error if isinstance(error, str) else None
    elif kind == "begun":
        state = job.state(number)
        state.attempts = _count(record.get("attempts", 0), 0)
        state.deaths = _count(record.get("deaths", 1), 1)


def _count(value: Any, default: int) -> int:
    """Return a count of a record; the default if it is none."""
    return value if type(value) is int and 0 <= value <= MAX_COUNT else default


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
    document = json.dumps({"error": error}).encode()
    fs.write_durably(job.record_path(number, "failed"), document, job.settings.record_mode)
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
        document = json.dumps({"attempts": attempts, "deaths": deaths}).encode()
        fs.write_quickly(path, document, job.settings.record_mode)
    else:
        fs.remove_file(path)
