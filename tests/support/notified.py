"""A listener for the daemon's messages to systemd."""

import socket
import threading
from pathlib import Path

from harness import until


class Notified:
    """Hears the messages in systemd's place, with a watchdog of 0.4 s."""

    def __init__(self, path: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "400000"}
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._listener = threading.Thread(target=self._listen)

    def __enter__(self) -> "Notified":
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._listener.join()
        self._socket.close()

    def _listen(self) -> None:
        while said := self._socket.recv(4096):
            self.heard.append(said.decode())

    def first(self, text: str) -> int:
        """Wait for a text. Returns when it was first heard."""
        until(lambda: any(text in said for said in self.heard), text)
        return next(n for n, said in enumerate(self.heard) if text in said)
