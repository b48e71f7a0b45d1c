"""What people see: colours, bars and tables on a terminal, plain lines when piped.

rich is imported where it draws: piped commands start without it.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


def say(text: str) -> None:
    """A line on stdout."""
    print(text, flush=True)


def complain(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; tab-separated lines with a header when piped."""
    if not is_terminal():
        for row in (columns, *rows):
            say("\t".join(row))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(header_style="bold", show_header=any(columns))
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*map(escape, row))
    Console().print(drawn)


class Bar:
    """A progress bar of images on stderr; silent unless stderr is a terminal."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def update(self, text: str, done: float, total: float | None) -> None:
        """`done` may count a part of an image."""
        from rich.markup import escape

        self._progress.update(
            self._task, description=escape(text[:60]), completed=done, total=total
        )

    def show(self, status: Any) -> None:
        """Follow the daemon's own Status."""
        current = status.current
        part = current.step / current.steps if current else 0.0
        total = status.images_published + status.queue.images + status.queue.publishing
        if current:
            text = f"{current.file} {current.image}/{current.images}, step {current.step}/{current.steps}"
        else:
            text = status.reason or (
                status.engine.stage if status.state == "starting" else status.state
            )
        self.update(text, status.images_published + part, total or None)


class Follower:
    """Tells how jobs that somebody waits for get on: on a bar, else a line when something changes."""

    def __init__(self, bar: Bar | None) -> None:
        self._bar = bar
        self._said = ""

    def __call__(self, document: dict[str, Any] | None, drops: Sequence[Any]) -> None:
        """One look: the daemon's status (None: no daemon), and the files that have not ended."""
        why = self._why(document, drops)
        if why and why != self._said:
            complain(why)
        self._said = why
        if self._bar and document and drops:
            inodes = {one.inode for one in drops}
            jobs = [job for job in document["jobs"] if job["inode"] in inodes]
            done, images = sum(job["done"] for job in jobs), sum(job["images"] for job in jobs)
            text = f"{drops[0].path}: {document['state'] if jobs else drops[0].where}"
            self._bar.update(text, done, images or None)

    def _why(self, document: dict[str, Any] | None, drops: Sequence[Any]) -> str:
        """Why nothing happens, or the empty string."""
        if document is None:
            return "no daemon runs on this spool; the job waits for: promptdrop run"
        if document["reason"]:
            return f"the daemon waits: {document['reason']}"
        paths = {one.path for one in drops}
        waiting = [w for w in document["waiting"] if w["file"] in paths]
        stuck = [w for w in waiting if w["why"] != "still settling"]
        return f"{stuck[0]['file']}: {stuck[0]['why']}" if stuck else ""


@contextmanager
def no_bar() -> Iterator[None]:
    """Where nothing is to be shown."""
    yield None


def finding(grade: str, what: str, text: str) -> None:
    """One line of `doctor`."""
    if not is_terminal():
        say(f"{grade}\t{what}\t{text}")
        return
    from rich.console import Console
    from rich.markup import escape

    colour = {"ok": "green", "note": "yellow", "bad": "bold red"}[grade]
    Console(soft_wrap=True).print(
        f"[{colour}]{grade:>4}[/]  {what:<13} {escape(text)}", highlight=False
    )


def status(document: dict[str, Any]) -> None:
    """`promptdrop status`: the daemon's own document, for people."""
    queue, window = document["queue"], document["window"]
    rows = [
        ("state", document["state"] + (f": {document['reason']}" if document["reason"] else ""))
    ]
    for engine in document["engines"]:
        rows += _engine_rows(engine, several=len(document["engines"]) > 1)
    rows.append(
        (
            "queue",
            f"{queue['images']} images of {queue['jobs']} jobs, {queue['publishing']} being saved",
        )
    )
    rows.append(("watch", document["watch"]))
    if window["p50_ms"] is not None:
        rate = (
            f"{window['images_per_second']:.2f} images/s, " if window["images_per_second"] else ""
        )
        rows.append(
            (
                "rate",
                f"{rate}render p50 {window['p50_ms']:.0f} ms, p95 {window['p95_ms']:.0f} ms, p99 {window['p99_ms']:.0f} ms over {window['images']} images",
            )
        )
    if queue["images"] and document["eta_seconds"] is not None:
        rows.append(("done in", duration(document["eta_seconds"])))
    rows += [
        ("waiting", f"{waiting['file']}: {waiting['why']}") for waiting in document["waiting"][:10]
    ]
    bad = [end for end in document["finished"] if end["outcome"] != "done"]
    rows += [(end["outcome"], f"{end['file']}: {end['error'] or ''}") for end in bad[-5:]]
    if is_terminal():
        table(("", ""), rows)
    else:
        for name, text in rows:
            say(f"{name}\t{text}")


def _engine_rows(engine: dict[str, Any], several: bool) -> Iterator[tuple[str, str]]:
    name = engine["name"] if several else "engine"
    device = f" on {engine['device']}, {engine['dtype']}" if engine["device"] else ""
    host = f", {engine['host']}" if several and engine["host"] else ""
    reason = f": {engine['reason']}" if engine["reason"] else ""
    yield name, f"{engine['stage']}, {engine['model']}{device}{host}{reason}"
    if current := engine["current"]:
        place = f"{current['file']} {current['image']}/{current['images']}"
        step = f"step {current['step']}/{current['steps']}, {current['seconds']:.1f} s"
        yield "rendering", f"{place}, {step}"


def cluster(nodes: Sequence[Any], engines: Sequence[dict[str, Any]]) -> None:
    """`promptdrop cluster status`: the hosts, then the engines and what each renders."""
    rows = []
    for node in nodes:
        state = "alive" if node.alive else "dead"
        rows.append((node.name, node.address, state, str(node.gpus), str(node.cores)))
    table(("host", "address", "state", "GPUs", "cores"), rows)
    rows = []
    for engine in engines:
        current, stage = engine["current"], engine["reason"] or engine["stage"]
        image = f"{current['file']} {current['image']}/{current['images']}" if current else ""
        rows.append((engine["name"], engine["host"] or "", engine["device"] or "", stage, image))
    if rows:
        table(("engine", "host", "device", "state", "rendering"), rows)


def duration(seconds: float) -> str:
    """`45 s`, `3 min`, `2 h 10 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress_bar() -> Iterator[Bar | None]:
    """A bar for as long as the block runs; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress)
