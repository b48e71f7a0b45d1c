"""A daemon's status as commands read it."""

from pathlib import Path
from typing import Any

from promptdrop import records

ENGINE: dict[str, Any] = {
    "name": "engine-1", "state": "ready", "stage": "warm", "reason": None, "pid": 2, "host": None,
    "model": "gradient", "device": "cpu", "dtype": "float32", "current": None,
}  # fmt: skip
WINDOW: dict[str, Any] = {
    "images": 0, "p50_ms": None, "p95_ms": None, "p99_ms": None, "images_per_second": None,
    "utilization_percent": None,
}  # fmt: skip
IDLE: dict[str, Any] = {
    "state": "ready", "pid": 1, "engine": ENGINE, "engines": [ENGINE], "current": None,
    "watch": "inotify on ext4", "queue": {"jobs": 0, "images": 0, "publishing": 0},
    "window": WINDOW, "eta_seconds": None, "images_published": 0,
    "started": "2026-11-28T10:00:00.000Z", "updated": "2026-11-28T10:00:00.000Z",
    "version": "promptdrop 0.2.0",
}  # fmt: skip


def image(file: str = "cat.txt", number: int = 1) -> dict[str, Any]:
    """An image in an engine's hand, at step 2 of 8."""
    place = {"job": "id", "file": file, "image": number, "images": 4}
    return {**place, "step": 2, "steps": 8, "seconds": 1.25}


def end(file: str, outcome: str = "done", **changes: Any) -> dict[str, Any]:
    """A job that has ended."""
    finished = "2026-11-28T10:00:00.000Z"
    usual = {"id": "id", "inode": 1, "folder": None, "error": None, "finished": finished}
    return {**usual, "file": file, "outcome": outcome, **changes}


def status(**changes: Any) -> records.Status:
    """The status of a daemon that has nothing to do, with these keys changed."""
    return records.Status.model_validate({**IDLE, **changes})


def write_status(path: Path, **changes: Any) -> None:
    """Write status.json as a daemon does."""
    path.write_bytes(records.to_bytes(status(**changes)))
