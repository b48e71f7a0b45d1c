"""Fixtures: parts of the supervisor whose threads and engines never outlive their test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from parts import Parts


@pytest.fixture
def make_parts(tmp_path: Path) -> Iterator[Callable[..., Parts]]:
    """`make_parts({...changes to config...}, slots=2)` makes Parts that are closed after the test."""
    made: list[Parts] = []

    def make(changes: dict[str, Any] | None = None, slots: int = 1) -> Parts:
        made.append(Parts(tmp_path / str(len(made)), changes, slots))
        return made[-1]

    yield make
    for parts in made:
        parts.close()


@pytest.fixture
def parts(make_parts: Callable[..., Parts]) -> Parts:
    """Parts with one engine that is not started."""
    return make_parts()


@pytest.fixture
def logged() -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """`logged(event)`: every line of the log with this event."""
    with capture_logs() as lines:
        yield lambda event: [dict(line) for line in lines if line["event"] == event]
