"""structlog, set up once per process: colours on a terminal, JSON lines otherwise, on stderr.

A thread writes the lines: a terminal stopped by Ctrl-S, or a pipe that nobody reads, must not
stop the code that logs.
"""

import atexit
import logging
import sys
import threading
from collections import deque
from collections.abc import MutableMapping
from typing import Any

import structlog

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_LINES = 10_000
_SETTLE_SECONDS = 1.0


def set_up(level: str, form: str) -> None:
    """Set up the log, or change how it is set up. form: auto, console or json."""
    # watchdog warns that events were late or lost; the periodic scan finds the files anyway.
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
            _event_first,
            *(
                [structlog.dev.ConsoleRenderer(pad_event_to=17, sort_keys=False)]
                if console
                else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *args: _output,
        cache_logger_on_first_use=False,
    )


def set_up_for_scripts() -> None:
    """Log warnings to stderr, unless the script has set up structlog, whose default is stdout."""
    if not structlog.is_configured():
        set_up("warning", "auto")


def settle() -> None:
    """Wait until all lines so far are written, at most a second."""
    _output.settle()


class _Output:
    """The logger that structlog writes to. If more than _LINES wait, the oldest are lost and counted."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._lost = 0
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None

    def msg(self, text: str) -> None:
        """Put a line behind those that wait to be written. Never blocks.

        Thread: any.
        """
        with self._changed:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="log", daemon=True)
                self._writer.start()
                atexit.register(self.settle)
            if len(self._lines) >= _LINES:
                self._lines.popleft()
                self._lost += 1
            self._lines.append(f"{text}\n")
            self._changed.notify_all()

    debug = info = warning = error = msg

    def settle(self) -> None:
        """Wait until all lines are written, at most _SETTLE_SECONDS."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines, _SETTLE_SECONDS)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                text, lost = self._lines[0], self._lost
            try:
                if lost:
                    print(f"{lost} lines of the log are lost: nobody read them", file=sys.stderr)
                sys.stderr.write(text)  # looked up each time, since rich replaces it
                sys.stderr.flush()
            except (OSError, ValueError):
                pass  # stderr is closed or on a full disk: there is nowhere to report it
            with self._changed:
                if self._lines and self._lines[0] is text:
                    self._lines.popleft()
                self._lost -= lost
                self._changed.notify_all()


def _event_first(
    logger: Any, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Put time, level and event before the other keys of a line."""
    head: dict[str, Any] = {
        key: event.pop(key) for key in ("timestamp", "level", "event") if key in event
    }
    return {**head, **event}


_output = _Output()


def get() -> Any:
    """Return the logger of this process: `log.get().info("job.done", job=...)`."""
    return structlog.get_logger()
