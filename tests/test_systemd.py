"""The unit file, and what the daemon tells systemd."""

import socket
import subprocess
from pathlib import Path

import pytest

from harness import Daemon, needs_systemd_analyze, until
from promptdrop import clock
from promptdrop.sdnotify import Notifier

UNIT = Path(__file__).parent.parent / "systemd" / "promptdrop.service"


@needs_systemd_analyze
@pytest.mark.parametrize("name", ["promptdrop.service", "promptdrop@.service"])
def test_the_units_are_clean(tmp_path: Path, name: str) -> None:
    """`systemd-analyze verify` has nothing to say (it returns 0 on unknown keys)."""
    copy = tmp_path / name
    text = UNIT.with_name(name).read_text()
    copy.write_text(text.replace("/opt/promptdrop/.venv/bin/promptdrop", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_keeps_the_contract() -> None:
    """Type=notify, no restart on 75 and 78, reload by SIGHUP, a watchdog, time to stop."""
    lines = UNIT.read_text().splitlines()

    for wanted in (
        "Type=notify",
        "RestartPreventExitStatus=75 78",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "WatchdogSec=60",
        "TimeoutStopSec=60",
    ):
        assert wanted in lines


def test_ready_comes_after_warm_up_and_the_watchdog_is_fed(daemon: Daemon, tmp_path: Path) -> None:
    """READY=1 once the engine is warm, WATCHDOG=1 also while it loads, STATUS, STOPPING."""
    path = tmp_path / "notify"
    daemon.write_config({"model": {"revision": "!load-slow 0.5"}})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(30)
        daemon.start(env={"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "200000"})
        heard: list[str] = []
        until(lambda: heard.append(listener.recv(4096).decode()) or "READY=1" in heard, "READY=1")
        at_ready = clock.timestamp()
        daemon.stop()
        until(
            lambda: heard.append(listener.recv(4096).decode()) or "STOPPING=1" in heard, "STOPPING"
        )

    assert daemon.until_log("engine.ready")["timestamp"] <= at_ready
    assert "WATCHDOG=1" in heard[: heard.index("READY=1")]
    assert any(message.startswith("STATUS=") for message in heard)


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
