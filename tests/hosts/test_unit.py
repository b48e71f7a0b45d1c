"""The units on a real systemd: start, reload, watchdog, stop, restart, cluster."""

import json
import re
import time

import pytest

from harness import until
from machine import CHECKOUT, Machine
from service import MakeService


def test_start_blocks_until_the_engine_is_warm(service: MakeService) -> None:
    """`systemctl start` returns after engine.ready, not before; the status says what is going on."""
    one = service({"model": {"revision": "!load-slow 1"}}).start()

    assert one.show("ActiveState") == "active"
    one.until_log("engine.ready")
    assert until(lambda: one.show("StatusText").startswith("ready"), "the status")


def test_a_reload_keeps_the_engine_warm(service: MakeService) -> None:
    """The same engine process serves jobs under the new configuration."""
    one = service().start()
    (before,) = one.until_log("engine.starting")
    one.configure({"defaults": {"width": 128}})
    one.systemctl("reload")
    until(lambda: one.log("config.reloaded"), "the reload")
    one.drop("a.txt", "a cat\n")
    one.until_done("a")

    assert one.read("outbox/a/a-0001.json")["image"]["width"] == 128
    assert [entry["pid"] for entry in one.log("engine.starting")] == [before["pid"]]


def test_a_hung_daemon_is_killed_and_its_job_survives(service: MakeService) -> None:
    """Without WATCHDOG=1 systemd kills daemon and engine and starts anew; the image is rendered."""
    one = service({}, "WatchdogSec=1", "TimeoutAbortSec=1", "RestartSec=0").start()
    one.drop("a.txt", f"!wait {one.home}/go\n")
    one.until_begun()
    first = one.show("MainPID")
    one.machine.run("kill", "-STOP", first)
    one.machine.write(f"{one.home}/go", "")
    job = one.until_done("a")

    assert job["outcome"] == "done"
    assert one.show("MainPID") != first
    assert one.show("NRestarts") == "1"
    assert one.read("outbox/a/a-0001.json")["job"]["attempt"] == 1


def test_a_stop_in_the_middle_of_an_image(service: MakeService) -> None:
    """It ends in time with exit status 0 and puts the job back; the next start renders it."""
    one = service({"engine": {"stop_seconds": 1}}).start()
    one.drop("a.txt", "!slow 600 a cat\n")
    one.until_begun()
    began = time.monotonic()
    one.systemctl("stop")
    took = time.monotonic() - began
    left = one.machine.shell(
        f"ls {one.home}/spool/.promptdrop/pending {one.home}/spool/.promptdrop/active"
    )

    assert took < 60  # TimeoutStopSec
    assert (one.show("Result"), one.show("ExecMainStatus")) == ("success", "0")
    assert one.until_log("daemon.stopped")
    assert re.search(r"\d{8}T\d{12}-", left)


def test_a_start_that_keeps_failing_is_given_up(service: MakeService) -> None:
    """systemd starts it five times within an hour, then gives up; the journal has the reason."""
    one = service({"model": {"revision": "!load-raise"}}, "RestartSec=0")
    one.systemctl("start", check=False)
    until(lambda: one.show("ActiveState") == "failed", "the end of all tries")

    assert one.show("NRestarts") == "5"
    assert len(one.until_log("daemon.started", times=5)) == 5
    assert one.systemctl("start", check=False) != 0


def test_a_wrong_configuration_is_not_tried_again(service: MakeService) -> None:
    """The daemon exits 78, and systemd does not restart it."""
    one = service({}, "RestartSec=0")
    one.configure({"whatch": {}})
    one.systemctl("start", check=False)
    until(lambda: one.show("ActiveState") == "failed", "the failure")

    assert (one.show("ExecMainStatus"), one.show("NRestarts")) == ("78", "0")
    assert "did you mean 'watch'" in "".join(one.machine.journal(one.unit))


def test_a_second_daemon_is_not_tried_again(service: MakeService) -> None:
    """It exits 75 and is not restarted; the first one goes on."""
    one = service().start()
    other = service({"root": f"{one.home}/spool"}, "RestartSec=0", f"ReadWritePaths={one.home}")
    other.systemctl("start", check=False)
    until(lambda: other.show("ActiveState") == "failed", "the failure")

    assert (other.show("ExecMainStatus"), other.show("NRestarts")) == ("75", "0")
    assert one.show("ActiveState") == "active"


def test_an_engine_that_is_killed_does_not_stop_the_service(service: MakeService) -> None:
    """The daemon replaces it; OOMPolicy=continue: also where the kernel killed it for its memory."""
    one = service().start()
    main = one.show("MainPID")
    one.drop("a.txt", f"!wait {one.home}/go\n")
    one.until_begun()
    one.machine.run("kill", "-KILL", str(one.until_log("engine.starting")[0]["pid"]))
    one.machine.write(f"{one.home}/go", "")
    job = one.until_done("a")

    assert job["outcome"] == "done"
    assert (one.show("OOMPolicy"), one.show("MainPID")) == ("continue", main)
    assert len(one.until_log("engine.starting", times=2)) == 2


def test_the_journal_has_json_lines(service: MakeService) -> None:
    """Every line of a whole life is one JSON object with time, level and event."""
    one = service().start()
    one.drop("a.txt", "a cat\n")
    one.until_done("a")
    one.systemctl("stop")
    one.until_log("daemon.stopped")
    lines = [json.loads(line) for line in one.machine.journal(one.unit)]

    assert {"daemon.started", "engine.ready", "image.published", "daemon.stopped"} <= {
        line["event"] for line in lines
    }
    assert all({"timestamp", "level", "event"} <= line.keys() for line in lines)


def test_a_cluster_under_its_units(machine: Machine, service: MakeService) -> None:
    """docs/cluster.md on one machine, with head, token and cluster.conf, renders an image.

    The engine has no GPU here, so it asks for a core, which the head's own command does not offer.
    """
    pytest.importorskip("ray", reason="ray is not installed: pip install promptdrop[ray]")
    one = service({
        "model": {"device": "cpu"},
        "engine": {"backend": "ray"},
        "ray": {"address": "127.0.0.1:6379"},
    })  # fmt: skip
    ask = (
        *("runuser", "-u", "promptdrop", "--", "env"),
        *("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=/etc/promptdrop/ray.token"),
        *("RAY_TMPDIR=/run/promptdrop-ray", "/opt/promptdrop/.venv/bin/promptdrop", "cluster"),
    )
    machine.write("/etc/promptdrop/ray.env", "PROMPTDROP_ADDRESS=127.0.0.1\n")
    machine.shell(
        "umask 077; head -c 32 /dev/urandom | base64 -w0 > /etc/promptdrop/ray.token;"
        "chown promptdrop: /etc/promptdrop/ray.token;"
        f"cd {CHECKOUT}/systemd; install -m 644 promptdrop-ray-head.service /etc/systemd/system/;"
        f"install -D -m 644 cluster.conf /etc/systemd/system/{one.unit}.d/cluster.conf;"
        "sed -i s/--num-cpus=0/--num-cpus=1/ /etc/systemd/system/promptdrop-ray-head.service;"
        "systemctl daemon-reload"
    )
    try:
        machine.run("systemctl", "start", "promptdrop-ray-head")
        one.start()
        one.drop("a.txt", "a cat\n")
        job = one.until_done("a")
        status = one.read(".promptdrop/status.json")
        shown = machine.run(*ask, "status", "--config", one.config).stdout
        one.systemctl("stop")
        released = machine.run(*ask, "release", "--config", one.config)

        assert job["outcome"] == "done"
        assert status["engine"]["host"]
        assert "alive" in shown
        assert "engine-1" in shown
        assert "1 engine released" in released.stdout + released.stderr
        assert machine.show("promptdrop-ray-head.service", "ActiveState") == "active"
    finally:
        one.systemctl("stop", check=False)
        machine.run("systemctl", "stop", "promptdrop-ray-head", check=False)
