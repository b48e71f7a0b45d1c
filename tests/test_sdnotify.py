"""The messages of the daemon to systemd, and how often they are sent."""

import socket
from pathlib import Path

import pytest

from promptdrop.sdnotify import Notifier


def test_the_watchdog_is_fed_once_per_interval(tmp_path: Path) -> None:
    """More would fill the datagram queue and, sent blocking, stop the daemon."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.setblocking(False)
        notifier = Notifier({"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "2000000"})
        for now in (0.0, 0.1, 0.9, 1.0, 1.5, 2.1):
            notifier.ping(now)
        notifier.close()
        heard = [listener.recv(100) for _ in range(3)]
        with pytest.raises(BlockingIOError):
            listener.recv(100)

    assert heard == [b"WATCHDOG=1"] * 3


def test_without_systemd_nothing_is_sent() -> None:
    """No socket, no message, no error; another process's watchdog is not ours."""
    notifier = Notifier({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"})
    notifier.ready()
    notifier.ping(0.0)
    notifier.close()

    assert notifier.watchdog_seconds is None
