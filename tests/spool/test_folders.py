"""The spool's folders: which may be made, and when work waits for them."""

from pathlib import Path

import pytest

from promptdrop import fs
from promptdrop.errors import ConfigError, DiskTrouble
from promptdrop.spool.spool import Spool
from spools import make_spool


def test_a_newer_spool_is_refused(spool: Spool) -> None:
    """The exit status is 78: an old daemon must not touch a format that it does not know."""
    spool.paths.version.write_text("99\n")

    with pytest.raises(ConfigError, match="version 99, written by a newer promptdrop"):
        spool.folders.prepare()


@pytest.mark.parametrize("name", ["outbox", "failed"])
def test_folders_that_feed_on_themselves_are_refused(tmp_path: Path, name: str) -> None:
    """An outbox inside the inbox would be taken as jobs for ever."""
    inside = make_spool(tmp_path, paths={name: str(tmp_path / "spool" / "inbox" / "x")})

    with pytest.raises(ConfigError, match=rf"paths\.{name}: .* lies inside the inbox"):
        inside.folders.prepare()


def test_a_folder_around_the_inbox_is_refused(tmp_path: Path) -> None:
    """The images would lie among the drops."""
    around = make_spool(tmp_path, paths={"outbox": str(tmp_path / "spool")})

    with pytest.raises(ConfigError, match="contains the inbox"):
        around.folders.prepare()


def test_outbox_and_failed_are_two_folders(tmp_path: Path) -> None:
    """One folder for both is refused, since a failed job file is no image."""
    both = {"outbox": str(tmp_path / "x"), "failed": str(tmp_path / "x")}

    with pytest.raises(ConfigError, match="are one folder"):
        make_spool(tmp_path, paths=both).folders.prepare()


def test_run_never_makes_a_configured_outbox(tmp_path: Path) -> None:
    """It may be a missing mount, whose place an empty folder must not take."""
    outbox = tmp_path / "share"
    spool = make_spool(tmp_path, paths={"outbox": str(outbox)})
    spool.folders.prepare()

    assert not outbox.exists()
    with pytest.raises(DiskTrouble, match=f"outbox {outbox} is missing"):
        spool.folders.require()
    spool.folders.init()
    spool.folders.require()


def test_a_mount_point_is_remembered(spool: Spool) -> None:
    """A folder that was a mount point and is not mounted counts as missing, though it exists."""
    fs.write_durably(spool.paths.mounts, b'{"mounts": ["outbox"]}', 0o644)
    spool.folders.prepare()

    with pytest.raises(DiskTrouble, match="was a mount point and is not mounted"):
        spool.folders.require()


def test_a_full_disk_is_told_with_its_numbers(spool: Spool) -> None:
    """Work waits before a write fails, and the reason has the free space and the limit."""
    spool.folders.require_space(0)

    with pytest.raises(DiskTrouble, match=r"inbox .* has \d+ MiB free, less than .*: 99999999"):
        spool.folders.require_space(99_999_999)
