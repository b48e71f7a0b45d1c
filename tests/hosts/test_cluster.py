"""`engine.backend: ray`: engines on the hosts of a real cluster, under the one supervision."""

import json
import os
import signal
import subprocess
import sys

import pytest

import clusters
from clusters import Cluster, attempts, each_once, engine_processes, prompts, settings
from harness import MakeDaemon, until

pytest.importorskip("ray", reason="ray is not installed: pip install promptdrop[ray]")
pytestmark = pytest.mark.timeout(300)


def test_two_hosts_render_at_once_and_a_drain_gives_them_back(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """Each sidecar names engine and host; a daemon that has drained leaves no engine behind."""
    cluster.add_host()
    cluster.add_host()
    daemon = make_daemon(settings(cluster))
    daemon.drop("a.jsonl", prompts(*["!slow 0.2 a cat"] * 8))
    done = daemon.drain()
    who = [sidecar["device"]["engine"] for sidecar in daemon.sidecars("a")]

    assert done.returncode == 0, done.stderr
    each_once(daemon, "a", 8)
    assert set(who) == {"engine-1", "engine-2"}
    assert all(sidecar["device"]["host"] for sidecar in daemon.sidecars("a"))
    until(lambda: not engine_processes(cluster), "the end of all engines")


def test_the_same_pixels_as_on_one_machine(cluster: Cluster, make_daemon: MakeDaemon) -> None:
    """The same prompt, seed and engine give the same bytes on a cluster."""
    cluster.add_host()
    text = json.dumps({"prompt": "a cat", "seed": 7})
    remote, local = make_daemon(settings(cluster, workers=1)), make_daemon(home="local")
    for daemon in (remote, local):
        daemon.drop("a.json", text)
        assert daemon.drain().returncode == 0
    (one,), (other,) = remote.sidecars("a"), local.sidecars("a")

    assert one["image"]["sha256"] == other["image"]["sha256"]


def test_images_are_rendered_together_on_other_hosts(
    make_daemon: MakeDaemon, cluster: Cluster
) -> None:
    """`engine.batch` holds for each engine, which waits there, too, for images sent together."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1, batch=4))
    daemon.start().until_ready()
    daemon.drop("a.jsonl", prompts(*["a cat"] * 8))

    each_once(daemon, "a", 8)
    assert [sidecar["batch"] for sidecar in daemon.sidecars("a")] == [4] * 8
    assert daemon.stop() == 0


@pytest.mark.parametrize("fault", ["segfault", "crash", "unknown", "hang-gil", "stop", "garbage"])
def test_a_sick_engine_costs_its_image_and_no_other(
    cluster: Cluster, make_daemon: MakeDaemon, fault: str
) -> None:
    """As on one machine, an image may cost max_attempts engines; then it alone fails."""
    cluster.add_host()
    cluster.add_host()
    bounds = {"image_timeout_seconds": 1, "kill_grace_seconds": 0.5, "max_attempts": 2}
    daemon = make_daemon(settings(cluster, **bounds))
    daemon.drop("a.jsonl", prompts(f"!{fault}", *["a cat"] * 5))
    done = daemon.drain()
    job = daemon.job("a")

    assert done.returncode == 0, done.stderr
    assert [image["outcome"] for image in job["images"]] == ["failed", *["rendered"] * 5]
    assert "attempt 2 of 2" in job["images"][0]["error"]
    assert attempts(daemon, "a") == [1] * 5
    assert daemon.log("engine.lost") == []


def test_engines_are_unloaded_though_others_wait_for_a_host(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """An engine that waits for a host does not keep others loaded; the next drop has both begin again."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers="auto", unload_after_seconds=0.5))
    daemon.start()
    daemon.until_log("engine.unloaded", times=2)
    until(lambda: not engine_processes(cluster), "the end of all engines")
    daemon.drop("a.txt", "a cat\n")
    each_once(daemon, "a", 1)

    assert daemon.log("engine.died") == daemon.log("engine.unkillable") == []
    assert daemon.stop() == 0


def test_any_number_of_engines_begin_at_once(own_cluster: Cluster, make_daemon: MakeDaemon) -> None:
    """If there are more than the socket to the gateway takes at once, each still begins, without an error.

    They stop waiting when the daemon ends: a host that comes then is free for another daemon.
    """
    daemon = make_daemon(settings(own_cluster, workers=64))
    other = make_daemon(settings(own_cluster, workers=1), home="other")
    daemon.start()
    daemon.until_log("engine.stage", times=64)

    assert daemon.log("engine.not_started") == []
    assert daemon.stop() == 0
    own_cluster.add_host()
    other.start().until_ready()
    assert other.stop() == 0


def test_what_is_asked_for_once_leaves_no_engine_behind(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """`generate` without a daemon uses the cluster, and gives the device back even if it is killed."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1))
    done = daemon.run("generate", "a cat", "-o", "cat.png")

    assert done.returncode == 0, done.stderr
    assert (daemon.home / "cat.png").exists()
    until(lambda: not engine_processes(cluster), "the end of its engine")
    killed = subprocess.Popen(daemon.command("generate", "!slow 30 a cat"), cwd=daemon.home)
    until(lambda: engine_processes(cluster), "an engine")
    killed.kill()
    killed.wait()
    until(lambda: not engine_processes(cluster), "the end of the other engine")


def test_the_daemon_imports_no_ray() -> None:
    """Only the gateway imports ray; without a cluster nothing does."""
    code = (
        "import sys, promptdrop.cli.main, promptdrop.supervisor.supervisor, promptdrop.cluster.backend, promptdrop.engines.worker;"
        "import promptdrop.cluster.host; print('ray' in sys.modules)"
    )

    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_status_shows_the_cluster(cluster: Cluster, make_daemon: MakeDaemon) -> None:
    """`cluster status`: hosts, their GPUs and cores, engines and what each renders."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1))
    daemon.start().until_ready()
    go = daemon.home / "go"
    daemon.drop("a.txt", f"!wait {go}\n")
    daemon.until_begun()
    daemon.until_status("the image in hand", lambda status: status["current"])
    done = daemon.run("cluster", "status")
    go.touch()
    os.kill(engine_processes(cluster)[0].pid, signal.SIGKILL)

    assert done.returncode == 0, done.stderr
    assert "alive" in done.stdout
    assert "engine-1" in done.stdout
    assert "a.txt 1/1" in done.stdout
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_a_host_that_came_back_is_shown_once(cluster: Cluster, make_daemon: MakeDaemon) -> None:
    """Ray remembers every life of a host; `cluster status` shows the living one."""
    cluster.add_host()
    first = cluster.add_host()
    daemon = make_daemon(settings(cluster))

    def rows() -> list[str]:
        return [line.split("\t")[2] for line in daemon.run("cluster", "status").stdout.splitlines()]

    before = rows()
    first.kill()
    until(lambda: len(rows()) < len(before), "the host's end")
    after = rows()

    assert "dead" not in before + after
    assert after == before[:-1]


def test_doctor_asks_for_the_head(cluster: Cluster, make_daemon: MakeDaemon) -> None:
    """It does not look for the model, which hosts have, but says if no head answers."""
    there = make_daemon(settings(cluster))
    address = f"127.0.0.1:{clusters.free_port()}"
    nowhere = make_daemon({**settings(cluster), "ray": {"address": address}}, home="nowhere")
    good, bad = there.run("doctor"), nowhere.run("doctor")

    assert f"{cluster.address} answers" in good.stdout
    assert good.returncode == 0, good.stdout
    assert f"{address}: no head answers: [Errno 111] Connection refused" in bad.stdout
    assert bad.returncode == 1
