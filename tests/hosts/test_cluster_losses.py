"""Hosts, actors, the gateway and the head are lost: nobody is charged, and others take over."""

import os
import resource
import signal
import time
from pathlib import Path

import psutil
import pytest

import clusters
from clusters import Cluster, attempts, each_once, prompts, settings
from harness import MakeDaemon, until
from promptdrop import config_file
from promptdrop.cluster import backend as cluster_module
from promptdrop.pool import pool

pytest.importorskip("ray", reason="ray is not installed: pip install promptdrop[ray]")
pytestmark = pytest.mark.timeout(300)


def test_a_host_that_is_lost_charges_nobody_and_another_takes_over(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """If a host is killed and a new one added, every image is rendered once, at its first attempt."""
    first = cluster.add_host()
    daemon = make_daemon(settings(cluster, workers="auto"))
    daemon.start().until_ready()
    daemon.drop("a.jsonl", prompts(*["!slow 0.1 a cat"] * 12))
    until(lambda: len(daemon.published()) >= 2, "two images")
    first.kill()
    daemon.until_log("engine.lost")
    cluster.add_host()
    each_once(daemon, "a", 12)

    assert attempts(daemon, "a") == [1] * 12
    assert daemon.log("image.failed") == []
    assert daemon.stop() == 0


def test_an_image_that_hosts_die_of_fails_in_the_end(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """No attempt is charged for a lost actor, but after ten losses in a row the image in hand fails."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1))
    daemon.start()
    daemon.drop("a.txt", "!slow 5 a cat\n")
    daemon.until_begun()
    daemon.until_log("engine.placed")
    assert daemon.process
    daemon.process.kill()
    daemon.process.wait()
    (begun,) = daemon.own.glob("active/*/0001.begun")
    begun.write_text('{"attempts": 0, "deaths": 8}')
    daemon.start()
    for life in (2, 3):
        pid = daemon.until_log("engine.placed", times=life)["pid"]
        daemon.until_status(
            "the image in hand", lambda s, pid=pid: s["current"] and s["engine"]["pid"] == pid
        )
        os.kill(pid, signal.SIGKILL)
    daemon.drop("b.txt", "a dog\n")

    assert "hosts were lost" in daemon.error("a.txt")["error"]
    assert daemon.job("b")["outcome"] == "done"
    assert daemon.log("image.failed") == []
    assert daemon.stop() == 0


def test_an_actor_that_is_stopped_is_replaced(cluster: Cluster, make_daemon: MakeDaemon) -> None:
    """A host's process that does not answer is given up; an engine that waits for a host says so once."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster))
    daemon.start()
    pid = daemon.until_log("engine.placed")["pid"]
    daemon.until_log("engine.ready")
    assert daemon.process
    daemon.process.kill()
    daemon.process.wait()
    os.kill(pid, signal.SIGSTOP)
    daemon.start()
    daemon.until_log("engine.ready", times=2)
    daemon.drop("a.txt", "a cat\n")
    each_once(daemon, "a", 1)
    waiting = [line["stage"] for line in daemon.log("engine.stage") if "core" in line["stage"]]

    assert daemon.log("engine.placed")[-1]["pid"] != pid
    assert len(waiting) <= 4  # two engines, two lives of the daemon
    assert daemon.stop() == 0


def test_an_actor_out_of_descriptors_is_replaced(cluster: Cluster, make_daemon: MakeDaemon) -> None:
    """An unknown error in its keeper ends it: an engine that nobody keeps would be waited for."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1))
    daemon.start()
    pid = daemon.until_log("engine.placed")["pid"]
    daemon.until_ready()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))
    daemon.drop("a.jsonl", prompts("a cat", "a dog"))
    each_once(daemon, "a", 2)

    assert daemon.log("engine.placed")[-1]["pid"] != pid
    assert attempts(daemon, "a") == [1, 1]
    assert daemon.stop() == 0


def test_a_gateway_that_is_stopped_is_replaced(cluster: Cluster, make_daemon: MakeDaemon) -> None:
    """A gateway that hangs is replaced by another, and no image is charged."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1, image_timeout_seconds=600))
    daemon.start().until_ready()
    daemon.drop("a.jsonl", prompts(*["!slow 0.3 a cat"] * 3))
    daemon.until_begun()
    assert daemon.process
    (gateway,) = [
        child
        for child in psutil.Process(daemon.process.pid).children()
        if "promptdrop.cluster.gateway" in child.cmdline()
    ]
    gateway.suspend()
    daemon.until_log("cluster.lost")
    each_once(daemon, "a", 3)

    assert attempts(daemon, "a") == [1] * 3
    assert not gateway.is_running()
    assert daemon.stop() == 0


@pytest.mark.parametrize("first", ["daemon", "gateway"])
def test_a_service_that_was_frozen_keeps_its_cluster(
    cluster: Cluster, make_daemon: MakeDaemon, first: str
) -> None:
    """Daemon and gateway are stopped for longer than either waits for a sign of life; whoever goes on
    first, nothing is lost."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1, image_timeout_seconds=600))
    daemon.start().until_ready()
    go = daemon.home / "go"
    daemon.drop("a.jsonl", prompts(f"!wait {go}", "a cat"))
    daemon.until_begun()
    assert daemon.process
    process = psutil.Process(daemon.process.pid)
    both = [
        process,
        *(c for c in process.children() if "promptdrop.cluster.gateway" in c.cmdline()),
    ]
    for one in both:
        one.suspend()
    time.sleep(cluster_module.SILENCE_SECONDS + 3)
    for one in both if first == "daemon" else reversed(both):
        one.resume()
    daemon.until_log("daemon.stood_still")
    go.touch()
    each_once(daemon, "a", 2)

    assert attempts(daemon, "a") == [1, 1]
    assert daemon.log("cluster.lost") + daemon.log("engine.lost") == []
    assert len(daemon.log("engine.placed")) == 1
    assert daemon.stop() == 0


def test_a_daemon_without_its_cluster_goes_on_accepting(
    own_cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """While head and hosts are killed, drops are claimed and the status says why; then work goes on."""
    cluster = own_cluster
    host = cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1))
    daemon.start().until_ready()
    daemon.drop("a.jsonl", prompts(*["!slow 0.2 a cat"] * 6))
    until(daemon.published, "the first image")
    assert cluster.head
    cluster.head.kill()
    host.kill()
    status = daemon.until_status("no cluster", lambda s: "Ray cluster" in str(s["reason"]))
    daemon.drop("b.txt", "a dog\n")
    daemon.until_log("job.claimed", times=2)
    cluster.start_head()
    cluster.add_host()
    each_once(daemon, "a", 6)
    each_once(daemon, "b", 1)

    assert status["state"] == "waiting"
    assert cluster.address in status["reason"]
    assert attempts(daemon, "a") == [1] * 6
    assert daemon.stop() == 0


def test_a_start_without_a_cluster_waits_for_it(make_daemon: MakeDaemon) -> None:
    """If no head answers, the daemon runs, claims and says so; a drain exits 1 with that reason."""
    address = f"127.0.0.1:{clusters.free_port()}"
    changes = {"model": {"device": "cpu"}, "engine": {"backend": "ray"}}
    daemon = make_daemon({**changes, "ray": {"address": address}})
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    status = daemon.until_status("no cluster", lambda s: address in str(s["reason"]))
    daemon.until_log("job.claimed")

    assert status["state"] == "waiting"
    assert daemon.stop() == 0
    assert f"cannot drain: the Ray cluster at {address} cannot be reached" in daemon.drain().stderr


def test_who_has_no_way_into_the_cluster_sleeps(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """No engine is due while none may begin: the daemon does not spin until the head is back."""
    address = f"127.0.0.1:{clusters.free_port()}"
    daemon = make_daemon(settings(Cluster(tmp_path, int(address.rpartition(":")[2]))))
    loaded = config_file.load(daemon.config)
    engines = pool.Pool(loaded, cluster_module.RayCluster(loaded))
    now = time.monotonic()
    try:
        list(engines.hear(now, may_start=True))

        assert len(engines.slots) == 2
        assert engines.next_deadline() > now
    finally:
        engines.close()
