"""All that commands print: lines, tables, JSON, help, errors. No other module of `cli/` prints.

Others chose the names of files, prompts and reasons, so every text is escaped here, on its way out: it
stays on its line and sends a terminal no commands. A text that was escaped before stays as it is.
rich is imported where it draws: piped commands start without it.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from promptdrop import names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


def has_room_for_bar() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


def abandon() -> None:
    """Write what is left for stdout nowhere: `promptdrop status | head`, and head has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(*cells: str) -> None:
    """Print a line on stdout, at once; several cells are separated by tabs."""
    _print(sys.stdout, "\t".join(_escaped(sys.stdout, cell) for cell in cells))


def complain(*lines: str) -> None:
    """Print lines on stderr, at once."""
    for line in lines:
        _print(sys.stderr, _escaped(sys.stderr, line))


def report_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an error that nobody expected, as sys.excepthook does, whose text may quote anything."""
    import traceback

    for text in traceback.format_exception(kind, error, trace):
        complain(*text.rstrip("\n").split("\n"))


def say_json(document: Any, indent: int | None) -> None:
    """Print a document as JSON that means the same and has no character that a terminal obeys."""
    is_ascii = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = json.dumps(document, ensure_ascii=is_ascii, indent=indent)
    _print(sys.stdout, re.sub(r"[^\n -~]", lambda found: _json_escaped(found[0]), text))


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


def finding(grade: str, style: str, what: str, text: str) -> None:
    """Print a line of a report: its grade in this style in front of columns; piped, three cells."""
    if not is_terminal():
        say(grade, what, text)
        return
    from rich.text import Text

    rest = f"  {_escaped(sys.stdout, what):<13} {_escaped(sys.stdout, text)}"
    _console(soft_wrap=True).print(Text.assemble((f"{grade:>4}", style), rest))


def clear() -> None:
    """Empty the screen: CUP and ED of ECMA-48."""
    sys.stdout.write("\033[H\033[2J")


def progress() -> "Progress":
    """Return a bar of images on stderr; what describes its task is escaped, and is no markup."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Description(ProgressColumn):
        def render(self, task: "Task") -> Text:
            return Text(_escaped(sys.stderr, task.description))

    columns = (
        Description(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors quote the command line escaped, each on one line."""

    def error(self, message: str) -> Any:
        """Print the usage and the error, and exit with status 2."""
        self.print_usage(sys.stderr)
        complain(f"{self.prog}: error: {message}")
        self.exit(2)


def _escaped(stream: TextIO, text: str) -> str:
    """Return the text as this stream can show it, on one line and without control characters."""
    encoding = stream.encoding or "utf-8"
    return names.printable(text).encode(encoding, "backslashreplace").decode(encoding)


def _json_escaped(character: str) -> str:
    r"""Return a character of a JSON string as it is, or as \uXXXX where a terminal would obey it."""
    if names.printable(character) == character:
        return character
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(rf"\u{units[n : n + 4]}" for n in range(0, len(units), 4))


def _print(stream: TextIO, line: str) -> None:
    print(line, file=stream, flush=True)


def _say_rows(rows: Iterable[Sequence[str]]) -> None:
    for row in rows:
        say(*row)


def _draw(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(header_style="bold", show_header=any(columns))
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(_escaped(sys.stdout, cell)) for cell in row))
    _console().print(drawn)


def _console(soft_wrap: bool = False) -> "Console":
    from rich.console import Console

    return Console(soft_wrap=soft_wrap, highlight=False)
