"""`promptdrop retry` and `cancel`: resume or withdraw jobs that are named."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from promptdrop.cli import options
from promptdrop.errors import UsageError

if TYPE_CHECKING:
    from promptdrop.cli.find import Match
    from promptdrop.spool.spool import Spool

_NAME_HELP = "a job id, SUB/FILE or SUB/JOB"


def declare_retry(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `retry`."""
    options.add_config(parser)
    parser.add_argument("names", nargs="*", metavar="NAME", help=_NAME_HELP)
    parser.add_argument("--all", action="store_true", dest="everything")


def retry(arguments: argparse.Namespace) -> None:
    """Ask the daemon to resume failed jobs. Raises UsageError: a name fits none, or several."""
    from promptdrop.cli import find, terminal
    from promptdrop.spool import control

    spool = options.spool(arguments)
    if arguments.everything == bool(arguments.names):
        raise UsageError("expected a NAME, or --all")
    if arguments.everything:
        matches = find.failed(spool, None)
        if not matches:
            terminal.say("nothing has failed")
            return
    else:
        matches = [
            find.only(find.failed(spool, name), name, "in failed/") for name in arguments.names
        ]
    control.send(spool.paths.control, control.Retry(tuple(match.target for match in matches)))
    _say_sent(spool, "retrying", matches)


def declare_cancel(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `cancel`."""
    options.add_config(parser)
    parser.add_argument("names", nargs="+", metavar="NAME", help=_NAME_HELP)


def cancel(arguments: argparse.Namespace) -> None:
    """Ask the daemon to withdraw or stop jobs. Raises UsageError: a name fits none, or several."""
    from promptdrop.cli import find
    from promptdrop.spool import control

    spool = options.spool(arguments)
    matches = [find.only(find.unfinished(spool, name), name, "in hand") for name in arguments.names]
    control.send(spool.paths.control, control.Cancel(tuple(match.target for match in matches)))
    _say_sent(spool, "cancelling", matches)


def _say_sent(spool: "Spool", verb: str, matches: Sequence["Match"]) -> None:
    from promptdrop.cli import terminal

    for match in matches:
        terminal.say(f"{verb} {match.description}")
    if spool.lock.daemon_pid() is None:
        terminal.complain("no daemon runs on this spool; it is done when one starts")
