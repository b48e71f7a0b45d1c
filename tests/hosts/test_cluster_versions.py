"""Hosts and engines of another promptdrop, and hosts that lack something, are named; others go on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clusters import Cluster, each_once, prompts, settings
from harness import REPOSITORY, Daemon, MakeDaemon
from promptdrop import __version__
from promptdrop.cluster import backend as cluster_module

pytest.importorskip("ray", reason="ray is not installed: pip install promptdrop[ray]")
pytestmark = pytest.mark.timeout(300)

PACKAGE = REPOSITORY / "daemon" / "promptdrop"


# The few parts of a package in the layout of 0.1.0 that a daemon of today meets.
OLD_INIT = '__version__ = "0.1.0"'
OLD_HOST = """
import os, socket
from dataclasses import dataclass
from promptdrop import __version__

@dataclass(frozen=True, slots=True)
class Host:
    name: str
    pid: int
    version: str

class EngineHost:
    def hello(self):
        return Host(socket.gethostname(), os.getpid(), __version__)
"""
LEAVE_ACTOR = """
import sys, ray
from promptdrop.ray_host import EngineHost

ray.init(address=sys.argv[1], namespace="promptdrop", log_to_driver=False)
actor = ray.remote(EngineHost).options(name=sys.argv[2], lifetime="detached", num_cpus=1).remote()
print(ray.get(actor.hello.remote()).version)
"""


def install_old(folder: Path) -> None:
    """Write the parts of promptdrop 0.1.0 that a daemon meets on a host."""
    package = folder / "promptdrop"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(OLD_INIT)
    (package / "ray_host.py").write_text(OLD_HOST)


def install_other(folder: Path) -> None:
    """Copy the package as it is, but for its version."""
    shutil.copytree(PACKAGE, folder / "promptdrop")
    (folder / "promptdrop" / "version.py").write_text('__version__ = "0.0.9"\n')


def leave_actor(cluster: Cluster, daemon: Daemon, site: Path) -> None:
    """Leave the warm actor of a daemon that was installed in `site`."""
    name = f"{cluster_module.actor_prefix(daemon.own)}-1"
    command = [sys.executable, "-c", LEAVE_ACTOR, cluster.address, name]
    environment = {**os.environ, "PYTHONPATH": str(site)}

    said = subprocess.check_output(command, env=environment, text=True)
    assert "0.1.0" in said.splitlines()  # Ray may tell of hosts that earlier tests took away


@pytest.mark.parametrize(("install", "version"), [(install_other, "0.0.9"), (install_old, "0.1.0")])
def test_a_host_of_another_version_is_refused_by_name(
    cluster: Cluster,
    make_daemon: MakeDaemon,
    tmp_path: Path,
    install: Callable[[Path], None],
    version: str,
) -> None:
    """It renders nothing; the daemon says which host has which version, and others go on."""
    install(tmp_path / "other")
    cluster.add_host(PYTHONPATH=str(tmp_path / "other"))
    cluster.add_host()
    daemon = make_daemon(settings(cluster))
    daemon.start()
    refused = daemon.until_log("engine.not_started")
    lost = daemon.until_log("engine.lost")
    daemon.drop("a.jsonl", prompts(*["a cat"] * 4))
    each_once(daemon, "a", 4)

    for reason in (refused["reason"], lost["how"]):
        assert f"runs promptdrop {version}, this daemon {__version__}" in reason
    assert daemon.stop() == 0


def test_an_engine_that_a_daemon_of_0_1_0_has_left_is_replaced(
    cluster: Cluster, make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """Its host was upgraded; the daemon says which version it met, ends it, and renders."""
    daemon = make_daemon(settings(cluster, workers=1))
    installed = tmp_path / "site" / "promptdrop"
    install_old(tmp_path / "site")
    cluster.add_host(PYTHONPATH=str(tmp_path / "site"))
    leave_actor(cluster, daemon, tmp_path / "site")
    shutil.rmtree(installed)
    installed.symlink_to(PACKAGE)
    daemon.start()
    refused = daemon.until_log("engine.not_started")
    daemon.drop("a.txt", "a cat\n")
    each_once(daemon, "a", 1)

    assert f"runs promptdrop 0.1.0, this daemon {__version__}" in refused["reason"]
    assert len(daemon.log("engine.not_started")) == 1
    assert daemon.stop() == 0


def test_a_release_ends_what_a_daemon_of_0_1_0_has_left(
    cluster: Cluster, make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """`cluster release` needs no engine to understand it."""
    daemon = make_daemon(settings(cluster, workers=1))
    install_old(tmp_path / "site")
    cluster.add_host(PYTHONPATH=str(tmp_path / "site"))
    leave_actor(cluster, daemon, tmp_path / "site")

    assert daemon.run("cluster", "release").stdout == "1 engine released\n"
    assert daemon.run("cluster", "release").stdout == "0 engines released\n"


def test_a_host_whose_package_is_broken_is_left_in_peace(
    cluster: Cluster, make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """Its engine is tried a few times, then every 30 s; the status says why."""
    broken = tmp_path / "old"
    shutil.copytree(PACKAGE, broken / "promptdrop")
    (broken / "promptdrop" / "cluster" / "host.py").unlink()
    cluster.add_host(PYTHONPATH=str(broken))
    daemon = make_daemon(settings(cluster, workers=1))
    daemon.start()
    refused = daemon.until_log("engine.not_started")
    lives = len(daemon.log("engine.starting"))

    assert "promptdrop.cluster.host" in refused["reason"]
    assert lives <= 5
    assert daemon.stop() == 0


def test_a_host_without_the_model_is_named_and_others_go_on(
    cluster: Cluster, make_daemon: MakeDaemon, model: Path, tmp_path: Path
) -> None:
    """Hosts need the model's files and no share; one without them says which command fetches them."""
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
