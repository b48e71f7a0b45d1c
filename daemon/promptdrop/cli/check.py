"""`promptdrop check`: show what job files ask for, or why they would be refused."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from promptdrop import names
from promptdrop.cli import options
from promptdrop.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from promptdrop.config import Config
    from promptdrop.nouns import Request

_PROMPT_SHOWN = 70  # characters

_Row = tuple[str, str, str, str, str]  # image, size, steps, seed, prompt


def declare_check(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `check`."""
    options.add_config(parser)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")


def check(arguments: argparse.Namespace) -> int:
    """Print a row for each image of the files, and `file:line: message` for each problem."""
    from promptdrop.cli import terminal
    from promptdrop.intake.reading import read_job_file

    settings = _settings(arguments)
    rows: list[_Row] = []
    is_any_refused = False
    for file in arguments.files:
        found = read_job_file(file, file.name, _settings_for(file, settings), None)
        if found is None:
            found = RequestError("no such regular file")
        if isinstance(found, RequestError):
            is_any_refused = True
            _print_problems(file, found)
        else:
            rows += _rows(file, found)
    if rows:
        terminal.table(("image", "size", "steps", "seed", "prompt"), rows)
    return int(is_any_refused)


def _settings(arguments: argparse.Namespace) -> "Config":
    """Load the configuration; without any, the defaults: checking needs no installation."""
    from promptdrop import config

    try:
        return options.config(arguments)
    except ConfigError:
        if arguments.config or os.environ.get("PROMPTDROP_CONFIG"):
            raise
        return config.parse({"model": {"id": "default"}})


def _settings_for(file: Path, settings: "Config") -> "Config":
    """Return the configuration with the presets of the file's folder, if that is in the inbox."""
    from promptdrop.spool.paths import Paths

    inbox, folder = (  # Path.resolve raises RuntimeError at a loop of links
        Path(os.path.realpath(path)) for path in (Paths.of(settings).inbox, file.parent)
    )
    is_inside = folder.is_relative_to(inbox)
    return settings.in_folder(str(folder.relative_to(inbox))) if is_inside else settings


def _print_problems(file: Path, error: RequestError) -> None:
    from promptdrop.cli import terminal

    for problem in error.problems:
        terminal.complain(f"{file}:{problem.line or 1}: {problem.message}")


def _rows(file: Path, request: "Request") -> Iterator[_Row]:
    for number, spec in enumerate(request.images, start=1):
        yield (
            f"{file.name} {number}/{len(request.images)}",
            f"{spec.width}x{spec.height}",
            str(spec.steps),
            "of the job's id" if spec.seed is None else str(spec.seed),
            _short(spec.prompt),
        )


def _short(text: str) -> str:
    line = names.printable(text.replace("\n", " "))
    return line if len(line) <= _PROMPT_SHOWN else f"{line[: _PROMPT_SHOWN - 3]}..."
