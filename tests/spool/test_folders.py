"""The spool's folders: which may be made, and when work waits for them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from promptdrop import fs
from promptdrop.errors import ConfigError, DiskTrouble
from promptdrop.spool.paths import STATES
from promptdrop.spool.spool import Spool
from spools import claimed_job, init_spool, make_spool, recovered


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


# --- folders of our own -----------------------------------------------------------------------------


def own_folders(spool: Spool) -> list[Path]:
    """The state folder and those in it that nobody but the daemon writes."""
    paths = spool.paths
    return [paths.state, paths.cache, *map(paths.of_state, STATES)]


def test_what_others_could_write_is_closed(spool: Spool) -> None:
    """An older installation or an administrator left it to the group; control/ stays the group's."""
    for folder in (*own_folders(spool), spool.paths.control):
        folder.chmod(0o2777)
    spool.folders.prepare()

    assert [folder.stat().st_mode & 0o022 for folder in own_folders(spool)] == [0] * 6
    assert spool.paths.control.stat().st_mode & 0o022


@pytest.mark.parametrize(
    ("mode", "directory_mode", "own"),
    [
        ("0664", "2775", 0o2755),
        ("0660", "2775", 0o2750),
        ("0664", "2770", 0o2750),
        ("0600", "0700", 0o2700),
    ],
)
def test_a_mode_is_kept_everywhere(
    tmp_path: Path, mode: str, directory_mode: str, own: int
) -> None:
    """Whoever may not read images cannot enter the folders of jobs either, new or from before."""
    init_spool(tmp_path)
    spool = init_spool(tmp_path, output={"mode": mode, "directory_mode": directory_mode})

    assert {path.stat().st_mode & 0o7777 for path in own_folders(spool)[1:]} == {own}
    assert spool.paths.state.stat().st_mode & 0o7777 == 0o2755  # the way to control/


@pytest.mark.parametrize("name", [".promptdrop", "pending", "control", "cache"])
def test_a_folder_of_our_own_is_no_link(spool: Spool, tmp_path: Path, name: str) -> None:
    """Whoever made it would decide where our records lie."""
    folder = spool.paths.state if name == ".promptdrop" else spool.paths.state / name
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ConfigError, match=f"{name} is a link; remove it"):
        spool.folders.prepare()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
@pytest.mark.parametrize("name", [".promptdrop", "active"])
def test_a_folder_of_our_own_is_no_other_users(spool: Spool, name: str) -> None:
    """The cure is named: the spool was moved, or the daemon has another user now."""
    folder = spool.paths.state if name == ".promptdrop" else spool.paths.state / name
    os.chown(folder, 12345, -1)

    with pytest.raises(ConfigError, match=rf"uid 12345.*chown -R 0 {spool.paths.state}"):
        spool.folders.prepare()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_folder_among_our_jobs_that_is_not_ours_is_left_alone(spool: Spool) -> None:
    """It stops no start, whatever is wrong with it; the jobs beside it go on."""
    jobs = [claimed_job(spool, f"{n}.txt") for n in range(4)]
    os.chown(jobs[0].home, 12345, -1)
    jobs[1].home.chmod(0o2775)
    jobs[2].home.rename(spool.paths.root / "elsewhere")
    jobs[2].home.symlink_to(spool.paths.root / "elsewhere")
    found, unresolved = recovered(spool)

    assert [job.id for job in found] == [jobs[3].id]
    assert unresolved == []
    assert sorted(p.name for p in spool.paths.of_state("pending").iterdir()) == [j.id for j in jobs]


def test_where_a_share_gives_each_file_one_mode_no_mode_is_asked_for(
    tmp_path: Path,
) -> None:
    """Jobs go on there though all of the group can write their records, which no chmod(2) ends."""
    if not shutil.which("bindfs") or os.geteuid() != 0:
        pytest.skip("needs bindfs and root")
    there = tmp_path / "share"
    (tmp_path / "behind").mkdir()
    there.mkdir()
    forced = ["--chmod-ignore", "--perms=0775:a+X", "--force-user=12345", "--chown-ignore"]
    subprocess.run(["bindfs", *forced, str(tmp_path / "behind"), str(there)], check=True)
    try:
        spool = init_spool(there)
        job = claimed_job(spool, "a.txt")
        again = init_spool(there)
        (found,), _ = recovered(again)
        mode = job.home.stat().st_mode & 0o777
    finally:
        subprocess.run(["umount", str(there)], check=True)

    assert mode & 0o020
    assert found.id == job.id
