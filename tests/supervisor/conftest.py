"""Fixtures: parts of the supervisor whose threads and engines never outlive their test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from rooms import Rooms


@pytest.fixture
def make_rooms(tmp_path: Path) -> Iterator[Callable[..., Rooms]]:
    """`make_rooms({...changes to config...}, slots=2)` makes Rooms that are closed after the test."""
    made: list[Rooms] = []

    def make(changes: dict[str, Any] | None = None, slots: int = 1) -> Rooms:
        made.append(Rooms(tmp_path / str(len(made)), changes, slots))
        return made[-1]

    yield make
    for rooms in made:
        rooms.close()


@pytest.fixture
def rooms(make_rooms: Callable[..., Rooms]) -> Rooms:
    """Rooms with one engine that is not started."""
    return make_rooms()


@pytest.fixture
def logged() -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """`logged(event)`: every line of the log with this event."""
    with capture_logs() as lines:
        yield lambda event: [dict(line) for line in lines if line["event"] == event]
