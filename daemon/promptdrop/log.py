"""structlog, set up once per process: colours on a terminal, JSON lines otherwise, on stderr."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def set_up(level: str, form: str) -> None:
    """`form`: auto, console or json. Call again to change the level or form."""
    # What watchdog has to say is that events came late or not at all; the scan finds the files.
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
            _what_happened_first,
            *(
                [structlog.dev.ConsoleRenderer(pad_event_to=17, sort_keys=False)]
                if console
                else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *args: structlog.PrintLogger(
            sys.stderr
        ),  # the stderr of now: rich wraps it
        cache_logger_on_first_use=False,
    )


def _what_happened_first(
    logger: Any, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Order of the keys in a JSON line: when, how bad, what, then the rest as given."""
    head: dict[str, Any] = {
        key: event.pop(key) for key in ("timestamp", "level", "event") if key in event
    }
    return {**head, **event}


def get() -> Any:
    """The process's logger: `log.get().info("job.done", job=...)`."""
    return structlog.get_logger()
