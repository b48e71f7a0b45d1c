"""Documents that other programs read, and reading those that others have written."""

import json
from typing import Any

import pytest

from promptdrop import records
from promptdrop.records import ErrorRecord, JobSummary, Record, Sidecar, Status
from statuses import ENGINE, end, image, status

KINDS = [Status, Sidecar, JobSummary, ErrorRecord]


def test_reading_loses_nothing_of_our_own() -> None:
    """A document that this version writes is read back unchanged."""
    written = status(
        engines=[{**ENGINE, "current": image()}, ENGINE],
        finished=[end("cat.txt", "failed", error="no luck")],
        eta_seconds=1.5,
    )

    assert records.read(Status, json.loads(records.to_bytes(written))) == written


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_need_be_there(kind: type[Record]) -> None:
    """A missing key has its default, null if the schema allows it, else an empty value; in parts, too."""
    empty = records.read(kind, {})

    for name, field in kind.model_fields.items():
        if not field.is_required():
            assert getattr(empty, name) == field.get_default(call_default_factory=True)
        else:
            assert not getattr(empty, name) or isinstance(getattr(empty, name), Record)


def test_the_empty_values() -> None:
    """There is an empty value for text, numbers, lists, words of a list, and values that may be null."""
    empty = records.read(Status, {})

    assert (empty.state, empty.pid, empty.jobs, empty.reason) == ("", 0, [], None)
    assert (empty.engine.name, empty.engine.current, empty.window.p50_ms) == ("", None, None)


@pytest.mark.parametrize(
    ("document", "attribute", "value"),
    [
        ({"state": "dreaming"}, "state", "dreaming"),
        ({"schema": "promptdrop.status/2"}, "schema_", "promptdrop.status/2"),
        ({"state": ["ready"]}, "state", ""),
        ({"pid": "7"}, "pid", 0),
        ({"pid": True}, "pid", 0),
        ({"eta_seconds": 3}, "eta_seconds", 3),
        ({"eta_seconds": "3"}, "eta_seconds", None),
        ({"reason": 5}, "reason", None),
        ({"jobs": {}}, "jobs", []),
        ({"jobs": [5]}, "jobs", []),
        ({"current": []}, "current", None),
    ],
)
def test_values_of_another_version(document: Any, attribute: str, value: object) -> None:
    """A word that is new to us is kept; what has another type counts as missing."""
    assert getattr(records.read(Status, document), attribute) == value


def test_keys_of_another_version() -> None:
    """Unknown keys are ignored at every depth."""
    read = records.read(Status, {"dreams": 1, "queue": {"images": 5, "sheep": 9}})

    assert read.queue.images == 5
    assert read.queue.jobs == 0
    assert "dreams" not in read.model_dump()


# --- documents that strangers may have written --------------------------------------------------


def error_record(**changes: Any) -> dict[str, Any]:
    """A whole error record."""
    usual = {"file": "a.txt", "outcome": "failed", "error": "no luck", "retry": "", "time": ""}
    return {"schema": "promptdrop.error/1", **usual, "host": "", "version": "", **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"id": []}, {"id": 5}, {"error": None}, {"folder": {}}, {"missing": [1, "2"]},
        {"missing": [10**30]}, {"problems": [{"line": "1"}]}, {"problems": {}}, {"schema": 5},
        {"schema": "promptdrop.error/2"},
    ],
)  # fmt: skip
def test_what_does_not_fit_is_no_document(changes: dict[str, Any]) -> None:
    """A value of another type, a number out of range or another schema, at any depth: none of it is used."""
    assert records.fitting(ErrorRecord, error_record(**changes)) is None


def test_what_fits_may_be_of_another_version() -> None:
    """Keys that are missing or new are no reason to refuse a document."""
    ours = records.fitting(ErrorRecord, error_record(id="x", new=1))
    bare = records.fitting(ErrorRecord, {"schema": "promptdrop.error/1"})

    assert ours == ErrorRecord.model_validate(error_record(id="x"))
    assert bare == records.read(ErrorRecord, {})
    assert records.fitting(ErrorRecord, {}) is None


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -(2.0**64), 2**64, 10**400])
def test_numbers_that_no_format_holds_count_as_missing(value: float) -> None:
    """JSON has numbers of any size, and Python reads three words as numbers, too."""
    assert records.read(Status, {"eta_seconds": value, "pid": 7}).eta_seconds is None


def test_the_largest_documents_of_our_own_are_read() -> None:
    """The bounds are above what this program can write."""
    images = [
        {"image": n, "file": "n" * 255, "seed": 2**63 - 1, "outcome": "failed", "error": "e" * 3000}
        for n in range(1, 10_001)
    ]
    summary = records.read(JobSummary, {"images": images})
    text = "\x01" * 20_000  # six bytes each
    texts = {"prompt": text, "negative_prompt": text, "meta": {"m": "\x01" * 16_384}}
    sidecar = records.read(
        Sidecar, {"request": texts, "prompt": {"text": text}, "steps_ms": [12345.6] * 200}
    )
    failed = records.read(
        ErrorRecord, error_record(error="e" * 30_000, missing=list(range(1_000_000)))
    )

    assert len(records.to_bytes(summary)) < 10_000 * records.SUMMARY_BYTES_OF_IMAGE
    assert len(records.to_bytes(sidecar)) < records.SIDECAR_BYTES
    assert len(records.to_bytes(failed)) < records.ERROR_BYTES
