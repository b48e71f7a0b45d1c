"""What reaches stderr past the log becomes lines of the log: of libraries, C code, Python, engines.

Descriptor 2 becomes a pipe that a thread reads; the log goes to what was stderr before.
"""

import faulthandler
import fcntl
import os
import re
import select
import sys
import termios
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from promptdrop import log, names, untrusted

_PIPE_BYTES = 1 << 20  # room for what C code writes while it holds the GIL, and so this thread
_LINE_BYTES = 4096  # a longer line comes in pieces
_REST_SECONDS = 0.3  # after that a line that has begun is logged without its end
_LAST_WORDS_BYTES = 1 << 16

_is_captured = False


def capture(stdout: bool) -> None:
    """Log what is written to stderr, also by child processes, until this process ends.

    stdout: what is written there is logged, too.
    """
    global _is_captured
    try:
        real = os.dup(2)
    except OSError:
        return  # stderr is closed: there is no log either
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        pass  # this user's pipes are many: it stays at 64 KiB
    os.dup2(writing, 2)
    if stdout:
        os.dup2(writing, 1)
    os.close(writing)
    reader = _Reader(reading)
    log.write_to(real, reader.settle)
    threading.Thread(target=reader.run, name="stderr", daemon=True).start()
    if faulthandler.is_enabled():
        faulthandler.enable(real)  # nobody reads the pipe of a process that dies
    _log_errors()
    _is_captured = True


def keep_last_words(path: Path) -> None:
    """Log the traceback that a fatal signal has made the last life leave in this file; keep ours there.

    Such are SIGSEGV, SIGBUS, SIGFPE, SIGILL and systemd's SIGABRT of a loop that hangs. Nothing can be
    logged then, only written as it is, which stderr may not show.
    """
    if not _is_captured:
        return
    try:
        said, _ = untrusted.read_plain(path, _LAST_WORDS_BYTES)
        if said:
            text = said.decode(errors="backslashreplace")
            log.always().error("daemon.had_died", exception=text)
    except OSError:
        pass  # there is none, or no plain file
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        faulthandler.enable(os.open(path, flags, 0o600))
    except OSError as e:
        log.get().warning("daemon.last_words_lost", reason=str(e))


class _Reader:
    """Reads the pipe; its thread never waits for anything but what it reads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""  # the beginning of a line
        self._working = threading.Lock()  # held while what was read is not logged yet

    def run(self) -> None:
        """Read for ever. Runs in a thread of its own."""
        readable = select.poll()
        readable.register(self._descriptor, select.POLLIN)
        while True:
            ready = readable.poll(_REST_SECONDS * 1e3 if self._rest else None)
            with self._working:
                data = os.read(self._descriptor, 1 << 16) if ready else b"\n"
                *lines, self._rest = re.split(rb"[\r\n]", self._rest + data)
                while len(self._rest) > _LINE_BYTES:
                    lines.append(self._rest[:_LINE_BYTES])
                    self._rest = self._rest[_LINE_BYTES:]
                for line in lines:
                    _say(line)

    def settle(self, deadline: float) -> None:
        """Wait until all that was written is in the log, at most until `deadline` (monotonic).

        Thread: any.
        """
        while time.monotonic() < deadline:
            with self._working:
                if not (self._rest or _unread(self._descriptor)):
                    return
            time.sleep(0.005)


def _say(line: bytes) -> None:
    """Log a line as it is, its control characters escaped, whatever `log.level` is."""
    for begin in range(0, len(line.rstrip()), _LINE_BYTES):
        text = line.rstrip()[begin : begin + _LINE_BYTES].decode(errors="backslashreplace")
        log.always().warning(log.STDERR_LINE, text=names.printable(text))


def _unread(descriptor: int) -> int:
    """Count the bytes in a pipe: ioctl_pipe(2)."""
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


def _log_errors() -> None:
    """Make one line of the log of each traceback and warning, which Python prints in several."""

    def of_main(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        log.always().error("daemon.died", exc_info=(kind, error, trace))

    def of_thread(ended: threading.ExceptHookArgs) -> None:
        thread = ended.thread.name if ended.thread else None
        about = (ended.exc_type, ended.exc_value, ended.exc_traceback)
        log.always().error("thread.died", thread=thread, exc_info=about)

    def ignored(about: Any) -> None:
        told = (about.exc_type, about.exc_value, about.exc_traceback)
        log.always().error("error.ignored", where=about.err_msg, exc_info=told)

    def warned(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        where, kind = f"{filename}:{lineno}", category.__name__
        log.always().warning("python.warning", kind=kind, text=str(message), where=where)

    sys.excepthook, threading.excepthook, sys.unraisablehook = of_main, of_thread, ignored
    warnings.showwarning = warned
