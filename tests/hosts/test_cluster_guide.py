"""The commands of docs/cluster.md, run as printed on two machines with a cable between them."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guide import ONLY_THERE, block, offline
from harness import until
from machine import CHECKOUT, Machine, booted

pytest.importorskip("ray", reason="ray is not installed: pip install promptdrop[ray]")
pytestmark = pytest.mark.timeout(420)

PAGE = "docs/cluster.md"
SPOOL = "/srv/promptdrop/spool"
# The machines have no GPU: engines ask for a core instead, of which each host offers one.
NO_GPU = "sed -i s/--num-cpus=0/--num-cpus=1/ /etc/systemd/system/promptdrop-ray-*.service\n"
ON_CPU = "sed -i 's/^  device: auto/  device: cpu/; s|^  warmup: .*|  warmup: []|' /etc/promptdrop/config.yaml\n"


@pytest.fixture
def gpu1(tmp_path: Path, model: Path) -> Iterator[Machine]:
    """The machine with the inbox."""
    with booted(tmp_path / "gpu1", model) as machine:
        machine.run("hostname", "gpu1")
        yield machine


@pytest.fixture
def gpu2(tmp_path: Path, model: Path, gpu1: Machine) -> Iterator[Machine]:
    """A machine beside it, on a network of the two."""
    with booted(tmp_path / "gpu2", model) as machine:
        machine.run("hostname", "gpu2")
        ends = [("netns", str(one.pid)) for one in (gpu1, machine)]
        subprocess.run(
            ["ip", "link", "add", "cable", *ends[0], "type", "veth", "peer", "cable", *ends[1]],
            check=True,
        )
        for number, one in enumerate((gpu1, machine), start=1):
            one.shell(
                f"ip address add 10.0.0.{number}/24 dev cable; ip link set cable up; ip link set lo up"
            )
        yield machine


def follow(machine: Machine, name: str, no_gpu: str = NO_GPU) -> str:
    """Run a block of the page in the checkout; returns what it prints."""
    commands = offline(block(PAGE, name)).replace(
        "sudo systemctl daemon-reload", f"{no_gpu}sudo systemctl daemon-reload"
    )
    return machine.shell(f"{ONLY_THERE}cd {CHECKOUT}\n{commands}")


def both_ready(machine: Machine) -> str:
    """The output of the page's status command if an engine is ready on each machine, else nothing."""
    printed = follow(machine, "look")
    ready = {line.split()[1] for line in printed.splitlines() if "\tready" in line}
    return printed if ready == {"gpu1", "gpu2"} else ""


def hosts_of(machine: Machine, name: str) -> set[str]:
    """Drop a job of twelve images. Returns the hosts that its sidecars name."""
    job = '--prompt "a cat" --size 64x64 --steps 2 --count 12'
    machine.write(f"/tmp/{name}.txt", f"{job}\n")
    machine.shell(f"cp /tmp/{name}.txt {SPOOL}/inbox/")
    folder = f"{SPOOL}/outbox/{name}"
    until(lambda: machine.shell(f"ls {folder}/job.json 2>&1 || true").startswith("/"), name, 120)
    sidecars = machine.shell(f"cat {folder}/{name}-*.json")
    return set(re.findall(r'"host": "(gpu\d)"', sidecars))


def test_the_page_makes_a_cluster_of_two_machines(gpu1: Machine, gpu2: Machine) -> None:
    """Its commands lead from nothing to images of both hosts, an upgrade, and a host taken out again."""
    for machine in (gpu1, gpu2):
        follow(machine, "both")
    follow(gpu1, "token")
    token = gpu1.shell("cat /etc/promptdrop/ray.token")
    gpu2.write("/tmp/pasted", f"{token}\n")
    gpu2.shell(f"exec </tmp/pasted\n{block(PAGE, 'paste')}")
    follow(gpu1, "head", NO_GPU + ON_CPU)
    follow(gpu2, "worker")
    follow(gpu1, "start")
    seen = until(lambda: both_ready(gpu1), "two engines", 120)

    assert "10.0.0.2" in seen
    assert hosts_of(gpu1, "a") == {"gpu1", "gpu2"}

    gpu1.run("systemctl", "stop", "promptdrop")
    for machine in (gpu1, gpu2):
        follow(machine, "upgrade")
    gpu1.run("systemctl", "start", "promptdrop")
    until(lambda: both_ready(gpu1), "two engines after the upgrade", 120)
    follow(gpu2, "uninstall", no_gpu="")
    until(lambda: re.search("gpu2.*dead", follow(gpu1, "look")), "the end of gpu2", 60)

    assert hosts_of(gpu1, "b") == {"gpu1"}
    assert gpu2.show("promptdrop-ray-worker", "LoadState") == "not-found"
