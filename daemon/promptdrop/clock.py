"""Time as the daemon tells it: an argument where decisions are made, so that tests need not sleep."""

import time
from datetime import UTC, datetime
from pathlib import Path


def timestamp(moment: float | None = None) -> str:
    """`2026-11-23T21:04:05.123Z`, of seconds since the epoch; None is now."""
    moment = time.time() if moment is None else moment
    return (
        datetime.fromtimestamp(moment, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def boot_id() -> str:
    """Names this boot of the machine: monotonic times compare only within one (random(4))."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
