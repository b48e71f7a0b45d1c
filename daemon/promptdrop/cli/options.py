"""Options that several commands share: `--config`, and the fields of a job file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptdrop import names
from promptdrop.errors import UsageError
from promptdrop.fields import OPTIONS

if TYPE_CHECKING:
    from promptdrop.config import Config
    from promptdrop.spool.spool import Spool


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declare `--config FILE`."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="default: $PROMPTDROP_CONFIG, ./config.yaml, /etc/promptdrop/config.yaml",
    )


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Declare the image options, each spelled with hyphens and as in a job file."""
    for name, field in OPTIONS.items():
        spellings = {f"--{name.replace('_', '-')}", f"--{name}"}
        kind = field.kind.__name__.upper()
        parser.add_argument(
            *sorted(spellings), dest=name, type=field.kind, help=field.option, metavar=kind
        )


def fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the image options that were given, by the job file's names."""
    return {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}


def plain(name: str, value: str | None) -> str | None:
    """Return a value that goes into the configuration.

    Raises UsageError: it has control characters, or bytes that are no UTF-8.
    """
    if value is not None and names.printable(value) != value:
        raise UsageError(f"{name}: {value}: expected a text without control characters, in UTF-8")
    return value


def config(arguments: argparse.Namespace) -> "Config":
    """Load the configuration of `--config`, or the default one. Raises ConfigError."""
    from promptdrop import config_file

    return config_file.load(arguments.config or config_file.default_file())


def spool(arguments: argparse.Namespace) -> "Spool":
    """Return the spool of the configuration; nothing is opened or made. Raises ConfigError."""
    from promptdrop.spool.spool import Spool

    return Spool(config(arguments))
