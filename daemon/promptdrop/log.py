"""structlog, set up once per process: colours on a terminal, JSON lines otherwise, on stderr.

A thread writes the lines: a terminal stopped by Ctrl-S, or a pipe that nobody reads, must not
stop the code that logs.
"""

import atexit
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

from promptdrop import clock, names

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
STDERR_LINE = "stderr.line"  # the event of a line that was written past the log: captured.py
_LINES = 10_000
_SETTLE_SECONDS = 1.0
_CONSOLE = structlog.dev.ConsoleRenderer(
    pad_event_to=17, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
)


def set_up(level: str, form: str) -> None:
    """Set up the log, or change how it is set up. form: auto, console or json."""
    # watchdog warns that events were late or lost; the periodic scan finds the files anyway.
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)
    console = form == "console" or (form == "auto" and _output.is_terminal())
    _output.is_json = not console
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
            _event_first,
            structlog.processors.format_exc_info,
            *([_escaped, _shown] if console else [structlog.processors.JSONRenderer()]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *args: _output,
        cache_logger_on_first_use=False,
    )


def set_up_for_scripts() -> None:
    """Log warnings to stderr, unless the script has set up structlog, whose default is stdout."""
    if not structlog.is_configured():
        set_up("warning", "auto")


def write_to(descriptor: int, before_settling: Callable[[float], None] | None = None) -> None:
    """Write to this descriptor from now on, and no more to stderr.

    before_settling: brings the last lines, until a moment on the monotonic clock.
    """
    _output.descriptor, _output.before_settling = descriptor, before_settling
    atexit.register(settle)  # also if no line was logged yet


def descriptor() -> int | None:
    """Return the descriptor that the log is written to; None: stderr."""
    return _output.descriptor


def settle() -> None:
    """Wait until all lines so far are written, at most a second."""
    _output.settle()


class _Output:
    """The logger that structlog writes to. If more than _LINES wait, the oldest are lost and counted."""

    def __init__(self) -> None:
        self.is_json = True
        self.descriptor: int | None = None
        self.before_settling: Callable[[float], None] | None = None
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
        deadline = time.monotonic() + _SETTLE_SECONDS
        if self.before_settling:
            self.before_settling(deadline)
        with self._changed:
            self._changed.wait_for(lambda: not self._lines, max(0.0, deadline - time.monotonic()))

    def is_terminal(self) -> bool:
        """Whether people read the lines as they come."""
        return sys.stderr.isatty() if self.descriptor is None else os.isatty(self.descriptor)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                text, lost = self._lines[0], self._lost
            try:
                if lost:
                    _put(self._about_lost(lost))
                _put(text)
            except (OSError, ValueError):
                pass  # stderr is closed or on a full disk: there is nowhere to report it
            with self._changed:
                if self._lines and self._lines[0] is text:
                    self._lines.popleft()
                self._lost -= lost
                self._changed.notify_all()

    def _about_lost(self, lost: int) -> str:
        """Make the line that stands for lines that are lost."""
        if not self.is_json:
            return f"{lost} lines of the log are lost: nobody read them\n"
        head = {"timestamp": clock.timestamp(), "level": "warning", "event": "log.lost"}
        return json.dumps({**head, "lines": lost}) + "\n"


def _put(text: str) -> None:
    """Write text to where the log goes; waits if nobody reads there. Raises OSError, ValueError."""
    if _output.descriptor is None:
        sys.stderr.write(text)  # looked up each time, since rich replaces it
        sys.stderr.flush()
        return
    data = text.encode(errors="backslashreplace")
    while data:
        data = data[os.write(_output.descriptor, data) :]


def _event_first(
    logger: Any, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Put time, level and event before the other keys of a line."""
    head: dict[str, Any] = {
        key: event.pop(key) for key in ("timestamp", "level", "event") if key in event
    }
    return {**head, **event}


def _escaped(logger: Any, method: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """Escape control characters in every text of a line for a terminal; a traceback keeps its lines."""
    return {key: _escape(key, value) for key, value in event.items()}


def _escape(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value  # shown by repr, which escapes
    lines = value.split("\n") if key == "exception" else [value]
    return "\n".join(map(names.printable, lines))


def _shown(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    """Render a line for a terminal; what was written to stderr looks as it was written."""
    if event["event"] == STDERR_LINE:
        return str(event["text"])
    return _CONSOLE(logger, method, event)


_output = _Output()


def get() -> Any:
    """Return the logger of this process: `log.get().info("job.done", job=...)`."""
    return structlog.get_logger()


def always() -> Any:
    """Return a logger whose lines are written whatever `log.level` is."""
    return structlog.wrap_logger(_output, wrapper_class=structlog.make_filtering_bound_logger(0))
