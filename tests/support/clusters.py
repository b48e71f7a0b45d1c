"""A real Ray cluster on this machine: a head without cores, hosts that come and go."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from harness import Daemon, free_port, until

RAY = Path(sys.executable).with_name("ray")
# Ray notices in seconds, not in minutes, that a host is gone.
HASTE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
}
STORE = "--object-store-memory=80000000"


@dataclass
class Host:
    """A host of the cluster: `ray start --block` in a session of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    def until_started(self) -> None:
        """Wait until Ray says so."""
        until(lambda: "Ray runtime started" in self.log.read_text(), "a host of the cluster")

    def kill(self) -> None:
        """Send SIGKILL; Ray's processes die with it (PR_SET_PDEATHSIG)."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Cluster:
    """A head and hosts. Its folder has Ray's sockets and logs, and a short path: a socket's has 107 bytes."""

    folder: Path
    port: int
    hosts: list[Host] = field(default_factory=list)
    head: Host | None = None
    environment: dict[str, str] = field(default_factory=dict)
    node_ip: str = "127.0.0.1"

    @property
    def address(self) -> str:
        return f"{self.node_ip}:{self.port}"

    def start_head(self, prefix: tuple[str, ...] = ()) -> None:
        """Start the head, without cores of its own."""
        self.head = self.start_ray(
            "--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false",
            f"--node-ip-address={self.node_ip}", prefix=prefix,
        )  # fmt: skip
        self.head.until_started()

    def add_host(
        self, cores: int = 1, prefix: tuple[str, ...] = (), ip: str = "127.0.0.1", **env: str
    ) -> Host:
        """Add a host for so many engines."""
        host = self.start_ray(
            f"--address={self.address}", f"--num-cpus={cores}", f"--node-ip-address={ip}",
            prefix=prefix, **env,
        )  # fmt: skip
        self.hosts.append(host)
        # One after another: hosts of one machine that start at once choose the same sockets.
        host.until_started()
        return host

    def kill_hosts(self) -> None:
        """Kill all hosts but the head."""
        for host in self.hosts:
            host.kill()
        self.hosts.clear()

    def close(self) -> None:
        """Nothing stays."""
        self.kill_hosts()
        if self.head:
            self.head.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_ray(self, *arguments: str, prefix: tuple[str, ...] = (), **env: str) -> Host:
        log_file = self.folder / f"ray-{os.urandom(4).hex()}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [*prefix, str(RAY), "start", "--block", "--num-gpus=0", STORE, *arguments],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, **HASTE, "RAY_TMPDIR": str(self.folder), **self.environment, **env},
            )  # fmt: skip
        return Host(process, log_file)


@contextlib.contextmanager
def running(**environment: str) -> Iterator[Cluster]:
    """A cluster with a head and no hosts."""
    cluster = Cluster(
        Path(tempfile.mkdtemp(prefix="pd-ray-")), free_port(), environment=environment
    )
    try:
        cluster.start_head()
        yield cluster
    finally:
        cluster.close()


def prompts(*texts: str) -> str:
    """A JSONL job, one image a text."""
    return "\n".join(json.dumps({"prompt": text}) for text in texts)


def attempts(daemon: Daemon, folder: str) -> list[int]:
    """The attempt at which each image was rendered."""
    return [sidecar["job"]["attempt"] for sidecar in daemon.sidecars(folder)]


def each_once(daemon: Daemon, folder: str, images: int) -> None:
    """Assert that every image is in the outbox and was published only once."""
    job = daemon.job(folder)
    assert [image["outcome"] for image in job["images"]] == ["rendered"] * images
    numbers = sorted(image for file, image in daemon.published() if file.startswith(f"{folder}/"))
    assert numbers == list(range(1, images + 1))


def settings(cluster: Cluster, **engine: Any) -> dict[str, Any]:
    """A daemon's settings for this cluster, with engines that need no GPU."""
    return {
        "model": {"device": "cpu"},
        "engine": {"backend": "ray", "workers": 2, **engine},
        "ray": {"address": cluster.address},
    }


def engines(daemon: Daemon) -> list[dict[str, Any]]:
    """The status of both engines, once they are warm."""
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
