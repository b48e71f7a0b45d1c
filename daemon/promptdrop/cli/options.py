"""Options that several commands share: `--config`, and the fields of a job file."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promptdrop.config import Config
    from promptdrop.spool.spool import Spool

# Image options of `generate` and `submit`: the job file's fields, spelled the same.
FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "negative_prompt": (str, "used only when guidance_scale > 0"),
    "width": (int, "pixels, a multiple of 16"),
    "height": (int, "pixels, a multiple of 16"),
    "size": (str, "WxH, or an aspect ratio such as 16:9"),
    "steps": (int, "transformer evaluations, 1 to 100"),
    "guidance_scale": (float, "0 to 20"),
    "seed": (int, "0 to 2**63-1"),
    "count": (int, "images per prompt"),
    "scheduler": (str, "euler, dpmpp_2m, dpmpp_2m_sde, unipc or heun"),
    "format": (str, "png, jpeg, webp or avif"),
    "timeout_seconds": (float, "per image"),
}


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
    for name, (kind, text) in FIELDS.items():
        spellings = {f"--{name.replace('_', '-')}", f"--{name}"}
        parser.add_argument(
            *sorted(spellings), dest=name, type=kind, help=text, metavar=kind.__name__.upper()
        )


def fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the image options that were given, by the job file's names."""
    return {name: value for name in FIELDS if (value := getattr(arguments, name)) is not None}


def config(arguments: argparse.Namespace) -> "Config":
    """Load the configuration of `--config`, or the default one. Raises ConfigError."""
    from promptdrop import config

    return config.load(arguments.config or config.default_file())


def spool(arguments: argparse.Namespace) -> "Spool":
    """Return the spool of the configuration; nothing is opened or made. Raises ConfigError."""
    from promptdrop.spool.spool import Spool

    return Spool(config(arguments))
