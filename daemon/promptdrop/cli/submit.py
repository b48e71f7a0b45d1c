"""`promptdrop submit`: put job files and prompts into the inbox, and wait for their end if asked."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptdrop import names
from promptdrop.cli import options
from promptdrop.errors import UsageError

if TYPE_CHECKING:
    from promptdrop.cli.client import Dropped
    from promptdrop.spool.spool import Spool


def declare_submit(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `submit`."""
    options.add_config(parser)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        dest="prompts",
        metavar="TEXT",
        help="a job of its own; may be given again",
    )
    parser.add_argument("--folder", default="", metavar="SUB", help="sub-folder of the inbox")
    parser.add_argument(
        "--wait", action="store_true", help="until the jobs have ended; the exit status is theirs"
    )
    options.add_fields(parser)


def submit(arguments: argparse.Namespace) -> int:
    """Drop each file and each prompt as a job of its own."""
    from promptdrop.cli import client, terminal

    fields = _fields(arguments)
    spool = options.spool(arguments)
    if arguments.folder and not spool.config.inbox.recursive:
        raise UsageError("--folder: inbox.recursive is false, so sub-folders are not taken")
    jobs = [*_files(arguments.files, spool), *_prompts(arguments.prompts, fields)]
    sub = _sub(arguments.folder)
    dropped = [client.drop(spool, data, name, sub) for data, name in jobs]
    for one in dropped:
        terminal.say(f"submitted {one.path}")
    return _wait(spool, dropped) if arguments.wait else 0


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the image options. Raises UsageError: there is no job, or no prompt that they are for."""
    if not arguments.files and not arguments.prompts:
        raise UsageError("expected a FILE or --prompt TEXT")
    fields = options.fields(arguments)
    if fields and not arguments.prompts:
        raise UsageError(f"--{next(iter(fields))} goes with --prompt; a FILE says it inside")
    return fields


def _files(files: list[Path], spool: "Spool") -> list[tuple[bytes, str]]:
    """Read job files: (bytes, name). A link is the user's own wish, and followed.

    Raises UsageError: the daemon would not take such a name, or so large a file.
    """
    for file in files:
        if not names.is_job_name(file.name):
            raise UsageError(
                f"{file}: not a job file's name; expected one of {' '.join(names.JOB_SUFFIXES)}"
            )
    return [(_read(file, spool.config.limits.job_file_kib), file.name) for file in files]


def _read(file: Path, limit_kib: int) -> bytes:
    with file.open("rb") as opened:
        data = opened.read(limit_kib * 1024 + 1)
    if len(data) > limit_kib * 1024:
        raise UsageError(f"{file}: larger than limits.job_file_kib: {limit_kib} KiB")
    return data


def _prompts(prompts: list[str], fields: dict[str, Any]) -> list[tuple[bytes, str]]:
    """Make a job file of each prompt: (bytes, name)."""
    from promptdrop.cli import client

    return [
        (json.dumps({"prompt": prompt, **fields}).encode(), client.name_of_prompt(prompt))
        for prompt in prompts
    ]


def _sub(folder: str) -> str:
    """Return `--folder` as SUB. Raises UsageError: it is no sub-folder, or one never entered."""
    parts = Path(folder).parts
    if any(map(names.is_ignored_folder, parts)):
        raise UsageError(f"--folder {folder}: the daemon never enters a folder of this name")
    if Path(folder).is_absolute():
        raise UsageError(f"--folder {folder}: expected a sub-folder of the inbox")
    return "/".join(parts)


def _wait(spool: "Spool", drops: list["Dropped"]) -> int:
    """Show the jobs' progress until all have ended; returns 0 if every one is done, else 1."""
    from promptdrop.cli import client, progress, terminal

    with progress.bar() as bar:
        ends = client.wait(spool, drops, progress.Follower(bar))
    for one, end in zip(drops, ends, strict=True):
        where = f" {spool.paths.outbox / end.folder}" if end.folder else ""
        error = f": {end.error}" if end.error else ""
        terminal.say(f"{end.outcome} {one.path}{where}{error}")
    return int(any(end.outcome != "done" for end in ends))
