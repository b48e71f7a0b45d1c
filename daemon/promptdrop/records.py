"""The JSON that other programs read: sidecars, job.json, .error.json and status, with their schemas.

Keys may be added; a key that changes or goes makes a new version of its schema.
"""

import json
import socket
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from promptdrop.nouns import ImageOutcome, ImageSpec, JobOutcome
from promptdrop.version import __version__

HOST = socket.gethostname()  # `host` of what this machine writes
VERSION = f"promptdrop {__version__}"  # ... and its `version`

# The most bytes of a document that this program can have written. Where a group may write, a longer
# one is not ours, and is not read.
SIDECAR_BYTES = 1 << 20  # three texts of 20,000 characters of up to 6 bytes; 16 KiB of meta
ERROR_BYTES = 16 << 20  # the numbers of 1,000,000 missing images, the highest limits.images_per_job
_SUMMARY_BYTES_OF_IMAGE = 4096  # a name of 255 bytes, and an error of 3,000


def summary_bytes(images: int) -> int:
    """Return what the job.json of a job of so many images cannot exceed, in bytes."""
    return (images + 4) * _SUMMARY_BYTES_OF_IMAGE


class Record(BaseModel):
    """A frozen part of a document. Numbers are finite; a value that is not known is null."""

    model_config = ConfigDict(
        frozen=True,
        populate_by_name=True,
        ser_json_inf_nan="null",
        serialize_by_alias=True,
        defer_build=True,
    )


class SidecarJob(Record):
    id: str
    name: str = Field(description="JOB, the name of the job's folder in the outbox")
    file: str = Field(description="the dropped file's name")
    image: int = Field(ge=1)
    images: int = Field(ge=1)
    attempt: int = Field(ge=1)


class SidecarImage(Record):
    file: str
    format: str
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    bytes: int
    sha256: str


def _asked() -> dict[str, Any]:
    """The keys of a sidecar's `request`: an ImageSpec's attributes that no other part of it has."""
    hints, defaults = get_type_hints(ImageSpec), ImageSpec._field_defaults
    names = dict.fromkeys(("prompt", "negative_prompt", "seed", *ImageSpec._fields))
    keys = {
        name: (hints[name], defaults.get(name, ...))
        for name in names
        if name not in ("image", "format", "timeout_seconds")
    }
    return {
        **keys,
        "seed": (int, ...),
        "meta": (dict[str, Any], ...),
    }  # both stand in every sidecar


class SidecarRequest(create_model("SidecarRequest", __base__=Record, **_asked())):  # type: ignore[misc]  # its base is made of ImageSpec
    pass


class SidecarPrompt(Record):
    text: str = Field(description="what the encoder was given")
    tokens: int | None
    truncated: bool


class SidecarModel(Record):
    id: str
    revision: str | None
    dtype: str
    quantization: str
    compiled: bool


class LatencyMs(Record):
    """Milliseconds. queued: from settled to this image's first step of work; save: encode to the format, hash, write, fsync."""

    queued: float | None
    encode: float | None
    denoise: float | None
    decode: float | None
    transfer: float | None
    render: float | None
    save: float
    total: float | None


class Window(Record):
    """The last `metrics.window` images; true quantiles of `latency_ms.render`."""

    images: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    images_per_second: float | None
    utilization_percent: float | None


class Device(Record):
    name: str
    engine: str | None = Field(description="which of the daemon's engines rendered it")
    host: str | None = Field(description="where that engine runs")
    utilization_percent: float | None
    memory_allocated_mib: float | None
    memory_reserved_mib: float | None
    memory_peak_mib: float | None


class SidecarTime(Record):
    claimed: str
    started: str
    published: str | None


class Sidecar(Record):
    """NAME.json beside an image: visible only after its image is whole."""

    schema_: Literal["promptdrop.image/1"] = Field(default="promptdrop.image/1", alias="schema")
    outcome: Literal["rendered", "placeholder"]
    job: SidecarJob
    image: SidecarImage
    request: SidecarRequest
    prompt: SidecarPrompt
    model: SidecarModel
    evaluations: int
    batch: int
    latency_ms: LatencyMs
    steps_ms: list[float]
    window: Window
    device: Device
    time: SidecarTime
    host: str
    version: str


class SummaryImage(Record):
    image: int
    file: str | None
    seed: int
    outcome: ImageOutcome
    error: str | None = None


class Totals(Record):
    images: int
    rendered: int
    failed: int
    cancelled: int
    seconds: float | None = Field(description="from settled to finished")


class SummaryTime(Record):
    claimed: str
    finished: str


class JobSummary(Record):
    """job.json: the commit mark of a job, written last."""

    schema_: Literal["promptdrop.job/1"] = Field(default="promptdrop.job/1", alias="schema")
    id: str
    name: str
    file: str
    folder: str = Field(description="below the outbox")
    outcome: JobOutcome
    images: list[SummaryImage]
    totals: Totals
    time: SummaryTime
    host: str
    version: str


class ErrorProblem(Record):
    line: int | None
    field: str | None
    message: str


class ErrorRecord(Record):
    """FILE.error.json in failed/: why, in words a person can act on."""

    schema_: Literal["promptdrop.error/1"] = Field(default="promptdrop.error/1", alias="schema")
    file: str
    outcome: Literal["refused", "partial", "failed", "cancelled"]
    error: str
    problems: list[ErrorProblem] = Field(default_factory=list, description="of a refused file")
    id: str | None = Field(default=None, description="of a job that had begun")
    folder: str | None = Field(default=None, description="below the outbox")
    missing: list[int] = Field(default_factory=list, description="image numbers")
    retry: str = Field(description="the command that tries again")
    time: str
    host: str
    version: str


class StatusImage(Record):
    job: str
    file: str
    image: int
    images: int
    step: int
    steps: int
    seconds: float


class StatusEngine(Record):
    name: str
    state: Literal["starting", "ready", "replacing", "stopped"]
    stage: str
    reason: str | None = Field(description="why it cannot work")
    pid: int | None
    host: str | None
    model: str
    device: str | None
    dtype: str | None
    current: StatusImage | None


class StatusQueue(Record):
    jobs: int
    images: int
    publishing: int
    behind: int = Field(
        default=0,
        description="files and images that wait because others of their folder are stuck",
    )


class StatusWaiting(Record):
    file: str
    why: str


class StatusStuck(Record):
    file: str
    why: str


class StatusFinished(Record):
    id: str
    file: str
    inode: int = Field(description="of the dropped file, which a rename keeps")
    outcome: Literal["done", "partial", "failed", "cancelled", "refused"]
    folder: str | None
    error: str | None
    finished: str


class StatusJob(Record):
    id: str
    file: str
    inode: int
    folder: str
    images: int
    done: int


class Status(Record):
    """What `promptdrop status --json` prints."""

    schema_: Literal["promptdrop.status/1"] = Field(default="promptdrop.status/1", alias="schema")
    state: Literal["starting", "ready", "rendering", "paused", "waiting", "stopping"]
    reason: str | None = Field(default=None, description="why work waits")
    pid: int
    engine: StatusEngine = Field(description="the first that is warm")
    engines: list[StatusEngine] = Field(default_factory=list, description="all of them")
    current: StatusImage | None
    watch: str = Field(description="how the inbox is watched: inotify or poll, and why")
    queue: StatusQueue
    jobs: list[StatusJob] = Field(default_factory=list, description="the first 100")
    waiting: list[StatusWaiting] = Field(
        default_factory=list, description="files in the inbox that are not taken yet; the first 100"
    )
    stuck: list[StatusStuck] = Field(
        default_factory=list,
        description="files that wait for trouble of their own with a disk; the first 100",
    )
    finished: list[StatusFinished] = Field(default_factory=list, description="the last 100")
    window: Window
    eta_seconds: float | None
    images_published: int
    started: str
    updated: str
    version: str


SCHEMAS: Mapping[str, type[Record]] = {"image": Sidecar, "job": JobSummary, "status": Status}


def to_bytes(record: Record) -> bytes:
    """Return the document as it is written: UTF-8, indented, a newline at the end."""
    text = json.dumps(record.model_dump(mode="json"), ensure_ascii=False, indent=1, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read(kind: type[AnyRecord], document: Mapping[str, Any]) -> AnyRecord:
    """Read a document that another version, or a stranger, may have written; no content is an error.

    Unknown keys are ignored. A key that is missing, or has a value that does not fit, has its default;
    without one None where the schema allows null, else the empty value: 0, "", [], {}.
    """
    return _read(kind, document, is_strict=False)


def fitting(kind: type[AnyRecord], document: Mapping[str, Any]) -> AnyRecord | None:
    """Read a document that a stranger may have written; None if it is no such document.

    That is one of another schema, or with a value that does not fit. Keys that are unknown or missing
    are those of another version, as in `read`.
    """
    if document.get("schema") != kind.model_fields["schema_"].default:
        return None
    try:
        return _read(kind, document, is_strict=True)
    except TypeError:
        return None


def _read(kind: type[AnyRecord], document: Mapping[str, Any], is_strict: bool) -> AnyRecord:
    """Read a document. Raises TypeError: `is_strict`, and a value does not fit."""
    values = {}
    for name, field in kind.model_fields.items():
        try:
            values[name] = _checked(field.annotation, document[field.alias or name], is_strict)
            continue
        except KeyError:
            pass  # the key of another version
        except TypeError:
            if is_strict:
                raise
        values[name] = (
            _empty(field.annotation)
            if field.is_required()
            else field.get_default(call_default_factory=True)
        )
    return kind.model_construct(**values)


def _checked(annotation: Any, value: Any, is_strict: bool) -> Any:
    """Return the value as a field of this type has it.

    Raises TypeError: it is of another type, or a number that is not finite or has over 64 bits.

    Any text passes for a Literal, since another version may have more words.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is UnionType:  # X | None
        return None if value is None else _checked(inner[0], value, is_strict)
    if origin is list:
        return [_checked(inner[0], one, is_strict) for one in _checked(list, value, is_strict)]
    plain = str if origin is Literal else origin or annotation
    if issubclass(plain, Record):
        return _read(plain, _checked(dict, value, is_strict), is_strict)
    allowed = (int, float) if plain is float else plain
    if not isinstance(value, allowed) or (isinstance(value, bool) and plain is not bool):
        raise TypeError(f"{value!r} is no {annotation}")
    if isinstance(value, int | float) and not abs(value) < 2**64:  # also one that is no number
        raise TypeError(f"{value!r} is out of range")
    return value


def _empty(annotation: Any) -> Any:
    origin = get_origin(annotation)
    if origin is UnionType:
        return None
    plain = str if origin is Literal else origin or annotation
    return read(plain, {}) if issubclass(plain, Record) else plain()
