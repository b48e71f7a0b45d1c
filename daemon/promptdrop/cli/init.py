"""`promptdrop init`: write a commented config.yaml, and make the folders of its spool."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from promptdrop.cli import options, terminal


def declare_init(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `init`."""
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a model directory, or a hub's id")


def init(arguments: argparse.Namespace) -> None:
    """Write DIR/config.yaml unless it is there, and make the folders it names."""
    from promptdrop import config_file
    from promptdrop.spool.spool import Spool

    directory: Path = arguments.directory
    file = directory / "config.yaml"
    directory.mkdir(parents=True, exist_ok=True)
    text = _text(options.plain("--model", arguments.model))
    try:
        with file.open("x", encoding="utf-8") as new:  # O_EXCL: through no link either
            new.write(text)
    except FileExistsError:
        terminal.say(
            f"kept   {file}" + (", so --model says nothing new" if arguments.model else "")
        )
    else:
        terminal.say(f"wrote  {file}")
    spool = Spool(config_file.load(file))
    spool.folders.init()
    for path in (spool.paths.inbox, spool.paths.outbox, spool.paths.failed):
        terminal.say(f"folder {path}")
    terminal.say(f"next   promptdrop doctor --config {file}; promptdrop run --config {file}")


def _text(model: str | None) -> str:
    """Return the shipped config.yaml with this model in it.

    A folder becomes `model.path`, with the size its VAE was made for; a hub's id becomes `model.id`.
    """
    from importlib import resources

    from promptdrop import weights

    values: dict[str, Any] = {} if model is None else {"id": model}
    if model and (Path(model).is_dir() or model.startswith(("/", ".", "~"))):
        path = Path(model).expanduser().resolve()
        values = {"id": path.name, "path": str(path)}
        if side := weights.side_of(path):
            values |= {"warmup": [f"{side}x{side}"], "width": side, "height": side}
    text = resources.files("promptdrop").joinpath("config.yaml").read_text("utf-8")
    for key, value in values.items():
        text = _with_value(text, key, value)
    return text


def _with_value(text: str, key: str, value: Any) -> str:
    """Replace the value in the first line of a key, keeping the comment in its column."""

    def line(found: re.Match[str]) -> str:
        given, comment = f"{found[1]}{json.dumps(value, ensure_ascii=False)}  ", found[3] or ""
        return (given.ljust(len(found[1] + found[2])) + comment).rstrip()

    return re.sub(rf"^(  {key}: )([^#\n]*)(#.*)?$", line, text, count=1, flags=re.MULTILINE)
