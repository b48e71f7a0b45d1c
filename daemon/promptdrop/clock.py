"""The time as text, and the boot in which a monotonic time was taken."""

import time
from datetime import UTC, datetime
from pathlib import Path


def timestamp(moment: float | None = None) -> str:
    """Return `2026-11-23T21:04:05.123Z` for seconds since the epoch; for this moment if none are given."""
    moment = time.time() if moment is None else moment
    return (
        datetime.fromtimestamp(moment, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def boot_id() -> str:
    """Return the id of this boot. Monotonic times of different boots cannot be compared (random(4))."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
