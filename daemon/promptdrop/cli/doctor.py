"""`promptdrop doctor`: print what would keep this configuration from working, one line each."""

import argparse
from typing import TYPE_CHECKING

from promptdrop.cli import options

if TYPE_CHECKING:
    from promptdrop.cli.checks import Finding

_COLOURS = {"ok": "green", "note": "yellow", "bad": "bold red"}


def doctor(arguments: argparse.Namespace) -> int:
    """Print every finding. Returns 1 if one is bad."""
    from promptdrop.cli import checks

    is_any_bad = False
    for finding in checks.examine(options.config(arguments)):
        is_any_bad |= finding.grade == "bad"
        print_finding(finding)
    return int(is_any_bad)


def print_finding(finding: "Finding") -> None:
    """Print one line of the report."""
    from promptdrop.cli import terminal

    terminal.finding(finding.grade, _COLOURS[finding.grade], finding.what, finding.text)
