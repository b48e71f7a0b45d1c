"""The time as text, the boot in which a monotonic time was taken, and time that stood still."""

import time
from datetime import UTC, datetime
from pathlib import Path

AWAY_SECONDS = 1.0  # a busy machine is late by less; who is later did not run at all


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


class Presence:
    """Notices when a loop was away: its process was stopped, frozen, or got no processor."""

    def __init__(self, now: float) -> None:
        self._seen = now

    def away(self, now: float, planned: float) -> float:
        """Return the seconds since the last call, if the loop meant to be back long before; else 0.

        planned: how long it meant to sleep meanwhile. If that is short, nothing lived is taken for
        an absence: whoever counts by the rest is right within `planned` and AWAY_SECONDS.
        """
        since, self._seen = now - self._seen, now
        return since if since > planned + AWAY_SECONDS else 0.0
