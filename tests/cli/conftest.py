"""Fixtures: a spool that this process owns, and a terminal of 80 columns."""

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout

import pytest

from promptdrop.spool.spool import Spool


@pytest.fixture
def owned(spool: Spool) -> Iterator[Spool]:
    """The same spool, locked by this process: commands take it for the daemon."""
    spool.lock.acquire()
    yield spool
    spool.lock.release()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], str]:
    """`drawn(show)` returns what `show()` draws on a terminal of 80 columns, without colours."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")

    def draw(show: Callable[[], None]) -> str:
        with redirect_stdout(Terminal()) as terminal:
            show()
        return terminal.getvalue()

    return draw
