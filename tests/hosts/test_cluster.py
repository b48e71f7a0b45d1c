"""`engine.backend: ray`: engines on the hosts of a real cluster, under the one supervision."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import clusters
from clusters import Cluster, attempts, each_once, prompts
from harness import REPOSITORY, Daemon, MakeDaemon, until
from promptdrop import __version__, config_file
from promptdrop.cluster import backend as cluster_module
from promptdrop.pool import pool

pytest.importorskip("ray", reason="ray is not installed: pip install promptdrop[ray]")
pytestmark = pytest.mark.timeout(300)

PACKAGE = REPOSITORY / "daemon" / "promptdrop"


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """A head that all tests share but those that kill it."""
    with clusters.running() as cluster:
        yield cluster


@pytest.fixture
def cluster(head: Cluster) -> Iterator[Cluster]:
    """The hosts are the test's own."""
    yield head
    head.kill_hosts()


def settings(cluster: Cluster, **engine: Any) -> dict[str, Any]:
    """A daemon's settings for this cluster, with engines that need no GPU."""
    return {
        "model": {"device": "cpu"},
        "engine": {"backend": "ray", "workers": 2, **engine},
        "ray": {"address": cluster.address},
    }


def engines(daemon: Daemon) -> list[dict[str, Any]]:
    """Of the status, once both have a host."""
    return list(
        daemon.until_status(
            "two warm engines", lambda s: [e["state"] for e in s["engines"]] == ["ready"] * 2
        )["engines"]
    )


def engine_processes(cluster: Cluster) -> list[psutil.Process]:
    """The engine processes on the cluster's hosts, whose actors' environment names its folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if "promptdrop.engines.worker" in process.cmdline() and str(cluster.folder) in (
                process.environ().get("RAY_TMPDIR", "")
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def warm_on_two_hosts(cluster: Cluster, make_daemon: MakeDaemon) -> Daemon:
    """A daemon with an engine on each."""
    cluster.add_host()
    cluster.add_host()
    daemon = make_daemon(settings(cluster))
    daemon.start()
    engines(daemon)
    return daemon


def test_two_hosts_render_at_once_and_a_drain_gives_them_back(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """Each image names its engine and host; the daemon that is done leaves no engine behind."""
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
    """The transport changes nothing: same prompt, seed and engine, same bytes."""
    cluster.add_host()
    text = json.dumps({"prompt": "a cat", "seed": 7})
    remote, local = make_daemon(settings(cluster, workers=1)), make_daemon(home="local")
    for daemon in (remote, local):
        daemon.drop("a.json", text)
        assert daemon.drain().returncode == 0
    (one,), (other,) = remote.sidecars("a"), local.sidecars("a")

    assert one["image"]["sha256"] == other["image"]["sha256"]


@pytest.mark.parametrize("fault", ["segfault", "crash", "unknown", "hang-gil", "stop", "garbage"])
def test_a_sick_engine_costs_its_image_and_no_other(
    cluster: Cluster, make_daemon: MakeDaemon, fault: str
) -> None:
    """The same charging rule as on one machine: max_attempts engines, then that image alone fails."""
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


def test_a_host_that_is_lost_charges_nobody_and_another_takes_over(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """SIGKILL of a whole host in the middle, a new one added: every image once, first attempt."""
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


def test_engines_stay_warm_when_the_daemon_is_killed(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """A new daemon finds the same engine processes, and what was in hand is rendered once more."""
    daemon = warm_on_two_hosts(cluster, make_daemon)
    before = {process.pid for process in engine_processes(cluster)}
    daemon.drop("a.jsonl", prompts(*["!slow 0.2 a cat"] * 6))
    daemon.until_begun()
    assert daemon.process
    daemon.process.kill()
    daemon.process.wait()
    daemon.start()
    each_once(daemon, "a", 6)
    after = {process.pid for process in engine_processes(cluster)}

    assert len(before) == 2
    assert after == before
    assert daemon.stop() == 0
    assert {
        process.pid for process in engine_processes(cluster)
    } == before  # a stop keeps them, too


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A cluster whose head may be killed."""
    with clusters.running() as cluster:
        yield cluster


def test_a_daemon_without_its_cluster_goes_on_accepting(
    own_cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """The head and all hosts are killed: drops are claimed, status says why; with them it goes on."""
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
    """Nothing answers there: the daemon runs, claims, says so; a drain exits 1 with that."""
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


def test_a_host_of_another_version_is_refused_by_name(
    cluster: Cluster, make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """It renders nothing; the daemon says which host has which version, and others go on."""
    other = tmp_path / "other"
    shutil.copytree(PACKAGE, other / "promptdrop")
    init = other / "promptdrop" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{__version__}"', '"0.0.9"'))
    cluster.add_host(PYTHONPATH=str(other))
    cluster.add_host()
    daemon = make_daemon(settings(cluster))
    daemon.start()
    refused = daemon.until_log("engine.not_started")
    daemon.drop("a.jsonl", prompts(*["a cat"] * 4))
    each_once(daemon, "a", 4)

    assert f"runs promptdrop 0.0.9, this daemon {__version__}" in refused["reason"]
    assert daemon.stop() == 0


def test_a_host_without_the_model_is_named_and_others_go_on(
    cluster: Cluster, make_daemon: MakeDaemon, model: Path, tmp_path: Path
) -> None:
    """Workers need the model's files and no share; who has none says which command fetches them."""
    there = tmp_path / "with" / "models" / "demo--zimage" / "snapshots" / "master"
    there.parent.mkdir(parents=True)
    there.symlink_to(model)
    cluster.add_host(MODELSCOPE_CACHE=str(tmp_path / "with"))
    cluster.add_host(MODELSCOPE_CACHE=str(tmp_path / "without"))
    daemon = make_daemon(settings(cluster, compile="off"))
    daemon.write_config({"model": {"id": "demo/zimage"}, "defaults": {"width": 128, "height": 128}})
    daemon.start()
    refused = daemon.until_log("engine.not_started")
    daemon.drop("a.txt", "a red circle\n")
    each_once(daemon, "a", 1)

    assert "promptdrop model fetch demo/zimage" in refused["reason"]
    assert daemon.stop() == 0


def test_the_daemon_imports_no_ray() -> None:
    """Only the gateway does: the single-machine path has nothing to do with it."""
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
    daemon.drop("a.txt", "!slow 1 a cat\n")
    daemon.until_begun()
    until(lambda: daemon.status()["current"], "a status with the image")
    done = daemon.run("cluster", "status")
    os.kill(engine_processes(cluster)[0].pid, signal.SIGKILL)

    assert done.returncode == 0, done.stderr
    assert "alive" in done.stdout
    assert "engine-1" in done.stdout
    assert "a.txt 1/1" in done.stdout
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_images_are_rendered_together_on_other_hosts(
    make_daemon: MakeDaemon, cluster: Cluster
) -> None:
    """`engine.batch` is each engine's; what follows at once is waited for there too."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1, batch=4))
    daemon.start().until_ready()
    daemon.drop("a.jsonl", prompts(*["a cat"] * 8))

    each_once(daemon, "a", 8)
    assert [sidecar["batch"] for sidecar in daemon.sidecars("a")] == [4] * 8
    assert daemon.stop() == 0


def test_doctor_asks_for_the_head(cluster: Cluster, make_daemon: MakeDaemon) -> None:
    """Models are the hosts' own business; that nobody answers is said before the night."""
    there = make_daemon(settings(cluster))
    address = f"127.0.0.1:{clusters.free_port()}"
    nowhere = make_daemon({**settings(cluster), "ray": {"address": address}}, home="nowhere")
    good, bad = there.run("doctor"), nowhere.run("doctor")

    assert f"{cluster.address} answers" in good.stdout
    assert good.returncode == 0, good.stdout
    assert f"{address}: no head answers: [Errno 111] Connection refused" in bad.stdout
    assert bad.returncode == 1


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


def test_what_an_engine_is_not_made_of_leaves_it_warm(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """A restart with other timeouts finds the same process; with another batch, a new one, at once."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1))
    daemon.start().until_ready()
    (first,) = engine_processes(cluster)
    assert daemon.stop() == 0
    daemon.write_config({"engine": {"load_timeout_seconds": 800}, "log": {"level": "debug"}})
    daemon.start()
    daemon.until_log("engine.ready", times=2)
    (second,) = engine_processes(cluster)
    assert daemon.stop() == 0
    daemon.write_config({"engine": {"batch": 2}})
    daemon.start()
    daemon.until_log("engine.ready", times=3)
    (third,) = engine_processes(cluster)

    assert first == second
    assert third != first
    assert daemon.log("engine.died") == daemon.log("engine.not_started") == []
    assert daemon.stop() == 0


def test_a_new_life_finds_warm_engines_of_any_number(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """`workers: auto`, and the host of engine-1 is lost: engine-2 is found where it is."""
    first = cluster.add_host()
    daemon = make_daemon(settings(cluster, workers="auto"))
    daemon.start()
    daemon.until_log("engine.ready", engine="engine-1")
    cluster.add_host()
    daemon.until_log("engine.ready", engine="engine-2")
    first.kill()
    daemon.until_log("engine.lost", engine="engine-1")
    (warm,) = until(
        lambda: (found := engine_processes(cluster)) and len(found) == 1 and found,
        "one engine process",
    )
    assert daemon.stop() == 0
    daemon.start()
    daemon.until_log("engine.ready", times=2, engine="engine-2")

    assert engine_processes(cluster) == [warm]
    assert daemon.stop() == 0


def test_an_actor_that_is_stopped_is_replaced(cluster: Cluster, make_daemon: MakeDaemon) -> None:
    """A host's process that no longer answers is known to be hung; who waits for a host says so once."""
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
    """An error that its keeper does not know ends it, instead of leaving an engine with nobody to keep it."""
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
    """The way into the cluster hangs: another is opened, and nobody is charged."""
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


def test_a_host_whose_package_has_no_actor_is_left_in_peace(
    cluster: Cluster, make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """An installation from before there were clusters: tried a few times, then every 30 s; status says why."""
    old = tmp_path / "old"
    shutil.copytree(PACKAGE, old / "promptdrop")
    (old / "promptdrop" / "ray_host.py").unlink()
    cluster.add_host(PYTHONPATH=str(old))
    daemon = make_daemon(settings(cluster, workers=1))
    daemon.start()
    refused = daemon.until_log("engine.not_started")
    lives = len(daemon.log("engine.starting"))

    assert "ray_host" in refused["reason"]
    assert lives <= 5
    assert daemon.stop() == 0


def test_fewer_workers_and_a_release_give_devices_back(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """A new life with fewer `workers` ends the others; `cluster release` ends what a stopped daemon left."""
    daemon = warm_on_two_hosts(cluster, make_daemon)
    assert daemon.stop() == 0
    assert len(engine_processes(cluster)) == 2
    daemon.write_config({"engine": {"workers": 1}})
    daemon.start()
    daemon.until_log("engine.ready", times=3)
    until(lambda: len(engine_processes(cluster)) == 1, "the end of the other engine")
    refused = daemon.run("cluster", "release")
    assert daemon.stop() == 0
    done = daemon.run("cluster", "release")

    assert refused.returncode == 2
    assert done.stderr + done.stdout == "1 engine released\n"
    until(lambda: not engine_processes(cluster), "the end of all engines")


def test_engines_are_unloaded_though_others_wait_for_a_host(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """Who waits for a host is not on its way; the next drop has both begin again."""
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
    """More than the way to the gateway takes in one go: each waits for a host, none is an error.

    With the daemon they wait no more: a host that comes then is free for another daemon's engine.
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


def test_spools_with_one_path_have_engines_of_their_own(make_daemon: MakeDaemon) -> None:
    """Machines may share a name and a path; a spool keeps its engines' names."""
    names = []
    for _ in range(2):
        daemon = make_daemon()
        names += [cluster_module.actor_prefix(daemon.own) for _ in range(2)]
        shutil.rmtree(daemon.root)

    assert names[0] == names[1] != names[2] == names[3]


def test_an_image_that_hosts_die_of_fails_in_the_end(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """Nobody is charged for a lost actor, but not for ever: after ten losses in a row with it in hand."""
    cluster.add_host()
    daemon = make_daemon(settings(cluster, workers=1))
    daemon.start()
    daemon.drop("a.txt", "!slow 5 a cat\n")
    daemon.until_begun()
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
