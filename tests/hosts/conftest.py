"""Fixtures: a daemon for clients, a machine with a real systemd, clusters with a real Ray."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clusters
from clients import JSON, JUNK, SETTINGS, TEXT
from clusters import Cluster
from harness import Daemon
from machine import CHECKOUT, Machine, booted
from service import MakeService, Service


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests of a file; at its end all files are counted again."""
    daemon = Daemon(tmp_path_factory.mktemp("clients"), SETTINGS).start().until_ready()
    yield daemon
    daemon.until_idle()
    stopped = daemon.stop()
    claimed = [event["file"] for event in daemon.log("job.claimed")]
    refused = [event["file"] for event in daemon.log("job.refused")]

    assert stopped == 0
    assert len({*claimed, *refused}) == len(claimed) + len(refused)
    assert len(daemon.log("job.done")) == len(claimed)
    assert daemon.unfinished() == []


@pytest.fixture
def inbox(running: Daemon, request: pytest.FixtureRequest) -> Path:
    """A sub-folder of the inbox for one test."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:70].strip("-")
    folder = running.inbox / name
    folder.mkdir()
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three job files and what programs leave beside them."""
    folder = tmp_path / "source"
    (folder / "deeper").mkdir(parents=True)
    (folder / "one.txt").write_text(TEXT)
    (folder / "two words.json").write_text(JSON)
    (folder / "deeper" / "drei ü.txt").write_text(TEXT)
    for name in JUNK:
        (folder / name).write_text("x")
    return folder


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Machine]:
    """A machine with promptdrop installed as the README says, but with a small model."""
    with booted(tmp_path_factory.mktemp("machine") / "one", model) as machine:
        machine.run(f"{CHECKOUT}/systemd/install.sh", "--run")
        yield machine


@pytest.fixture
def service(machine: Machine, request: pytest.FixtureRequest) -> Iterator[MakeService]:
    """`service({...changes...}, "line of the drop-in", ...)`, named after the test; stopped after it."""
    made: list[Service] = []

    def make(changes: dict[str, Any] | None = None, *lines: str) -> Service:
        name = re.sub(r"\W", "", request.node.name.removeprefix("test_"))[:40] + str(len(made))
        made.append(Service(machine, name, changes or {}))
        made[-1].override(*lines)
        return made[-1]

    yield make
    for one in made:
        one.override("TimeoutStopSec=1")
        one.systemctl("stop", check=False)


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """The head that all tests share, except those that kill it."""
    with clusters.running() as cluster:
        yield cluster


@pytest.fixture
def cluster(head: Cluster) -> Iterator[Cluster]:
    """The shared cluster; the hosts that a test adds are removed after it."""
    yield head
    head.kill_hosts()


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A cluster whose head may be killed."""
    with clusters.running() as cluster:
        yield cluster
