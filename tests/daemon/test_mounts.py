"""Folders and file systems that go and come: work waits, nothing is lost, and no new spool is made."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import disks
from disks import Faulty, drop_behind, nothing_was_charged
from harness import Daemon, MakeDaemon, jsonl, until, works

Make = Callable[..., Daemon]


@pytest.mark.parametrize("moment", ["idle", "rendering"])
def test_a_spool_that_is_unmounted_and_mounted_again(
    sick: Daemon, disk: Faulty, moment: str
) -> None:
    """The empty mount point is not taken for the inbox; the spool is locked anew when it is back."""
    go = sick.home / "go"
    sick.start().until_ready()
    if moment == "rendering":
        drop_behind(disk, "a.txt", f"!wait {go}\n")
        sick.until_begun()
    disk.unmount()
    go.touch()
    sick.until_log("disk.trouble")
    (disk.path / "spool" / "inbox").mkdir(parents=True)
    (disk.path / "spool" / "inbox" / "wrong.txt").write_text("not me\n")
    drop_behind(disk, "b.txt", "a dog\n")
    trouble = len(sick.log("disk.trouble"))
    until(lambda: len(sick.log("disk.trouble")) >= trouble, "another look")
    left = sorted(p.name for p in (disk.path / "spool").rglob("*"))
    shutil.rmtree(disk.path / "spool")
    disk.mount()

    assert sick.job("b")["outcome"] == "done"
    assert left == ["inbox", "wrong.txt"]
    if moment == "rendering":
        assert sick.job("a")["outcome"] == "done"
    second = sick.run("run", "--drain")
    assert second.returncode == 75
    nothing_was_charged(sick)
    assert sick.stop() == 0


def test_a_start_before_the_spool_is_mounted_makes_no_spool(
    make_daemon: Make, disk: Faulty, tmp_path: Path
) -> None:
    """It ends with a sentence that helps, and leaves the mount point of /etc/fstab empty."""
    daemon = make_daemon({"root": str(disk.path / "spool")})
    fstab = tmp_path / "fstab"
    fstab.write_text(f"# <device> <place>\nserver:/spool {disk.path} nfs defaults 0 0\n")
    if not os.path.exists("/etc/fstab"):
        pytest.skip("there is no /etc/fstab to put another in the place of")
    shell = f'mount --bind {fstab} /etc/fstab && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", shell, "sh", *daemon.command("run", "--drain")]
    disk.unmount()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    left = list(disk.path.iterdir())
    disk.mount()

    assert done.returncode == 1
    assert f"{disk.path} is in /etc/fstab and not mounted" in done.stderr
    assert left == []
    assert daemon.drain().returncode == 0


def test_an_outbox_unmounted_while_an_image_is_saved(make_daemon: Make, tmp_path: Path) -> None:
    """The image is published when the outbox is back, not into the empty mount point."""
    home = tmp_path / "disk"
    home.mkdir()
    with disks.faulty(home) as disk:
        daemon = make_daemon({"paths": {"outbox": str(disk.path)}})
        daemon.outbox = disk.path
        daemon.start().until_ready()
        daemon.drop("first.txt", "a cat\n")
        assert daemon.job("first")["outcome"] == "done"
        go = daemon.home / "go"
        daemon.drop("a.txt", f"!wait {go}\n")
        daemon.until_begun()
        disk.unmount()
        go.touch()
        status = daemon.until_status("not mounted", lambda s: "not mounted" in str(s["reason"]))
        left = list(disk.path.iterdir())
        disk.mount()

        assert status["state"] == "waiting"
        assert left == []
        assert daemon.job("a")["outcome"] == "done"
        nothing_was_charged(daemon)
        assert daemon.stop() == 0


def test_an_inbox_deleted_and_made_again(daemon: Daemon) -> None:
    """The daemon waits for it, never makes it, and watches the new one at once."""
    daemon.start().until_ready()
    shutil.rmtree(daemon.inbox)
    daemon.until_status("missing", lambda s: "inbox" in str(s["reason"]))
    seen = daemon.inbox.exists()
    daemon.inbox.mkdir()
    daemon.drop("a.txt", "a cat\n")

    assert not seen
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_a_mount_below_the_outbox_that_goes_away_is_waited_for(make_daemon: MakeDaemon) -> None:
    """Its jobs wait alone, with the reason; nothing is written into the empty mount point."""
    daemon = make_daemon({})
    go, place = daemon.home / "go", daemon.outbox / "alice"
    with disks.tmpfs(daemon.home / "disk") as disk:
        place.mkdir()
        subprocess.run(["mount", "--bind", str(disk), str(place)], check=True)
        try:
            daemon.start().until_ready()
            daemon.drop("a.jsonl", jsonl("first", f"!wait {go}"), daemon.inbox / "alice")
            daemon.until_begun(2)
            until((daemon.own / "mounts.json").exists, "the record of mounts")
            disks.unmount(place)
            go.touch()
            status = daemon.until_status("alice's job", lambda s: s["stuck"])
            works(daemon, "bob")
            written = list(place.iterdir())
        finally:
            subprocess.run(["mount", "--bind", str(disk), str(place)], check=True)
        try:
            job = daemon.job("alice/a")
            assert daemon.stop() == 0
        finally:
            disks.unmount(place)

        assert "was a mount point" in status["stuck"][0]["why"]
        assert written == []
        assert (job["outcome"], len(list((disk / "a").glob("*.png")))) == ("done", 2)


def test_a_mount_below_failed_that_goes_away_keeps_its_jobs(make_daemon: MakeDaemon) -> None:
    """What is kept of a failed job is not forgotten because nothing is at the empty mount point."""
    daemon = make_daemon({})
    place = daemon.failed / "alice"
    with disks.tmpfs(daemon.home / "disk") as disk:
        place.mkdir()
        subprocess.run(["mount", "--bind", str(disk), str(place)], check=True)
        try:
            daemon.start().until_ready()
            daemon.drop("a.txt", "!raise once\n", daemon.inbox / "alice")
            daemon.error("alice/a.txt")
            daemon.drop("bob.txt", "!raise once\n")
            daemon.error("bob.txt")
            until((daemon.own / "mounts.json").exists, "the record of mounts")
            disks.unmount(place)
            (daemon.failed / "bob.txt").unlink()
            daemon.until_log("job.forgotten")  # after as many looks as it takes
            kept = list((daemon.own / "parked").iterdir())
        finally:
            subprocess.run(["mount", "--bind", str(disk), str(place)], check=True)
        try:
            assert daemon.run("retry", "alice/a.txt").returncode == 0
            daemon.until_log("job.retried")
            assert daemon.stop() == 0
        finally:
            disks.unmount(place)

        assert len(kept) == 1
        assert len(daemon.log("job.forgotten")) == 1
