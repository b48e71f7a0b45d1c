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
