"""Lines and tables: drawn on a terminal, tab-separated when piped.

rich is imported where it draws: piped commands start without it.
"""

import sys
from collections.abc import Iterable, Sequence


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


def say(text: str) -> None:
    """Print a line on stdout, at once."""
    print(text, flush=True)


def complain(text: str) -> None:
    """Print a line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a header."""
    if is_terminal():
        _draw(columns, rows)
    else:
        _say_rows((columns, *rows))


def pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Print (name, text) rows without a header."""
    if is_terminal():
        _draw(("", ""), rows)
    else:
        _say_rows(rows)


def _say_rows(rows: Iterable[Sequence[str]]) -> None:
    for row in rows:
        say("\t".join(row))


def _draw(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(header_style="bold", show_header=any(columns))
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*map(escape, row))
    Console().print(drawn)
