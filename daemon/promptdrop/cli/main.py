"""The entry point of `promptdrop`: one command, its errors as a line on stderr and an exit status."""

import os
import sys

from promptdrop import names, signals
from promptdrop.cli import daemon, parser
from promptdrop.errors import PromptdropError


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; errors are printed on stderr."""
    arguments = parser.build().parse_args(argv)
    try:
        if arguments.command is not daemon.run:  # whose supervisor acts on those that came
            signals.act_as_usual()
        return int(arguments.command(arguments) or 0)
    except PromptdropError as e:
        _complain(str(e))
        return e.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `promptdrop status | head`
        return 0
    except OSError as e:
        _complain(f"{e.filename or ''}: {e.strerror or e}")
        return 1
    except KeyboardInterrupt:
        return 130


def _complain(text: str) -> None:
    """Print to stderr with control characters escaped, since others chose the names of files."""
    lines = "\n".join(names.printable(line) for line in text.split("\n"))
    print(f"promptdrop: {lines}", file=sys.stderr)
