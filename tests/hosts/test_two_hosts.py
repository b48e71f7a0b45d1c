"""Two hosts for real: network namespaces with names and addresses of their own, and a token."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clusters import Cluster, attempts, each_once, prompts
from harness import Daemon, until

pytest.importorskip("ray", reason="ray is not installed: pip install promptdrop[ray]")
pytestmark = pytest.mark.timeout(300)

HEAD, WORKER = "10.77.0.1", "10.77.0.2"
PORT = 6379  # a namespace has all ports to itself


@dataclass
class Network:
    """Two namespaces joined by a cable. `enter(n)` is the command that runs what follows there."""

    tag: str = field(default_factory=lambda: os.urandom(3).hex())

    def start(self) -> None:
        """Raises CalledProcessError: namespaces cannot be made here."""
        a, b = f"pd{self.tag}a", f"pd{self.tag}b"
        for name in (a, b):
            _ip("netns", "add", name)
        _ip("link", "add", f"v{self.tag}a", "netns", a, "type", "veth",
            "peer", "name", f"v{self.tag}b", "netns", b)  # fmt: skip
        for name, end, address in ((a, "a", HEAD), (b, "b", WORKER)):
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", f"v{self.tag}{end}")
            _ip("-n", name, "link", "set", f"v{self.tag}{end}", "up")

    def enter(self, host: str) -> tuple[str, ...]:
        """Return the command that enters a host's namespace, in which it has its own name, too."""
        inside = f'hostname pd-{host}; exec "$@"'
        return ("ip", "netns", "exec", f"pd{self.tag}{host}", "unshare", "--uts", "sh", "-c", inside, "-")  # fmt: skip

    def stop(self) -> None:
        """Nothing stays."""
        for end in "ab":
            subprocess.run(["ip", "netns", "delete", f"pd{self.tag}{end}"], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    """Two hosts, or the reason why there are none."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("iproute2 or util-linux is not installed")
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    network = Network()
    try:
        network.start()
    except subprocess.CalledProcessError as e:
        network.stop()
        pytest.skip(f"no network namespaces here: {e.stderr.decode().strip()}")
    yield network
    network.stop()


@pytest.fixture
def cluster(network: Network, tmp_path: Path) -> Iterator[Cluster]:
    """A head on one host, with a token."""
    token = tmp_path / "ray.token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    folder = Path(tempfile.mkdtemp(prefix="pd-ray-"))
    cluster = Cluster(folder, PORT, environment=secret, node_ip=HEAD)
    try:
        cluster.start_head(prefix=network.enter("a"))
        yield cluster
    finally:
        cluster.close()


def daemon_there(network: Network, cluster: Cluster, make_daemon: Any, token: str = "") -> Daemon:
    """A daemon on the head's host, with the cluster's token or another."""
    daemon: Daemon = make_daemon({
        "model": {"device": "cpu"},
        "engine": {"backend": "ray", "workers": 2},
        "ray": {"address": cluster.address},
    })  # fmt: skip
    env = {**cluster.environment, "RAY_TMPDIR": str(cluster.folder)}
    if token:
        env["RAY_AUTH_TOKEN_PATH"] = token
    return daemon.start(env=env, wrapper=[*network.enter("a"), *daemon.command()[:3]])


def test_two_hosts_share_the_work(network: Network, cluster: Cluster, make_daemon: Any) -> None:
    """One host renders beside the head and one across the network, each named in its sidecars."""
    cluster.add_host(prefix=network.enter("a"), ip=HEAD)
    cluster.add_host(prefix=network.enter("b"), ip=WORKER)
    daemon = daemon_there(network, cluster, make_daemon)
    daemon.until_log("engine.ready", times=2)
    daemon.drop("a.jsonl", prompts(*["!slow 0.2 a cat"] * 10))
    each_once(daemon, "a", 10)
    hosts = [sidecar["device"]["host"] for sidecar in daemon.sidecars("a")]

    assert set(hosts) == {"pd-a", "pd-b"}
    assert attempts(daemon, "a") == [1] * 10
    assert min(hosts.count("pd-a"), hosts.count("pd-b")) >= 3
    assert daemon.stop() == 0


def test_a_cable_that_is_cut_loses_nothing(
    network: Network, cluster: Cluster, make_daemon: Any
) -> None:
    """A host from which no packet comes is given up; images that it had in hand are rendered here."""
    cluster.add_host(prefix=network.enter("a"), ip=HEAD)
    cluster.add_host(prefix=network.enter("b"), ip=WORKER)
    daemon = daemon_there(network, cluster, make_daemon)
    daemon.until_log("engine.ready", times=2)
    daemon.drop("a.jsonl", prompts(*["!slow 0.5 a cat"] * 8))
    until(lambda: len(daemon.published()) >= 2, "two images")
    _ip("-n", f"pd{network.tag}b", "link", "set", f"v{network.tag}b", "down")
    each_once(daemon, "a", 8)

    assert attempts(daemon, "a") == [1] * 8
    assert daemon.log("engine.lost")
    assert daemon.stop() == 0


def test_a_wrong_token_is_refused(
    network: Network, cluster: Cluster, make_daemon: Any, tmp_path: Path
) -> None:
    """Neither a daemon nor a host comes in with it; the daemon says so and loses nothing."""
    wrong = tmp_path / "wrong.token"
    wrong.write_text("b" * 64)
    wrong.chmod(0o600)
    daemon = daemon_there(network, cluster, make_daemon, token=str(wrong))
    daemon.drop("a.txt", "a cat\n")
    status = daemon.until_status("a refusal", lambda s: "Ray cluster" in str(s["reason"]))
    daemon.until_log("job.claimed")

    assert status["state"] == "waiting"
    assert "token" in status["reason"].lower()
    assert daemon.stop() == 0
    host = cluster.start_ray(
        f"--address={cluster.address}", f"--node-ip-address={WORKER}",
        prefix=network.enter("b"), RAY_AUTH_TOKEN_PATH=str(wrong),
    )  # fmt: skip
    cluster.hosts.append(host)

    assert host.process.wait(120) != 0
    assert "Ray runtime started" not in host.log.read_text()
