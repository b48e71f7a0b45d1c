"""Tell systemd READY, STATUS, WATCHDOG: sd_notify(3) in a few lines, since the packages are stale."""

import os
import socket


class Notifier:
    """Sends state to $NOTIFY_SOCKET, or nowhere. Never blocks: a full queue drops the message."""

    def __init__(self, environ: dict[str, str] | os._Environ[str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        if self._socket:
            self._socket.setblocking(False)
        watchdog = int(environ.get("WATCHDOG_USEC", 0)) if _is_for_us(environ) else 0
        # Half the limit, as sd_watchdog_enabled(3) advises.
        self.watchdog_seconds = watchdog / 2e6 or None
        self._next_ping = 0.0
        self._status = ""

    def ready(self) -> None:
        """Say that an engine is warm and jobs are taken."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Say that the configuration is being read again (SIGHUP)."""
        self._send("RELOADING=1")

    def stopping(self) -> None:
        """Say that the stop has begun."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows; sent only when it changes."""
        if text != self._status and self._send(f"STATUS={text}"):
            self._status = text

    def ping(self, now: float) -> None:
        """Say that we are alive, at most once per interval: more would fill the datagram queue."""
        if self.watchdog_seconds and now >= self._next_ping:
            self._next_ping = now + self.watchdog_seconds
            self._send("WATCHDOG=1")

    def close(self) -> None:
        """Close the socket."""
        if self._socket:
            self._socket.close()

    def _send(self, message: str) -> bool:
        if self._socket:
            try:
                self._socket.sendto(message.encode(), self._address)
            except OSError:
                return False  # systemd is restarting or its queue is full
        return True


def _is_for_us(environ: dict[str, str] | os._Environ[str]) -> bool:
    return environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
