"""`promptdrop generate`: render images now, through the running daemon, else through a private one."""

import argparse
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptdrop.cli import options
from promptdrop.errors import RequestError, UsageError

if TYPE_CHECKING:
    from promptdrop.cli.client import Ended
    from promptdrop.cli.targets import Targets
    from promptdrop.config import Config
    from promptdrop.spool.spool import Spool


def declare_generate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `generate`."""
    options.add_config(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT")
    parser.add_argument(
        "--prompts", metavar="A;B;C", help="several prompts, separated by semicolons"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="a file for one image, a folder for several",
    )
    parser.add_argument(
        "--own-engine", action="store_true", help="load a model even if a daemon runs"
    )
    options.add_fields(parser)


def generate(arguments: argparse.Namespace) -> int:
    """Render prompts, put the images where they were asked for, print each path and latency.

    Raises UsageError: a field is wrong, or output cannot be used; nothing is rendered.
    """
    from promptdrop.cli import client, private_daemon
    from promptdrop.cli.targets import Targets
    from promptdrop.spool.spool import Spool

    prompts, fields = _prompts(arguments), options.fields(arguments)
    settings = options.config(arguments)
    output = _output(arguments.output)
    data, name = _job(prompts, fields, output), client.name_of_prompt(prompts[0])
    images = _count(data, settings)
    targets = Targets(output, are_several=arguments.prompts is not None or images > 1)
    spool = Spool(settings)
    if not arguments.own_engine and spool.lock.daemon_pid() is not None:
        return _collect(spool, _through_daemon(spool, data, name), images, targets)
    with tempfile.TemporaryDirectory(prefix="promptdrop-") as folder:
        spool, ended = private_daemon.render(settings, Path(folder), data, name)
        return _collect(spool, ended, images, targets)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Return the prompts. Raises UsageError: none is given, or PROMPT and `--prompts` both are."""
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise UsageError('expected one prompt, or several as --prompts "cat;dog"')
    if arguments.prompt is not None:
        return [arguments.prompt]
    prompts = [prompt.strip() for prompt in arguments.prompts.split(";") if prompt.strip()]
    if not prompts:
        raise UsageError(
            f"--prompts {arguments.prompts!r}: expected prompts separated by semicolons"
        )
    return prompts


def _output(given: str | None) -> Path | None:
    """Return `--output`; one that ends in a slash is a folder, and is made."""
    if not given:
        return None
    output = Path(given)
    if given.endswith(os.sep):
        output.mkdir(parents=True, exist_ok=True)
    return output


def _job(prompts: list[str], fields: dict[str, Any], output: Path | None) -> bytes:
    """Make a JSON job file. The suffix of an output file decides the format.

    Raises UsageError: `--format` contradicts the suffix.
    """
    from promptdrop.cli.targets import FORMAT_OF_SUFFIX

    job: dict[str, Any] = {"prompts": prompts, **fields}
    wanted = FORMAT_OF_SUFFIX.get(output.suffix.lower()) if output else None
    if wanted and not (output and output.is_dir()):
        if fields.get("format", wanted) != wanted:
            raise UsageError(f"--format {fields['format']} does not fit {output}")
        job["format"] = wanted
    return json.dumps(job).encode()


def _count(data: bytes, settings: "Config") -> int:
    """Count the images of a job file. Raises UsageError: it would be refused."""
    from promptdrop.request import parse

    try:
        return len(parse.parse(data, ".json", settings).images)
    except RequestError as e:
        raise UsageError("; ".join(problem.message for problem in e.problems)) from None


def _through_daemon(spool: "Spool", data: bytes, name: str) -> "Ended":
    """Drop the job into the inbox of the daemon that runs, under a name with a lane of its own; wait."""
    from promptdrop.cli import client, progress
    from promptdrop.spool.lanes import GENERATE

    dropped = client.drop(spool, data, GENERATE + name)
    with progress.bar() as bar:
        (ended,) = client.wait(spool, [dropped], progress.Follower(bar))
    return ended


def _collect(spool: "Spool", ended: "Ended", images: int, targets: "Targets") -> int:
    """Copy the job's images to their targets, a line for each. Returns 0 if all are there, else 1."""
    from promptdrop.cli import client, terminal

    found = client.pictures(spool, ended.id, ended.folder) if ended.folder else iter(())
    put = 0
    for picture in itertools.islice(found, images):
        latency, seed = picture.sidecar.latency_ms, picture.sidecar.request.seed
        target = targets.put(picture.path.name, picture.file.read(client.PICTURE_BYTES))
        milliseconds = f"render {latency.render} ms", f"total {latency.total} ms"
        terminal.say(str(target), *milliseconds, f"seed {seed}")
        put += 1
    if ended.outcome != "done":
        reason = f": {ended.error}" if ended.error else ""
        terminal.complain(f"promptdrop: {ended.outcome}{reason}")
        return 1
    if put < images:
        where = spool.paths.outbox / (ended.folder or "")
        terminal.complain(
            f"promptdrop: {images - put} of {images} images are not in {where} any more"
        )
    return int(put < images)
