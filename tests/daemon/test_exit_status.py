"""Daemons that cannot run end at once: 75 for a second one, 78 for a wrong configuration."""

import socket
import time
from typing import Any

import pytest

from harness import Daemon, MakeDaemon, free_port


def test_a_second_daemon_exits_75(daemon: Daemon) -> None:
    """It names the first one, which goes on."""
    daemon.start().until_ready()
    assert daemon.process
    second = daemon.run("run")

    assert second.returncode == 75
    assert str(daemon.process.pid) in second.stderr
    daemon.drop("a.txt", "a cat\n")
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_a_second_daemon_exits_75_with_metrics_too(make_daemon: MakeDaemon) -> None:
    """It does not fail on the port that the first one has: 78 would say that the file is wrong."""
    daemon = make_daemon({"metrics": {"listen": f"127.0.0.1:{free_port()}"}})
    daemon.start().until_ready()
    second = daemon.run("run")

    assert second.returncode == 75, second.stderr
    assert daemon.stop() == 0


def test_a_port_that_is_taken_is_exit_78(make_daemon: MakeDaemon) -> None:
    """The key and the reason are named, and no engine is left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        daemon = make_daemon({"metrics": {"listen": f"127.0.0.1:{taken.getsockname()[1]}"}})
        done = daemon.run("run")

    assert done.returncode == 78
    assert "metrics.listen" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"paths": {"outbox": "spool/inbox/out"}}, "inside the inbox"),
        ({"paths": {"failed": "spool/.promptdrop/failed"}}, "inside the .promptdrop"),
        ({"paths": {"outbox": "."}}, "contains the inbox"),
        ({"engine": {"max_atempts": 2}}, "did you mean 'max_attempts'"),
        ({"whatch": {}}, "did you mean 'watch'"),
        ({"model": {"id": "Tongyi-MAI/Z-Image-Turbo-none"}}, "promptdrop model fetch Tongyi-MAI/Z-Image-Turbo-none"),
        ({"engine": {"workers": 2}, "model": {"device": "cuda:1"}}, "is one device"),
        ({"engine": {"compile": True}}, "compile"),
        ({"engine": {"quantization": "fp4"}}, "fp8"),
        ({"engine": {"quantization": "fp8"}, "model": {"dtype": "float32"}}, "expected bfloat16"),
        ({"engine": {"offload": "vae"}}, "offload"),
        ({"engine": {"reserve_memory_mib": 0}}, "reserve_memory_mib"),
        ({"defaults": {"scheduler": "heum"}}, "dpmpp_2m_sde"),
        ({"defaults": {"width": 65}}, "16"),
        ({"watch": {"settle_seconds": -1}}, "watch.settle_seconds"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_exit_78(
    make_daemon: MakeDaemon, changes: dict[str, Any], said: str
) -> None:
    """The text names the key and what helps; no engine is started, no file touched."""
    daemon = make_daemon(changes)
    daemon.drop("a.txt", "a cat\n")
    began = time.monotonic()
    done = daemon.run("run")

    assert done.returncode == 78, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 20
    assert (daemon.inbox / "a.txt").exists()
