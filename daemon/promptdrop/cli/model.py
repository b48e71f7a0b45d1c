"""`promptdrop model demo`, `fetch` and `path`: write, download and find the files of a model."""

import argparse
from pathlib import Path
from typing import Any

from promptdrop.cli import options, terminal


def declare_demo(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `model demo`."""
    parser.add_argument("directory", type=Path, metavar="DIR")


def demo(arguments: argparse.Namespace) -> None:
    """Write the demonstration model's files to a folder."""
    from promptdrop import weights

    directory = arguments.directory
    weights.copy_demo(directory)
    terminal.say(f"wrote {directory}; use it with: promptdrop init DIR --model {directory}")


def declare_fetch(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `model fetch`."""
    _add_model(parser)
    parser.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="the model's folder, for model.path; default: the hub's cache in your home,"
        " which a service cannot see",
    )


def fetch(arguments: argparse.Namespace) -> None:
    """Download a model, and print where it is. Raises ModelError."""
    from promptdrop import weights

    model = _model(arguments)
    terminal.say(str(weights.fetch(model["id"], model["hub"], model["revision"], arguments.to)))


def declare_path(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `model path`."""
    _add_model(parser)


def path(arguments: argparse.Namespace) -> None:
    """Print where a model's files are. Raises ModelError: some are missing."""
    from promptdrop import config, weights

    terminal.say(str(weights.require(config.parse({"model": _model(arguments)}))))


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that name a model and its hub."""
    parser.add_argument("id", metavar="ID")
    parser.add_argument("--hub", choices=("modelscope", "huggingface"), default="modelscope")
    parser.add_argument("--revision")


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of `model` in a configuration. Raises UsageError: one can be of no model."""
    return {
        "id": options.plain("ID", arguments.id),
        "hub": arguments.hub,
        "revision": options.plain("--revision", arguments.revision),
    }
