"""`promptdrop run`, `pause` and `resume`: run the daemon, and hold it."""

import argparse
import os
from typing import TYPE_CHECKING

from promptdrop import names
from promptdrop.cli import options

if TYPE_CHECKING:
    from promptdrop.cli.client import Picture
    from promptdrop.supervisor.supervisor import Supervisor


def declare_run(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run`."""
    options.add_config(parser)
    parser.add_argument(
        "--drain", action="store_true", help="finish what is in the inbox, print a table, and stop"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the daemon until it is stopped; with `--drain` until nothing is left, then print a table."""
    from promptdrop import captured, log
    from promptdrop.cli import progress

    settings = options.config(arguments)
    log.set_up(settings.log.level, settings.log.format)
    with progress.bar(is_wanted=arguments.drain) as bar:
        if bar is None:  # which is drawn on stderr
            captured.capture(stdout=not arguments.drain)
        from promptdrop.supervisor.supervisor import Supervisor

        supervisor = Supervisor(settings, arguments.drain, bar.show if bar else None)
        status = supervisor.run()
    if arguments.drain:
        _print_results(supervisor)
    return status


def _print_results(supervisor: "Supervisor") -> None:
    """Print a row for each image that a drain has made, then the jobs that did not end well."""
    from promptdrop.cli import client, terminal

    rows = [
        _row(end.file, picture)
        for end in supervisor.finished
        if end.folder
        for picture in client.pictures(supervisor.spool, end.id, end.folder)
    ]
    if rows:
        terminal.table(("image", "seed", "latency", "file"), rows)
    for end in supervisor.finished:
        if end.outcome != "done":
            terminal.say(f"{end.outcome}: {end.file}: {end.error}")
    count = "1 image" if len(rows) == 1 else f"{len(rows)} images"
    outbox = os.path.relpath(supervisor.spool.paths.outbox)
    terminal.say(f"{count} in {outbox}, each beside its sidecar")


def _row(file: str, picture: "Picture") -> tuple[str, str, str, str]:
    sidecar = picture.sidecar
    render = sidecar.latency_ms.render
    return (
        f"{file} {sidecar.job.image}/{sidecar.job.images}",
        str(sidecar.request.seed),
        f"{render:.0f} ms" if render is not None else sidecar.outcome,
        os.path.relpath(picture.path),
    )


def pause(arguments: argparse.Namespace) -> None:
    """Leave the flag that stops new images until `resume`."""
    from promptdrop.cli import terminal
    from promptdrop.spool import control

    control.pause(options.spool(arguments).paths.control)
    terminal.say("paused: no new image is begun until `promptdrop resume`")


def resume(arguments: argparse.Namespace) -> None:
    """Remove the flag of `pause`, and a PAUSE file in the inbox."""
    from promptdrop import fs
    from promptdrop.cli import terminal
    from promptdrop.spool import control

    spool = options.spool(arguments)
    was_paused = control.why_paused(spool.paths) is not None
    control.resume(spool.paths.control)
    fs.remove_file(spool.paths.inbox / names.PAUSE)
    terminal.say("resumed" if was_paused else "was not paused")
