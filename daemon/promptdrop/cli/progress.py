"""A progress bar of images on stderr, and messages to people who wait for jobs.

rich is imported where it draws: piped commands start without it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from promptdrop.cli import terminal
from promptdrop.cli.status import place

if TYPE_CHECKING:
    from rich.progress import Progress

    from promptdrop.cli.client import Dropped
    from promptdrop.records import Status

_TEXT_SHOWN = 60  # characters


class Bar:
    """A progress bar of images."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def update(self, text: str, done: float, total: float | None) -> None:
        """Show `done` of `total` images; `done` may count a part of an image."""
        self._progress.update(
            self._task, description=text[:_TEXT_SHOWN], completed=done, total=total
        )

    def show(self, status: "Status") -> None:
        """Show what the daemon works on, and how much of its queue is done."""
        image = status.current
        part = image.step / image.steps if image else 0.0
        total = status.images_published + status.queue.images + status.queue.publishing
        if image:
            text = f"{place(image)}, step {image.step}/{image.steps}"
        else:
            text = status.reason or (
                status.engine.stage if status.state == "starting" else status.state
            )
        self.update(text, status.images_published + part, total or None)


@contextmanager
def bar(is_wanted: bool = True) -> Iterator[Bar | None]:
    """Show a bar while the block runs. Yields None if none is wanted or stderr is no terminal."""
    if not is_wanted or not terminal.has_room_for_bar():
        yield None
        return
    with terminal.progress() as progress:
        yield Bar(progress)


class Follower:
    """Shows the progress of dropped files on a bar, and on stderr why they wait when that changes."""

    def __init__(self, bar: Bar | None) -> None:
        self._bar = bar
        self._said = ""

    def __call__(self, status: "Status | None", drops: Sequence["Dropped"]) -> None:
        """Show the daemon's status (None: no daemon runs) and the files whose jobs have not ended."""
        why = _why_waiting(status, drops)
        if why and why != self._said:
            terminal.complain(why)
        self._said = why
        if self._bar and status and drops:
            inodes = {one.inode for one in drops}
            jobs = [job for job in status.jobs if job.inode in inodes]
            done, images = sum(job.done for job in jobs), sum(job.images for job in jobs)
            text = f"{drops[0].path}: {status.state if jobs else drops[0].where}"
            self._bar.update(text, done, images or None)


def _why_waiting(status: "Status | None", drops: Sequence["Dropped"]) -> str:
    """Say why nothing happens for these files; the empty string if something does."""
    if status is None:
        return "no daemon runs on this spool; the job waits for: promptdrop run"
    if status.reason:
        return f"the daemon waits: {status.reason}"
    paths = {one.path for one in drops}
    for waiting in status.waiting:
        if waiting.file in paths and waiting.why != "still settling":
            return f"{waiting.file}: {waiting.why}"
    return ""
