"""Fixtures of disks that fail as they are told."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import disks
from disks import Faulty
from harness import Daemon

Make = Callable[..., Daemon]
WATCH = {"settle_seconds": 0.05, "rescan_seconds": 0.1}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Faulty]:
    """A disk that fails as it is told."""
    home = tmp_path / "disk"
    home.mkdir()
    with disks.faulty(home) as made:
        yield made


@pytest.fixture
def sick(make_daemon: Make, disk: Faulty) -> Daemon:
    """A daemon whose whole spool is on that disk; not started."""
    return make_daemon({"root": str(disk.path / "spool"), "watch": WATCH})
