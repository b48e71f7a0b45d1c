"""The entry point of `promptdrop`: one command, its errors as a line on stderr and an exit status."""

import os
import sys

from promptdrop import signals
from promptdrop.cli import daemon, parser, terminal
from promptdrop.errors import PromptdropError


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; errors are printed on stderr."""
    sys.excepthook = terminal.report_bug
    arguments = parser.build().parse_args(argv)
    try:
        if arguments.command is not daemon.run:  # whose supervisor acts on those that came
            signals.act_as_usual()
        return int(arguments.command(arguments) or 0)
    except PromptdropError as e:
        first, *rest = e.lines
        terminal.complain(f"promptdrop: {first}", *rest)
        return e.exit_status
    except BrokenPipeError:
        terminal.abandon()
        return 0
    except OSError as e:
        where = "" if e.filename is None else f"{os.fsdecode(e.filename)}: "
        terminal.complain(f"promptdrop: {where}{e.strerror or e}")
        return 1
    except KeyboardInterrupt:
        return 130
