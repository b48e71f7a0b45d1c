"""Fixtures: daemons that never outlive their test, and one small real model for all tests."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import quick
from harness import Daemon
from promptdrop.spool.spool import Spool
from spools import init_spool

LONGEST = {"test_compiling.py", "test_crash.py", "test_sandbox.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --quick, with which `make quick` runs pytest."""
    parser.addoption("--quick", action="store_true", help="only tests without a daemon and torch")


def pytest_configure(config: pytest.Config) -> None:
    """With --quick: make it an error to import torch or to start a daemon."""
    if config.getoption("quick"):
        quick.forbid_what_is_slow()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --quick: do not even import the other files."""
    if not config.getoption("quick"):
        return None
    if collection_path.is_dir():
        return None if quick.may_be_quick(collection_path) else True
    is_test = collection_path.name.startswith("test_")
    return True if is_test and not quick.is_quick(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """`make_daemon({...changes to config...})`; whatever runs is killed at the end of the test."""
    made: list[Daemon] = []

    def make(changes: dict[str, Any] | None = None, home: str = "home") -> Daemon:
        folder = tmp_path / home
        folder.mkdir(exist_ok=True)
        made.append(Daemon(folder, changes))
        return made[-1]

    yield make
    for daemon in made:
        if daemon.process and daemon.process.poll() is None:
            daemon.kill()


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon on a fast configuration, not started."""
    return make_daemon()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """A spool with all its folders, which no daemon runs on."""
    return init_spool(tmp_path)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real Z-Image checkpoint, written once per worker of the run."""
    directory = tmp_path_factory.mktemp("model") / "zimage"
    subprocess.run(
        [sys.executable, "-m", "promptdrop", "model", "demo", str(directory)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return directory
