"""Fixtures: a spool that no daemon owns, and a terminal of 80 columns."""

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from promptdrop.spool.spool import Spool
from spools import init_spool


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """A spool with its folders, without a daemon."""
    return init_spool(tmp_path)


@pytest.fixture
def owned(spool: Spool) -> Iterator[Spool]:
    """The same spool, owned: to commands this process is its daemon."""
    spool.lock.acquire()
    yield spool
    spool.lock.release()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], str]:
    """`drawn(show)`: what `show()` draws on a terminal of 80 columns, without colours."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")

    def draw(show: Callable[[], None]) -> str:
        with redirect_stdout(Terminal()) as terminal:
            show()
        return terminal.getvalue()

    return draw
