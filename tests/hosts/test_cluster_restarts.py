"""Engines stay warm for the daemon's next life, which finds them or gives them back."""

import shutil

import pytest

from clusters import Cluster, each_once, engine_processes, engines, prompts, settings
from harness import Daemon, MakeDaemon, until
from promptdrop.cluster import backend as cluster_module

pytest.importorskip("ray", reason="ray is not installed: pip install promptdrop[ray]")
pytestmark = pytest.mark.timeout(300)


def warm_on_two_hosts(cluster: Cluster, make_daemon: MakeDaemon) -> Daemon:
    """A daemon with a warm engine on each of two hosts."""
    cluster.add_host()
    cluster.add_host()
    daemon = make_daemon(settings(cluster))
    daemon.start()
    engines(daemon)
    return daemon


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


def test_what_an_engine_is_not_made_of_leaves_it_warm(
    cluster: Cluster, make_daemon: MakeDaemon
) -> None:
    """A restart with other timeouts keeps the engine process; another batch begins a new one at once."""
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
    """With `workers: auto`, engine-2 is found where it is though the host of engine-1 is lost."""
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


def test_spools_with_one_path_have_engines_of_their_own(make_daemon: MakeDaemon) -> None:
    """Machines may have the same name and paths, so each spool keeps the names of its engines."""
    names = []
    for _ in range(2):
        daemon = make_daemon()
        names += [cluster_module.actor_prefix(daemon.own) for _ in range(2)]
        shutil.rmtree(daemon.root)

    assert names[0] == names[1] != names[2] == names[3]
