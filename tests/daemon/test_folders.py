"""Folders and disks that come and go, fill up, or are closed to us: work waits, with the reason."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import disks
from harness import Daemon, MakeDaemon, until, works
from users import obedient


def test_strangers_in_our_own_folders_stop_nothing(daemon: Daemon) -> None:
    """Files and folders that others left in pending/, active/ and control/ do no harm."""
    daemon.drain()
    for state in ("pending", "active", "parked", "finished"):
        (daemon.own / state / "notes.txt").write_text("mine\n")
    control = daemon.own / "control"
    (control / "folder.json").mkdir()
    (control / "notes.txt").write_text("mine\n")
    (control / "torn.json").write_text('{"command": "can')
    (control / "other.json").write_text('{"command": "dance", "targets": []}')
    (control / "list.json").write_text("[[[]]]")
    (control / "link.json").symlink_to("/etc/hostname")
    os.mkfifo(control / "pipe.json")
    daemon.start().until_ready()

    works(daemon)
    assert (daemon.own / "pending/notes.txt").read_text() == "mine\n"
    assert (control / "notes.txt").read_text() == "mine\n"
    assert daemon.stop() == 0


@pytest.mark.parametrize("folder", ["inbox", "outbox", "failed"])
def test_a_folder_that_goes_missing_is_waited_for(daemon: Daemon, folder: str) -> None:
    """The status names it; nothing is made in its place; work goes on when it is back."""
    daemon.start().until_ready()
    path = daemon.root / folder
    away = daemon.home / "away"
    path.rename(away)
    status = daemon.until_status("a reason", lambda s: s["state"] == "waiting")
    shown = daemon.run("status").stdout
    if folder != "inbox":
        daemon.drop("a.txt", "a cat\n")
    still_missing = not path.exists()
    away.rename(path)
    if folder == "inbox":
        daemon.drop("a.txt", "a cat\n")

    assert f"{folder} {path} is missing" in status["reason"]
    assert "is missing" in shown
    assert still_missing
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["job"]["attempt"] == 1
    assert daemon.stop() == 0


def test_an_inbox_made_anew_is_watched_again(make_daemon: MakeDaemon) -> None:
    """Events of the new folder wake the daemon, though the old one took its watch along."""
    daemon = make_daemon({"watch": {"rescan_seconds": 0.5, "mode": "inotify"}})
    daemon.start().until_ready()
    daemon.inbox.rmdir()
    daemon.until_status("waiting", lambda s: s["state"] == "waiting")
    daemon.inbox.mkdir()
    daemon.until_status("ready", lambda s: s["state"] == "ready")

    works(daemon)
    assert daemon.stop() == 0


def test_events_that_overflow_are_made_good(daemon: Daemon) -> None:
    """If the kernel's queue of events overflows, the scan still finds every file."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 20_000:
        pytest.skip(f"fs.inotify.max_queued_events is {limit}: too many to overflow")
    daemon.start().until_ready()
    assert daemon.process
    daemon.process.send_signal(signal.SIGSTOP)
    names = [daemon.inbox / ".a", daemon.inbox / ".b"]
    names[0].touch()
    for n in range(limit):  # two events each
        names[n % 2].rename(names[1 - n % 2])
    for n in range(3):
        daemon.drop(f"{n}.txt", "a\n")
    daemon.process.send_signal(signal.SIGCONT)

    assert [daemon.job(str(n))["outcome"] for n in range(3)] == ["done"] * 3
    assert daemon.stop() == 0


def test_a_mount_over_the_inbox_is_waited_out(daemon: Daemon) -> None:
    """Nothing is taken from another file system, since a claim is one rename; work goes on after it."""
    daemon.start().until_ready()
    with disks.tmpfs(daemon.inbox):
        (daemon.inbox / "there.txt").write_text("a\n")
        status = daemon.until_status("a reason", lambda status: status["reason"])
        nothing = daemon.log("job.claimed")
    daemon.drop("a.txt", "a\n")

    assert "mounted over it" in status["reason"]
    assert nothing == []
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_an_outbox_missing_while_an_image_is_saved_costs_no_attempt(daemon: Daemon) -> None:
    """Trouble with a disk charges nobody; the image is published when the folder is back."""
    go = daemon.home / "go"
    daemon.drop("a.txt", f"!wait {go}\n")
    daemon.start()
    daemon.until_begun()
    away = daemon.home / "away"
    daemon.outbox.rename(away)
    go.touch()
    daemon.until_log("disk.trouble")
    away.rename(daemon.outbox)

    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["job"]["attempt"] == 1
    assert daemon.stop() == 0


def test_min_free_disk_mib(make_daemon: MakeDaemon) -> None:
    """With less free space than that, work waits and the status says so; a lower value goes on."""
    daemon = make_daemon({"limits": {"min_free_disk_mib": 10**9}})
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    status = daemon.until_status("waiting", lambda s: s["state"] == "waiting")
    before = daemon.published()
    daemon.write_config({"limits": {"min_free_disk_mib": 0}})
    assert daemon.process
    daemon.process.send_signal(1)

    assert "limits.min_free_disk_mib" in status["reason"]
    assert before == []
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_run_waits_for_a_configured_outbox_and_init_makes_it(make_daemon: MakeDaemon) -> None:
    """`run` never creates it: it may be a mount point whose disk is not there."""
    daemon = make_daemon({"paths": {"outbox": "elsewhere"}})
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    status = daemon.until_status("waiting", lambda s: s["state"] == "waiting")
    made = (daemon.home / "elsewhere").exists()
    subprocess.run(
        [sys.executable, "-m", "promptdrop", "init", str(daemon.home)],
        check=True,
        capture_output=True,
    )
    job = daemon.home / "elsewhere/a/job.json"
    until(job.exists, "the job's end")

    assert "elsewhere is missing" in status["reason"]
    assert not made
    assert daemon.stop() == 0


@pytest.mark.parametrize("folder", ["outbox", "failed", "inbox"])
def test_a_folder_without_permission_is_waited_for(daemon: Daemon, folder: str) -> None:
    """Owner and mode are named; work goes on when the mode is right."""
    wrapper = obedient()
    daemon.start(wrapper=wrapper).until_ready()
    path = daemon.root / folder
    path.chmod(0o555)
    try:
        status = daemon.until_status("waiting", lambda s: s["state"] == "waiting")
        daemon.drop("a.txt", "a cat\n")
    finally:
        path.chmod(0o775)

    assert "mode 0555" in status["reason"]
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_a_file_that_cannot_be_moved_out_blocks_no_other(daemon: Daemon) -> None:
    """A file in a folder that we may not write waits, with the reason; others are rendered."""
    wrapper = obedient()
    daemon.drop("theirs/a.txt", "a cat\n")
    theirs = daemon.inbox / "theirs"
    theirs.chmod(0o555)
    try:
        daemon.start(wrapper=wrapper).until_ready()
        why = daemon.until_waiting("theirs/a.txt", "cannot be moved")
        works(daemon)
    finally:
        theirs.chmod(0o775)

    assert "mode 0555" in why
    assert daemon.job("theirs/a")["outcome"] == "done"
    assert len(daemon.unfinished()) == 0 or until(lambda: not daemon.unfinished(), "the end")
    assert daemon.stop() == 0


def test_outbox_and_failed_on_another_file_system(make_daemon: MakeDaemon) -> None:
    """Images, requests and failed files are moved across; retry brings a file back."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    with disks.tmpfs(daemon.outbox), disks.tmpfs(daemon.failed):
        flag = daemon.home / "flag"
        daemon.drop("a.txt", f"one\n!once-raise {flag} two\n")
        daemon.drop("sub/b.txt", "one\n")
        daemon.drop("c.txt", "")
        daemon.start()
        first = daemon.job("a")
        record = daemon.error("a.txt")
        daemon.error("c.txt")
        until(lambda: not daemon.unfinished(), "the end of all")
        daemon.run("retry", "a.txt")
        until(lambda: daemon.job("a")["outcome"] == "done", "a done")
        b = daemon.job("sub/b")
        until(lambda: not daemon.unfinished(), "the end of all")
        tree = daemon.tree()
        stopped = daemon.stop()

    assert (first["outcome"], record["missing"], b["outcome"], stopped) == ("partial", [2], "done", 0)  # fmt: skip
    assert "outbox/a/request.txt" in tree
    assert "outbox/sub/b/request.txt" in tree
    assert "failed/a.txt" not in tree
    assert {"failed/c.txt", "failed/c.txt.error.json"} <= set(tree)
    assert not [name for name in tree if ".promptdrop-" in name]


def test_an_outbox_that_is_no_longer_mounted_is_missing(daemon: Daemon) -> None:
    """An empty folder that was a mount point before is not written to, even after a restart."""
    with disks.tmpfs(daemon.outbox):
        daemon.start().until_ready()
        works(daemon)
        assert daemon.stop() == 0
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    status = daemon.until_status("waiting", lambda s: s["state"] == "waiting")
    there = list(daemon.outbox.iterdir())
    with disks.tmpfs(daemon.outbox):
        job = daemon.job("a")
        assert daemon.stop() == 0

    assert "not mounted" in status["reason"]
    assert there == []
    assert job["outcome"] == "done"
