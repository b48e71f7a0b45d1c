"""Files of programs on the same machine are taken whole and once."""

import os
import subprocess
from pathlib import Path

import pytest

import servers
from clients import ALL, BIG, IMAGES, JUNK, SETTINGS, TEXT, count, reason
from harness import Daemon, MakeDaemon, until

LOCAL = {
    "cp": "cp -r . $INBOX/",
    "cp -p": "touch -d 1999-01-01 one.txt && cp -rp . $INBOX/",
    "mv": "mv * .[!.]* $INBOX/",
    "ln": "cp -r deeper $INBOX/ && ln one.txt 'two words.json' Thumbs.db $INBOX/",
    "tar": "tar cf ../a.tar . && tar xf ../a.tar -C $INBOX",
    "unzip": "zip -qr ../a.zip . && unzip -q ../a.zip -d $INBOX",
    "rsync": "rsync -a . $INBOX/",
    "rsync --inplace": "rsync -a --inplace . $INBOX/",
    "rsync --partial": "rsync -a --partial --bwlimit=20 . $INBOX/",
}


@pytest.mark.parametrize("command", LOCAL.values(), ids=LOCAL.keys())
def test_local_programs(running: Daemon, inbox: Path, source: Path, command: str) -> None:
    """cp, mv, rsync, unzip and the like are understood; files that are no jobs stay where they are."""
    servers.need(*{"rsync", "zip", "unzip", "tar"} & set(command.split()))
    subprocess.run(["sh", "-ec", command], cwd=source, env={**os.environ, "INBOX": str(inbox)}, check=True)  # fmt: skip

    count(running, inbox, ALL)
    left = {path.name for path in inbox.rglob("*") if path.is_file()}
    assert left == (set(JUNK) & {"Thumbs.db"} if command.startswith("cp -r deeper") else set(JUNK))


def test_vim(running: Daemon, inbox: Path) -> None:
    """Its swap and backup files are no jobs; the file is taken as it was written."""
    servers.need("vim.tiny")
    vim = ["vim.tiny", "-u", "NONE", "-es", "-n", "-c", "set backup writebackup"]
    change = ["-c", "normal ggOfirst", "-c", "w", "-c", "normal Glast", "-c", "normal olast", "-c", "wq!"]  # fmt: skip
    (inbox / "a.txt").write_text(TEXT)
    subprocess.run([*vim, *change, inbox / "a.txt"], check=True)

    count(running, inbox, {"a": IMAGES + 2})
    assert {path.name for path in inbox.iterdir()} <= {"a.txt~"}


def test_an_appender_that_pauses_less_than_settle_seconds(running: Daemon, inbox: Path) -> None:
    """`>>` closes after every line; the file is taken once, with all of them."""
    line = 'for n in $(seq 12); do echo "line $n" >> "$0"; sleep 0.2; done'
    subprocess.run(["sh", "-c", line, inbox / "a.txt"], check=True)

    count(running, inbox, {"a": 12})


def test_a_slow_writer(running: Daemon, inbox: Path) -> None:
    """A file that is open is not taken, though it does not change for longer than settle_seconds."""
    command = 'exec > "$0"; echo one; sleep 2.5; echo two'
    subprocess.run(["sh", "-c", command, inbox / "a.txt"], check=True)

    count(running, inbox, {"a": 2})


@pytest.mark.parametrize("option", ["--partial", "--inplace", "--archive"])
def test_rsync_killed(running: Daemon, inbox: Path, tmp_path: Path, option: str) -> None:
    """With these options the part that arrived has the final name and is refused; else nothing is left."""
    servers.need("rsync")
    big = tmp_path / "big.json"
    big.write_text(BIG)
    arriving = "big.json" if option == "--inplace" else ".big.json.*"
    with subprocess.Popen(
        ["rsync", option, "--bwlimit=100", str(big), f"{inbox}/"], stderr=subprocess.DEVNULL
    ) as rsync:
        until(lambda: any(p.stat().st_size for p in inbox.glob(arriving)), "a part of it")
        rsync.kill()
    if option == "--archive":
        until(lambda: not list(inbox.iterdir()), "rsync to clean up")
        count(running, inbox, {})
        return

    count(running, inbox, {}, refused=1)
    assert "JSON" in reason(running, inbox, "big.json")
    assert 0 < (running.failed / inbox.name / "big.json").stat().st_size < len(BIG)


def test_submit_cures_a_cut_upload(running: Daemon, inbox: Path, tmp_path: Path) -> None:
    """`submit` that is cut off leaves nothing in the inbox; otherwise the whole file is taken once."""
    servers.need("prlimit")
    (tmp_path / "sent.txt").write_text(TEXT)
    submit = running.command("submit", str(tmp_path / "sent.txt"), "--folder", inbox.name)
    cut = subprocess.run(["prlimit", "--fsize=100", *submit], capture_output=True, check=False)
    left = os.listdir(inbox)
    subprocess.run(submit, check=True, capture_output=True)

    count(running, inbox, {"sent": IMAGES})
    assert (cut.returncode, left) == (1, [])


def test_a_ready_suffix_cures_a_cut_upload(make_daemon: MakeDaemon) -> None:
    """Without its mark a file is not taken, however long it rests; the mark goes with the file."""
    daemon = make_daemon({**SETTINGS, "watch": {**SETTINGS["watch"], "ready_suffix": ".done"}})
    (daemon.inbox / "cut.txt").write_text(TEXT[: len(TEXT) // 2])
    (daemon.inbox / "whole.txt").write_text(TEXT)
    (daemon.inbox / "whole.txt.done").touch()
    daemon.start()
    images = daemon.job("whole")["totals"]["images"]
    why = daemon.until_waiting("cut.txt")

    assert images == IMAGES
    assert why == "waiting for cut.txt.done"
    assert os.listdir(daemon.inbox) == ["cut.txt"]
    assert daemon.stop() == 0


def test_a_fuse_mount_is_polled(make_daemon: MakeDaemon, tmp_path: Path, source: Path) -> None:
    """Files that appear there without an event are found; log, status and doctor name the mode.

    Whether somebody writes there cannot be asked: the quiet time alone holds an appender's file back.
    """
    real, home = tmp_path / "real", tmp_path / "mount"
    real.mkdir()
    with servers.bindfs(real, home):
        daemon = make_daemon(SETTINGS, home="mount")
        daemon.start().until_ready()
        started = daemon.until_log("daemon.started")
        other_side = real / "spool" / "inbox"
        line = 'for n in $(seq 12); do echo "line $n" >> "$0"; sleep 0.2; done'
        subprocess.run(["cp", "-r", f"{source}/.", other_side], check=True)
        subprocess.run(["sh", "-c", line, other_side / "appended.txt"], check=True)
        summaries = [daemon.job(name) for name in (*ALL, "appended")]
        status = daemon.run("status")
        doctor = daemon.run("doctor")
        claims = daemon.log("job.claimed")
        left = {path.name for path in other_side.rglob("*") if path.is_file()}
        stopped = daemon.stop()

        assert [s["totals"]["rendered"] for s in summaries] == [IMAGES] * 4
        assert (len(claims), left, stopped) == (4, set(JUNK), 0)
        for said in (started["watch"], status.stdout, doctor.stdout):
            assert "poll" in said
            assert "fuse" in said
