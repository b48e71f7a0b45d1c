"""`promptdrop status`: print the status that the daemon has written, as rows or as JSON."""

import argparse
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from promptdrop.cli import options

if TYPE_CHECKING:
    from promptdrop.records import Status, StatusEngine, StatusImage, Window
    from promptdrop.spool.spool import Spool

WATCH_SECONDS = 1.0
_WAITING_SHOWN = 10
_ENDS_SHOWN = 5  # of jobs that did not end well

Row = tuple[str, str]


def declare_status(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `status`."""
    options.add_config(parser)
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("--watch", action="store_true", help="until interrupted")


def status(arguments: argparse.Namespace) -> int:
    """Print the daemon's status, with `--watch` every second. Returns 1 if no daemon runs."""
    from promptdrop.cli import client, terminal

    spool = options.spool(arguments)
    while document := client.read_status_document(spool):
        if arguments.watch and terminal.is_terminal():
            terminal.clear()
        _print_status(document, arguments)
        if not arguments.watch:
            return 0
        time.sleep(WATCH_SECONDS)
    return _complain_of_no_daemon(spool, arguments)


def _print_status(document: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the status: as JSON with everything that the daemon wrote, or as rows for people."""
    from promptdrop import records
    from promptdrop.cli import terminal

    if arguments.as_json:
        terminal.say_json(document, indent=None if arguments.watch else 1)
    else:
        terminal.pairs(rows(records.read(records.Status, document)))


def _complain_of_no_daemon(spool: "Spool", arguments: argparse.Namespace) -> int:
    from promptdrop.cli import terminal

    command = "promptdrop run"
    if arguments.config:
        command += f" --config {arguments.config}"
    terminal.complain(f"no daemon runs on {spool.paths.root}; start it with: {command}")
    return 1


def rows(status: "Status") -> Iterator[Row]:
    """Yield the rows that people see, in order: (name, text)."""
    yield "state", status.state + (f": {status.reason}" if status.reason else "")
    for engine in status.engines:
        yield from _engine_rows(engine, are_several=len(status.engines) > 1)
    queue = status.queue
    saving = f"{queue.publishing} being saved"
    behind = f", {queue.behind} behind what is stuck" if queue.behind else ""
    yield "queue", f"{queue.images} images of {queue.jobs} jobs, {saving}{behind}"
    yield "watch", status.watch
    yield from _rate_rows(status.window)
    if queue.images and status.eta_seconds is not None:
        yield "done in", duration(status.eta_seconds)
    for waiting in status.waiting[:_WAITING_SHOWN]:
        yield "waiting", f"{waiting.file}: {waiting.why}"
    for stuck in status.stuck[:_WAITING_SHOWN]:
        yield "stuck", f"{stuck.file}: {stuck.why}"
    bad = [end for end in status.finished if end.outcome != "done"]
    for end in bad[-_ENDS_SHOWN:]:
        yield end.outcome, f"{end.file}: {end.error or ''}"


def _engine_rows(engine: "StatusEngine", are_several: bool) -> Iterator[Row]:
    name = engine.name if are_several else "engine"
    device = f" on {engine.device}, {engine.dtype}" if engine.device else ""
    host = f", {engine.host}" if are_several and engine.host else ""
    reason = f": {engine.reason}" if engine.reason else ""
    yield name, f"{engine.stage}, {engine.model}{device}{host}{reason}"
    if image := engine.current:
        step = f"step {image.step}/{image.steps}, {image.seconds:.1f} s"
        yield "rendering", f"{place(image)}, {step}"


def _rate_rows(window: "Window") -> Iterator[Row]:
    if window.p50_ms is None:
        return
    rate = f"{window.images_per_second:.2f} images/s, " if window.images_per_second else ""
    quantiles = {"p50": window.p50_ms, "p95": window.p95_ms, "p99": window.p99_ms}
    latency = ", ".join(f"{name} {ms:.0f} ms" for name, ms in quantiles.items() if ms is not None)
    yield "rate", f"{rate}render {latency} over {window.images} images"


def place(image: "StatusImage") -> str:
    """Name an image within its job: `cat.txt 2/4`."""
    return f"{image.file} {image.image}/{image.images}"


def duration(seconds: float) -> str:
    """Write a time for people: `45 s`, `3 min`, `2 h 10 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
