"""Hostile droppers and members of the group: their records, links, commands and floods do no harm."""

import json
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

import disks
from harness import Daemon, MakeDaemon, until, works
from promptdrop.spool import control
from users import obedient

# --- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "before its start"])
def test_no_command_ends_or_stalls_the_daemon(daemon: Daemon, state: str) -> None:
    """Targets may be absolute paths, half characters, too long names or in other folders."""
    loop = daemon.failed / "loop"
    loop.symlink_to("loop")
    (daemon.failed / "locked").mkdir(mode=0)
    (daemon.failed / "plain").write_text("x")
    targets = [
        "/", "", ".", "..", "../..", "/etc/passwd", "\0", "\ud800", "\udc80", "a" * 300, "a/" * 3000,
        "loop/a.txt", "locked/a.txt", "plain/a.txt", "a\n\x1b[31m", "../inbox/a.txt", "x" * 500_000,
    ]  # fmt: skip
    if state == "running":
        daemon.start(wrapper=obedient()).until_ready()
    for kind in ("cancel", "retry"):
        for n, target in enumerate(targets):
            text = json.dumps({"command": kind, "targets": [target]})
            new = daemon.own / "control" / f".{kind}-{n}"
            new.write_text(text)
            new.rename(new.with_name(f"{kind}-{n}.json"))
    if state != "running":
        daemon.start(wrapper=obedient()).until_ready()
    try:
        until(lambda: not list((daemon.own / "control").glob("*.json")), "the end of all commands")
        works(daemon)
        daemon.until_status("nothing held", lambda s: s["state"] == "ready" and not s["reason"])
    finally:
        (daemon.failed / "locked").chmod(0o755)

    assert len(daemon.log("job.not_retried")) == len(targets)
    assert len(daemon.log("daemon.started")) == 1
    assert "\x1b" not in daemon.log_file.read_text()
    assert daemon.stop() == 0


def test_pause_that_cannot_be_looked_at_is_a_pause(daemon: Daemon, tmp_path: Path) -> None:
    """A folder, or a link to where we may not look, pauses; the status says so, and `resume` goes on."""
    (tmp_path / "locked").mkdir(mode=0)
    (daemon.own / "control/pause").symlink_to(tmp_path / "locked/x")
    daemon.start(wrapper=obedient()).until_ready()
    try:
        daemon.until_status("paused", lambda s: s["state"] == "paused")
        assert daemon.run("resume").returncode == 0
        works(daemon)
        (daemon.own / "control/pause").mkdir()
        daemon.until_status("paused", lambda s: s["state"] == "paused")
        resumed = daemon.run("resume")
    finally:
        (tmp_path / "locked").chmod(0o755)

    assert resumed.returncode == 1
    assert "Traceback" not in resumed.stderr
    (daemon.own / "control/pause").rmdir()
    works(daemon, "again")
    assert daemon.stop() == 0


def test_a_flood_of_cancels_stops_nobody(make_daemon: MakeDaemon) -> None:
    """With a thousand NAME.cancel that fit no job and two hundred jobs, a drop is still claimed."""
    daemon = make_daemon({"watch": {"give_up_seconds": 5}})
    (daemon.inbox / "PAUSE").touch()
    for n in range(200):
        daemon.drop(f"many/{n}.txt", "a cat\n")
    daemon.start().until_ready()
    until(lambda: len(daemon.unfinished()) == 200, "two hundred jobs")
    for n in range(1000):
        (daemon.inbox / f"x{n}.cancel").touch()
    daemon.until_log("job.refused")
    daemon.drop("b.txt", "a dog\n")
    daemon.until_log("job.claimed", file="b.txt")
    turned_away = len(daemon.log("job.refused"))
    assert daemon.stop() == 0

    assert turned_away < 500


# --- links and modes ---------------------------------------------------------------------------


def test_a_link_in_the_place_of_a_failed_file_is_not_retried(
    daemon: Daemon, tmp_path: Path
) -> None:
    """Its target keeps mode and content, and no folder behind a link is reached either."""
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret\n")
    secret.chmod(0o600)
    daemon.drop("a.txt", "!raise\n")
    daemon.drain()
    (daemon.failed / "a.txt").unlink()
    (daemon.failed / "a.txt").symlink_to(secret)
    (daemon.failed / "sub").symlink_to(tmp_path)
    control.send(daemon.own / "control", control.Retry(("a.txt", "sub/secret.txt")))
    daemon.drain()

    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert secret.read_text() == "a secret\n"
    assert len(daemon.log("job.not_retried")) == 2
    assert daemon.tree() == ["failed/a.txt", "failed/a.txt.error.json", "outbox/a/job.json"]


def test_a_link_that_was_claimed_gives_its_target_no_mode(daemon: Daemon, tmp_path: Path) -> None:
    """A link that is swapped in just before the claim is moved as a link; its target stays as it was."""
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret\n")
    secret.chmod(0o600)
    daemon.drain()
    drop = daemon.own / "pending/20260101T000000000000-abcdef/drop"
    drop.mkdir(parents=True)
    (drop / "a.txt").symlink_to(secret)
    daemon.drain()

    assert (daemon.failed / "a.txt").is_symlink()
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_a_copy_is_no_program_of_ours(daemon: Daemon) -> None:
    """The copy of a file on another file system, which the daemon owns, has no setuid bit."""
    path = daemon.drop("a.txt", "\x7fELF")
    os.chown(path, 12345, -1)  # so that we may not change its mode
    path.chmod(0o6755)
    with disks.tmpfs(daemon.failed):
        daemon.start(wrapper=["setpriv", "--bounding-set=-fowner", *obedient()[2:]])
        daemon.error("a.txt")
        mode = (daemon.failed / "a.txt").stat().st_mode
        stopped = daemon.stop()

    assert stat.S_IMODE(mode) & 0o7000 == 0
    assert stopped == 0


def test_what_is_ours_only_we_can_change(make_daemon: MakeDaemon) -> None:
    """Others can neither write nor replace the spool's root and .promptdrop, except control."""
    daemon = make_daemon()
    shutil.rmtree(daemon.root)
    old = os.umask(0)  # it must not depend on the umask of the shell
    try:
        daemon.start().until_ready()
    finally:
        os.umask(old)
    daemon.drop("b.txt", "!raise\n")
    daemon.error("b.txt")
    daemon.drop("sub/a.txt", "--prompt '!slow 0.3 a cat' --steps 100\n")
    daemon.until_begun()
    own = [p for p in daemon.own.rglob("*") if daemon.own / "control" not in (p, *p.parents)]
    writable = [
        p
        for p in (daemon.root, daemon.own, *own)
        if p.stat().st_mode & 0o022 and p.name not in ("a.txt", "b.txt")  # moved as they are
    ]

    assert {"request.json", "lock", "version", "status.json", "0001.begun"} <= {p.name for p in own}
    assert writable == []
    assert daemon.inbox.stat().st_mode & 0o020
    assert daemon.stop() == 0


# --- files that grow after their claim ----------------------------------------------------------


def test_a_file_that_grows_after_its_claim_is_not_read_whole(make_daemon: MakeDaemon) -> None:
    """A writer that holds it may add 64 GiB; ending the cancelled job takes no time for that."""
    daemon = make_daemon({"watch": {"writer_seconds": 0.3}})
    daemon.start().until_ready()
    path = daemon.inbox / "a.txt"
    with path.open("w", buffering=1) as file:
        file.write("--prompt '!slow 0.3 a cat' --steps 100\n")
        daemon.until_begun()
        os.ftruncate(file.fileno(), 64 << 30)
        (daemon.inbox / "a.txt.cancel").touch()
        record = daemon.error("a.txt")
    assert record["outcome"] == "cancelled"
    assert daemon.process
    assert daemon.stop() == 0
    (daemon.failed / "a.txt").unlink()


# --- folders of others ---------------------------------------------------------------------------


def test_a_locked_folder_in_failed_or_outbox_stops_no_start(daemon: Daemon) -> None:
    """A folder that somebody has closed to us is left as it is."""
    daemon.drop("a.txt", "a cat\n")
    for folder in (daemon.failed / "mine", daemon.outbox / "mine"):
        folder.mkdir(mode=0)
    try:
        daemon.start(wrapper=obedient()).until_ready()
        works(daemon)
        status = daemon.until_status("ready", lambda s: s["state"] == "ready")
        daemon.drop("mine/b.txt", "a dog\n")
        daemon.drop("mine/c.txt", "")
        job = daemon.job("mine~2/b")
        error = daemon.error("mine~2/c.txt")
    finally:
        for folder in (daemon.failed / "mine", daemon.outbox / "mine"):
            folder.chmod(0o755)

    assert status["reason"] is None
    assert job["outcome"] == "done"
    assert error["outcome"] == "refused"
    assert daemon.stop() == 0


def test_a_job_folder_replaced_by_a_file_stops_no_start(daemon: Daemon) -> None:
    """Its job is given another folder; all other jobs go on."""
    (daemon.inbox / "PAUSE").touch()
    daemon.start().until_ready()
    daemon.drop("a.txt", "a cat\n")
    daemon.until_log("job.claimed", file="a.txt")
    until((daemon.outbox / "a").is_dir, "its folder")
    daemon.kill()
    (daemon.outbox / "a").rmdir()
    (daemon.outbox / "a").write_text("mine\n")
    (daemon.inbox / "PAUSE").unlink()
    daemon.start()
    works(daemon)

    assert daemon.job("a~2")["outcome"] == "done"
    assert (daemon.outbox / "a").read_text() == "mine\n"
    assert daemon.stop() == 0


def test_a_folder_with_the_name_of_a_failed_file(daemon: Daemon) -> None:
    """Files that are refused in this sub-folder get another folder in failed/."""
    daemon.drop("a.txt", "")
    daemon.start().until_ready()
    daemon.error("a.txt")
    daemon.drop("a.txt/b.txt", "")

    assert daemon.error("a.txt~2/b.txt")["outcome"] == "refused"
    works(daemon)
    assert daemon.stop() == 0


@pytest.mark.parametrize("place", ["inbox", "failed", "outbox"])
def test_a_tree_deeper_than_python_recurses_ends_nobody(daemon: Daemon, place: str) -> None:
    """`mkdir -p a/a/a ...`, 1,900 deep: the daemon starts, works and stops, doctor answers."""
    top = getattr(daemon, place) / "a"
    here = os.open(getattr(daemon, place), os.O_RDONLY)
    for _ in range(1900):
        os.mkdir("a", dir_fd=here)
        inner = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    try:
        daemon.start().until_ready()
        works(daemon)
        listed = [daemon.run(command) for command in ("doctor", "status")]
        daemon.run("retry", "--all")
        stopped = daemon.stop()
    finally:
        subprocess.run(["rm", "-rf", str(top)], check=True)

    assert all("Traceback" not in done.stderr for done in listed)
    assert "Traceback" not in daemon.log_file.read_text()
    assert stopped == 0


def test_a_broken_lease_ends_nobody(daemon: Daemon) -> None:
    """If somebody opens a file for writing while we probe it, the kernel's SIGIO does not end us."""
    daemon.start().until_ready()
    assert daemon.process
    daemon.process.send_signal(signal.SIGIO)
    works(daemon)

    assert daemon.stop() == 0


def test_jobs_as_deep_as_we_go(make_daemon: MakeDaemon) -> None:
    """Five hundred folders down files are still rendered, refused and cancelled, and leave nothing."""
    daemon = make_daemon({"watch": {"give_up_seconds": 5}})
    deep = "a/" * 510
    daemon.drop(f"{deep}good.txt", "a cat\n")
    daemon.drop(f"{deep}bad.txt", "")
    daemon.drop(f"{deep}slow.txt", "--prompt '!slow 0.3 a cat' --steps 100\n")
    (daemon.inbox / f"{deep}slow.cancel").touch()
    daemon.start().until_ready()

    assert daemon.job(f"{deep}good")["outcome"] == "done"
    assert daemon.job(f"{deep}slow")["outcome"] == "cancelled"
    assert daemon.error(f"{deep}bad.txt")["outcome"] == "refused"
    until(lambda: not daemon.unfinished(), "the end of all jobs")
    assert daemon.stop() == 0
