"""Disks that fill up, fail, hang, go and come: nobody is charged, nothing is lost, work goes on.

The spool lies behind a FUSE file system that fails as it is told (disks.faulty). Files are dropped
behind its back, as another machine does on a share.
"""

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import disks
from disks import Faulty, drop_behind, nothing_was_charged
from harness import Daemon, until
from promptdrop.loop import SLOW_SECONDS, Loop

Make = Callable[..., Daemon]
CURE_SECONDS = 0.1 + 15  # watch.rescan_seconds of the tests, and what a loaded machine takes


ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE")
OPERATIONS = {
    "inbox": {"/inbox": ("readdir", "open", "read", "rename")},
    "state": {
        "/.promptdrop/pending": (
            "mkdir", "create", "write", "fsync", "fsyncdir", "rename", "getattr",
        ),
        "/.promptdrop/active": ("open", "create", "rename"),
        "/.promptdrop/control": ("readdir",),
    },
    "outbox": {
        "/outbox": (
            "readdir", "mkdir", "create", "write", "fsync", "fsyncdir", "rename", "getattr",
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("folder", OPERATIONS)
def test_a_failing_call_is_waited_out(sick: Daemon, disk: Faulty, folder: str, error: str) -> None:
    """Whatever call fails with whatever error, status and log name the reason, and the work goes on by
    itself within rescan_seconds of the cure."""
    sick.start().until_ready()
    said = os.strerror(getattr(errno, error))
    cases = [(place, name) for place, names in OPERATIONS[folder].items() for name in names]
    for n, (place, operation) in enumerate(cases):
        disk.fail(operation, error=error, match=place)
        drop_behind(disk, f"{n}.txt", "a cat\n")
        status = sick.until_status(
            f"{operation} {error}", lambda s: s["state"] == "waiting" and said in str(s["reason"])
        )
        disk.heal()
        cured = time.monotonic()
        until(
            lambda n=n: (disk.behind / f"spool/outbox/{n}/job.json").exists(),
            f"{operation} {error}",
        )
        lasted = time.monotonic() - cured

        assert lasted < CURE_SECONDS, operation
        assert place in status["reason"], (operation, status["reason"])
        until(
            lambda place=place: [
                e for e in sick.log("disk.trouble") if place in e["reason"] and said in e["reason"]
            ],
            f"the log's line about {operation} {error}",
        )
        assert (disk.behind / f"spool/outbox/{n}/request.txt").read_text() == "a cat\n"
        sick.until_status("no reason", lambda s: s["reason"] is None)

    nothing_was_charged(sick)
    assert sick.stop() == 0


@pytest.mark.parametrize(
    ("what", "place", "times"),
    [
        ("claim", "/inbox/", 9),
        ("record", r"/pending/.*tmp$", 1),
        ("take", r"/pending/[^/]+$", 9),
        ("image", r"/outbox/.*tmp$", 1),
        ("published", r"publishing$", 9),
        ("request", r"/drop/", 9),
        ("leave", r"/active/[^/]+$", 9),
    ],
)
def test_a_rename_that_was_done_and_reported_as_failed(
    sick: Daemon, disk: Faulty, what: str, place: str, times: int
) -> None:
    """NFS does this when an answer is lost. The file is neither lost nor taken twice."""
    sick.start().until_ready()
    for error in ("EIO", "ENOENT"):
        disk.fail("rename", error=error, match=place, done=True, times=times)
        drop_behind(disk, f"{what}-{error}.txt", "a cat\n")
        until((disk.behind / f"spool/outbox/{what}-{error}/job.json").exists, error)
        until(lambda: not sick.unfinished(), "the end of the job")
        disk.heal()

    assert sorted(p.name for p in sick.outbox.iterdir() if p.is_dir()) == [
        f"{what}-EIO",
        f"{what}-ENOENT",
    ]
    nothing_was_charged(sick)
    assert sick.stop() == 0


def test_what_cannot_be_looked_at_is_not_taken_for_gone(sick: Daemon, disk: Faulty) -> None:
    """A dropped file that cannot be looked at for a while is still moved to its place, at the end of a
    job and after a crash."""
    sick.start().until_ready()
    go, text = sick.home / "go", f"!wait {sick.home}/go\n"
    drop_behind(disk, "a.txt", text)
    sick.until_begun()
    disk.fail("getattr", match="/drop/")
    go.touch()
    sick.until_log("image.published")
    sick.until_log("disk.trouble")
    sick.kill()
    claimed = disk.behind / "spool/.promptdrop/pending/20261123T000000000000-abcdef/drop/sub"
    claimed.mkdir(parents=True)
    (claimed / "b.txt").write_text("a dog\n")  # as a crash between claim and resolve leaves it
    disk.fail("readdir", match="/drop")
    sick.start()
    sick.until_log("disk.trouble", times=2)
    disk.heal()

    assert sick.job("a")["outcome"] == sick.job("sub/b")["outcome"] == "done"
    assert (sick.outbox / "a/request.txt").read_text() == text
    assert (sick.outbox / "sub/b/request.txt").read_text() == "a dog\n"
    assert sick.stop() == 0


@pytest.mark.parametrize("operation", ["open", "read"])
def test_a_command_that_cannot_be_read_is_not_lost(
    sick: Daemon, disk: Faulty, operation: str
) -> None:
    """It is carried out once the disk gives it: a failed read does not say that it is no command."""
    sick.drop("a.txt", "!raise once\n")
    sick.drain()
    disk.fail(operation, match=r"/control/.*[.]json")
    assert sick.run("retry", "a.txt").returncode == 0
    sick.start()
    sick.until_log("disk.trouble")
    disk.heal()
    sick.until_log("job.retried")

    assert sick.stop() == 0


def test_one_sick_file_stops_no_other(sick: Daemon, disk: Faulty) -> None:
    """A file that cannot even be looked at waits with the reason; others are rendered."""
    sick.start().until_ready()
    disk.fail("getattr", match="/inbox/sick.txt")
    drop_behind(disk, "sick.txt", "a cat\n")
    drop_behind(disk, "well.txt", "a dog\n")
    assert sick.job("well")["outcome"] == "done"
    why = sick.until_waiting("sick.txt")
    disk.heal()

    assert "Input/output error" in why
    assert sick.job("sick")["outcome"] == "done"
    assert sick.stop() == 0


def test_slow_calls_cost_time_and_nothing_else(sick: Daemon, disk: Faulty) -> None:
    """Slow writes, fsyncs and renames are not charged to the image in hand."""
    sick.write_config({"engine": {"image_timeout_seconds": 0.5, "kill_grace_seconds": 0.5}})
    sick.start().until_ready()
    disk.fail("write", "fsync", "rename", error="", delay=0.6, match="/outbox")
    drop_behind(disk, "a.txt", "a cat\n")

    assert sick.job("a")["outcome"] == "done"
    nothing_was_charged(sick)
    assert sick.stop() == 0


@pytest.mark.parametrize("is_working", [True, False])
def test_a_stop_does_not_wait_for_a_disk_that_hangs(
    make_daemon: Make, tmp_path: Path, is_working: bool
) -> None:
    """The daemon ends without the disk and says so, also if only its last status is to be written there;
    the next start completes the image."""
    with disks.block(tmp_path / "block") as disk:
        outbox = disk.path / "outbox"
        outbox.mkdir()
        daemon = make_daemon({"paths": {"outbox": str(outbox)}, "engine": {"stop_seconds": 1}})
        daemon.outbox = outbox
        daemon.start().until_ready()
        disk.freeze()
        if is_working:
            daemon.drop("a.txt", "a cat\n")
            until(lambda: has_thread_in_uninterruptible_sleep(daemon), "a thread that hangs")
        began = time.monotonic()
        assert daemon.process
        daemon.process.send_signal(signal.SIGTERM)
        daemon.until_log("disk.hangs")
        lasted = time.monotonic() - began
        disk.thaw()
        assert daemon.process.wait(20) == 0
        if not is_working:
            daemon.drop("a.txt", "a cat\n")
        daemon.drain()

        assert lasted < 15
        assert daemon.job("a")["outcome"] == "done"
        nothing_was_charged(daemon)


def has_thread_in_uninterruptible_sleep(daemon: Daemon) -> bool:
    """Whether a call of the daemon does not come back."""
    assert daemon.process
    threads = Path(f"/proc/{daemon.process.pid}/task").glob("*/stat")
    return any(stat.read_text().rpartition(")")[2].split()[0] == "D" for stat in threads)


def test_a_full_disk_is_waited_out(make_daemon: Make, tmp_path: Path) -> None:
    """The outbox's disk, a real one, is filled to the last byte and emptied again."""
    with disks.tmpfs(tmp_path / "outbox", "1m") as outbox:
        daemon = make_daemon({"paths": {"outbox": str(outbox)}})
        daemon.outbox = outbox
        daemon.start().until_ready()
        filler = outbox / "filler"
        size = 1 << 20
        while size:  # to the last page
            try:
                with filler.open("ab", buffering=0) as file:
                    file.write(bytes(size))
            except OSError:
                size //= 2
        daemon.drop("a.yaml", "prompts: [a, b, c]\nmeta: {}\n")
        status = daemon.until_status("no space", lambda s: "No space left" in str(s["reason"]))
        filler.unlink()

        assert str(outbox) in status["reason"]
        assert daemon.job("a")["outcome"] == "done"
        assert daemon.log("image.failed") == []
        assert daemon.stop() == 0


def test_an_outbox_that_turns_read_only_is_waited_out(make_daemon: Make, tmp_path: Path) -> None:
    """ext4 turns read-only after an error (errors=remount-ro); work goes on when it is writable again."""
    with disks.tmpfs(tmp_path / "outbox") as outbox:
        daemon = make_daemon({"paths": {"outbox": str(outbox)}})
        daemon.outbox = outbox
        daemon.start().until_ready()
        subprocess.run(["mount", "-o", "remount,ro", str(outbox)], check=True)
        daemon.drop("a.txt", "a cat\n")
        daemon.until_status("the outbox", lambda s: str(outbox) in str(s["reason"]))
        subprocess.run(["mount", "-o", "remount,rw", str(outbox)], check=True)

        assert daemon.job("a")["outcome"] == "done"
        assert daemon.log("image.failed") == []
        assert daemon.stop() == 0


def test_trouble_is_logged_once_and_its_cure_too(sick: Daemon, disk: Faulty) -> None:
    """It is not logged at every try, so that a disk that is full all night does not fill the log."""
    sick.start().until_ready()
    disk.fail("create", error="ENOSPC", match="/outbox", times=3)
    drop_behind(disk, "a.txt", "a cat\n")
    assert sick.job("a")["outcome"] == "done"
    sick.until_log("disk.cured")

    (trouble,) = sick.log("disk.trouble")
    assert "No space left on device" in trouble["reason"]
    assert ".promptdrop-" not in trouble["reason"]
    assert len(sick.log("disk.cured")) == 1
    assert sick.stop() == 0


def test_work_that_does_not_come_back_is_named() -> None:
    """A disk that hangs raises no error; after SLOW_SECONDS the status names the room that waits."""
    loop, release, came = Loop(1.0), threading.Event(), threading.Event()
    loop.off("publisher", release.wait, lambda _: came.set())
    began = time.monotonic()
    until(lambda: loop.slow(began + 1000), "the publisher at work")

    assert loop.slow(began) is None
    assert "publisher" in str(loop.slow(began + SLOW_SECONDS + 1))
    release.set()
    until(lambda: loop.run_results() or came.is_set(), "its result")
    assert loop.slow(began + 1000) is None
    assert loop.close()
