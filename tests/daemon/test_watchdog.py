"""The messages of a running daemon to systemd."""

from pathlib import Path

from harness import Daemon
from notified import Notified
from promptdrop import clock


def test_ready_comes_after_warm_up_and_the_watchdog_is_fed(daemon: Daemon, tmp_path: Path) -> None:
    """READY=1 is sent once the engine is warm, WATCHDOG=1 also while it loads, then STATUS and STOPPING."""
    daemon.write_config({"model": {"revision": "!load-slow 0.5"}})
    with Notified(tmp_path / "notify") as systemd:
        daemon.start(env=systemd.environment)
        ready = systemd.first("READY=1")
        at_ready = clock.timestamp()
        daemon.stop()
        systemd.first("STOPPING=1")

    assert daemon.until_log("engine.ready")["timestamp"] <= at_ready
    assert "WATCHDOG=1" in systemd.heard[:ready]
    assert any(message.startswith("STATUS=") for message in systemd.heard)
