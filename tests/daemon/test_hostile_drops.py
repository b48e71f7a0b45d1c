"""What people and programs put into an inbox, and disks that come and go: the daemon stays up."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import Daemon, until

MakeDaemon = Callable[..., Daemon]

ROOT = os.geteuid() == 0
# root that obeys permissions like everybody else: capabilities(7), CAP_DAC_OVERRIDE
OBEDIENT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if ROOT else []


def obedient() -> list[str]:
    """`python -m promptdrop` for whom permissions count, also when the tests run as root."""
    command = [*OBEDIENT, sys.executable, "-m", "promptdrop"]
    if subprocess.run([*OBEDIENT, "true"], capture_output=True, check=False).returncode:
        pytest.skip("setpriv cannot drop capabilities here")
    return command


@contextmanager
def tmpfs(path: Path) -> Iterator[None]:
    """A file system of its own on `path`; skips where that is not allowed."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "promptdrop-test", str(path)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        assert os.path.ismount(path)
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def works(daemon: Daemon, name: str = "witness") -> None:
    """An ordinary job goes through."""
    daemon.drop(f"{name}.txt", "a cat\n")
    assert daemon.job(name)["outcome"] == "done"


# --- what is no job file ------------------------------------------------------------------------


def test_what_is_no_regular_file_stays_and_blocks_nobody(daemon: Daemon) -> None:
    """Links, pipes, sockets, devices and folders named like jobs are left where they are."""
    elsewhere = daemon.home / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.txt").write_text("a cat\n")
    (daemon.inbox / "link.txt").symlink_to(elsewhere / "x.txt")
    (daemon.inbox / "dangling.txt").symlink_to("/nonexistent")
    (daemon.inbox / "loop.txt").symlink_to("loop.txt")
    (daemon.inbox / "folder-link").symlink_to(elsewhere)
    os.mkfifo(daemon.inbox / "pipe.txt")
    (daemon.inbox / "folder.txt").mkdir()
    bound = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(daemon.inbox)  # sun_path is short
    try:
        bound.bind("socket.txt")
    finally:
        os.chdir(here)
    if ROOT:
        try:
            os.mknod(daemon.inbox / "zero.txt", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        except PermissionError:
            pass  # a container without CAP_MKNOD
    before = sorted(p.name for p in daemon.inbox.iterdir())
    daemon.drop("fine.txt", "a cat\n")
    done = daemon.drain()
    bound.close()

    assert done.returncode == 0
    assert sorted(p.name for p in daemon.inbox.iterdir()) == before
    assert (elsewhere / "x.txt").read_text() == "a cat\n"
    assert [file for file, _ in daemon.published()] == ["fine/fine-0001.png"]
    assert not any(p.is_file() for p in daemon.failed.rglob("*"))


def test_hidden_and_ignored_names_stay(daemon: Daemon) -> None:
    """Temporary names of every client, and folders of other programs, are never taken."""
    ignored = [
        ".hidden.txt", "~$lock.txt", "old.txt~", "a.txt.tmp", "a.txt.part", "a.txt.crdownload",
        "a.txt.swp", "a.txt.bak", "a.txt.done", "a.png", "README", "Thumbs.db", "desktop.ini",
        "@eaDir/a.txt", "#recycle/a.txt", "$RECYCLE.BIN/a.txt", "lost+found/a.txt",
        "__MACOSX/a.txt", "System Volume Information/a.txt", ".git/a.txt",
    ]  # fmt: skip
    for name in ignored:
        daemon.drop(name, "a cat\n")
    taken = ["CAT.TXT", "dog.Prompt", "deep/er/a.JSONL"]
    for name in taken:
        daemon.drop(name, '{"prompt": "a cat"}\n' if name.endswith("JSONL") else "a cat\n")
    daemon.drain()

    left = sorted(str(p.relative_to(daemon.inbox)) for p in daemon.inbox.rglob("*") if p.is_file())
    assert left == sorted(ignored)
    assert sorted(file for file, _ in daemon.published()) == [
        "CAT/CAT-0001.png", "deep/er/a/a-0001.png", "dog/dog-0001.png",
    ]  # fmt: skip


# --- what is refused ----------------------------------------------------------------------------


def test_hostile_files_are_refused_and_others_unaffected(make_daemon: MakeDaemon) -> None:
    """Each has a reason in failed/, byte for byte the file that was dropped; the daemon lives."""
    bomb = "a: &a [x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
    )
    hostile: dict[str, bytes] = {
        "empty.txt": b"",
        "big.txt": b"a cat\n" * 2000,
        "binary.txt": b"PK\x03\x04\0\0\0\xff" * 20,
        "nul.txt": b"\0" * 500,
        "latin.txt": "caf\xe9\n".encode("latin-1"),
        "bomb.yaml": bomb.encode(),
        "brackets.yaml": b"[" * 7000,
        "brackets.json": b"[" * 7000,
        "torn.json": b'{"prompt": "a c',
        "tag.yaml": b"prompt: !!python/object/apply:os.system [id]\n",
        "twice.yaml": b"prompt: a\nprompt: b\n",
        "unknown.yaml": b"prompt: a\nwidht: 64\n",
        "comments.txt": b"# nothing\n\n",
        "list.json": b"[1, 2]",
        "huge.json": b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        "nan.json": b'{"prompt": "a", "guidance_scale": NaN}',
        "surrogate.json": b'{"prompt": "\\ud800"}',
        "quote.txt": b'--prompt "a cat\n',
        "header.csv": b"prompt;colour\na;b\n",
    }
    daemon = make_daemon({"limits": {"job_file_kib": 8}})
    for name, content in hostile.items():
        daemon.drop(name, content)
    daemon.drop("fine.txt", "a cat\n")
    done = daemon.drain()
    records = {name: daemon.error(name) for name in hostile}

    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert daemon.job("fine")["outcome"] == "done"
    assert [file for file, _ in daemon.published()] == ["fine/fine-0001.png"]
    for name, record in records.items():
        assert record["outcome"] == "refused", name
        assert 0 < len(record["error"]) < 2000, (name, record["error"])
        assert (daemon.failed / name).read_bytes() == hostile[name]
    assert "job_file_kib" in records["big.txt"]["error"]
    assert "empty" in records["empty.txt"]["error"]
    assert "'width'" in records["unknown.yaml"]["error"]
    assert not any(daemon.inbox.iterdir())


def test_25000_brackets_harm_nobody(daemon: Daemon) -> None:
    """What ends PyYAML's C parser with a segmentation fault is a refusal here."""
    for name in ("a.yaml", "b.json", "c.jsonl"):
        daemon.drop(name, b"[" * 25_000)
    done = daemon.drain()

    assert done.returncode == 0
    assert {daemon.error(n)["outcome"] for n in ("a.yaml", "b.json", "c.jsonl")} == {"refused"}


def test_a_file_full_of_mistakes_has_a_short_reason(daemon: Daemon) -> None:
    """Thousands of wrong lines do not make thousands of lines in the log."""
    daemon.drop("a.txt", "--prompt x --widht 7\n" * 5000)
    daemon.drain()
    (refused,) = daemon.log("job.refused")

    assert len(refused["error"]) < 5000
    assert "line 1" in refused["error"]


def test_an_unreadable_file_is_refused_with_its_owner_and_mode(daemon: Daemon) -> None:
    """A person can act on it; others are unaffected."""
    wrapper = obedient()
    daemon.drop("a.txt", "a cat\n").chmod(0)
    daemon.start(wrapper=wrapper)
    record = daemon.error("a.txt")

    assert record["outcome"] == "refused"
    assert "mode 0000" in record["error"]
    works(daemon)
    assert daemon.stop() == 0


def test_a_file_corrected_in_time_is_rendered(make_daemon: MakeDaemon) -> None:
    """A file that would be refused waits give_up_seconds for its rest, and status says why."""
    daemon = make_daemon({"watch": {"give_up_seconds": 60}})
    daemon.start()
    path = daemon.drop("a.json", '{"prompt": "a c')
    why = daemon.until_waiting("a.json", "refused")
    shown = daemon.run("status").stdout
    with path.open("a") as file:
        file.write('at"}')

    assert "would be refused" in why
    assert "a.json" in shown
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["request"]["prompt"] == "a cat"
    assert not any(daemon.failed.iterdir())
    assert daemon.stop() == 0


def test_a_withdrawn_file_is_forgotten(make_daemon: MakeDaemon) -> None:
    """Before it settles, or while it waits to be refused."""
    daemon = make_daemon({"watch": {"settle_seconds": 60, "give_up_seconds": 60}})
    daemon.start().until_ready()
    path = daemon.drop("a.txt", "a cat\n")
    daemon.until_waiting("a.txt", "settling")
    path.unlink()
    daemon.until_status("nothing waiting", lambda s: not s["waiting"])
    path = daemon.drop("b.txt", "")
    daemon.until_waiting("b.txt", "empty")
    path.unlink()
    daemon.until_status("nothing waiting", lambda s: not s["waiting"])

    assert daemon.stop() == 0
    assert daemon.tree() == []
    assert daemon.unfinished() == []


def test_a_slow_writer_is_not_half_taken(daemon: Daemon) -> None:
    """Open for writing is not complete, however long nothing moves."""
    daemon.start().until_ready()
    with (daemon.inbox / "a.txt").open("w", buffering=1) as file:
        file.write("one\n")
        daemon.until_waiting("a.txt", "open for writing")
        file.write("two\n")
        daemon.until_waiting("a.txt", "open for writing")
        file.write("three\n")

    assert len(daemon.job("a")["images"]) == 3
    assert daemon.stop() == 0


def test_a_writer_that_never_closes_is_waited_for_only_so_long(make_daemon: MakeDaemon) -> None:
    """After watch.writer_seconds the file is taken as it is."""
    daemon = make_daemon({"watch": {"writer_seconds": 0.5}})
    daemon.start()
    with (daemon.inbox / "a.txt").open("w", buffering=1) as file:
        file.write("one\n")

        assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_ready_suffix(make_daemon: MakeDaemon) -> None:
    """With watch.ready_suffix a file is taken only once its marker stands beside it."""
    daemon = make_daemon({"watch": {"ready_suffix": ".done"}})
    daemon.start()
    daemon.drop("a.txt", "a cat\n")
    why = daemon.until_waiting("a.txt", "a.txt.done")
    daemon.drop("a.txt.done", "")

    assert why == "waiting for a.txt.done"
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


# --- encodings and names ------------------------------------------------------------------------


def test_encodings_and_line_ends(make_daemon: MakeDaemon) -> None:
    """CR LF, BOMs and UTF-16 with a BOM read the same; gb18030 only when it is named."""
    daemon = make_daemon({"inbox": {"encodings": ["utf-8", "gb18030"]}})
    text = "一只红色的狐狸\r\nzwei Hunde\r\n"
    for name, encoding in (("a", "utf-8"), ("b", "utf-8-sig"), ("c", "utf-16"), ("d", "gb18030")):
        daemon.drop(f"{name}.txt", text.encode(encoding))
    daemon.drop("e.txt", b"\xfe\xff" + text.encode("utf-16-be"))
    daemon.drain()

    for name in "abcde":
        prompts = [s["request"]["prompt"] for s in daemon.sidecars(name)]
        assert prompts == ["一只红色的狐狸", "zwei Hunde"], name


def test_names_are_made_safe(daemon: Daemon) -> None:
    """255 bytes, undecodable bytes, control characters, reserved names: never raw in folder or log."""
    inbox = os.fsencode(daemon.inbox)
    dropped = {
        "长".encode() * 83 + b"ab.txt": "长" * 26,
        b"caf\xe9.txt": None,
        b"new\nline\x1b[31m.txt": "new_line__31m",
        b"con.txt": "con_",
        b"-rf.txt": "rf",
        b"a b&c;$(id).txt": "a_b_c___id_",
        b"trail. .txt": "trail._",
        "cafe\u0301.txt".encode(): "caf\u00e9",
        b"...json.yaml.txt": None,  # hidden
    }
    for name in dropped:
        with open(inbox + b"/" + name, "w") as file:
            file.write("a cat\n")
    daemon.drain()
    folders = {p.name for p in daemon.outbox.iterdir() if p.is_dir()}
    log = daemon.log_file.read_bytes()

    assert os.listdir(inbox) == [b"...json.yaml.txt"]
    assert {folder for folder in dropped.values() if folder} <= folders
    assert len(folders) == 8
    assert all(daemon.job(folder)["outcome"] == "done" for folder in folders)
    files = {daemon.job(folder)["file"] for folder in folders}
    assert {"caf\\xe9.txt", "new\\nline\\x1b[31m.txt"} <= files
    assert b"\x1b" not in log
    assert b"\xe9" not in log
    for folder in folders:
        assert len(os.fsencode(folder)) <= 80
        assert {s["job"]["file"] for s in daemon.sidecars(folder)} == {daemon.job(folder)["file"]}


def test_hostile_names_are_refused_like_others(daemon: Daemon) -> None:
    """failed/ has the file under its own name, or a cut one, with a reason and a way to retry."""
    names = [b"x" * 251 + b".txt", b"caf\xe9.txt", b"new\nline.txt", b"it's.txt"]
    for name in names:
        with open(os.fsencode(daemon.inbox) + b"/" + name, "w"):
            pass
    done = daemon.drain()
    there = os.listdir(os.fsencode(daemon.failed))

    assert done.returncode == 0
    assert not any(daemon.inbox.iterdir())
    assert len(there) == 8
    assert {b"caf\xe9.txt", b"caf\xe9.txt.error.json", b"new\nline.txt", b"it's.txt"} <= set(there)
    assert all(name.endswith((b".txt", b".txt.error.json")) for name in there)
    retry = daemon.error("it's.txt")["retry"]
    parsed = subprocess.run(
        ["sh", "-c", f"printf '%s|' {retry}"], capture_output=True, text=True, check=False
    )
    assert parsed.stdout == "promptdrop|retry|it's.txt|"


def test_same_names_never_share_a_folder(daemon: Daemon) -> None:
    """JOB~2 for the second, also where only case differs; STEM~2 in failed/."""
    daemon.start().until_ready()
    for n, name in enumerate(["cat.txt", "cat.txt", "CAT.TXT", "cat.prompt"], 1):
        daemon.drop(name, f"cat {n}\n")
        daemon.until_log("job.claimed", times=n)
    for n in (1, 2):
        daemon.drop("bad.txt", "")
        daemon.until_log("job.refused", times=n)
    until(lambda: len(daemon.log("job.done")) == 4, "four jobs")
    folders = [p.name for p in daemon.outbox.iterdir() if p.is_dir()]
    prompts = {folder: daemon.sidecars(folder)[0]["request"]["prompt"] for folder in folders}

    assert prompts == {"cat": "cat 1", "cat~2": "cat 2", "CAT~3": "cat 3", "cat~4": "cat 4"}
    assert (daemon.outbox / "cat~2" / "cat~2-0001.png").exists()
    assert sorted(os.listdir(daemon.failed)) == [
        "bad.txt", "bad.txt.error.json", "bad~2.txt", "bad~2.txt.error.json",
    ]  # fmt: skip
    assert daemon.stop() == 0


def test_sub_folders_are_mirrored(daemon: Daemon) -> None:
    """One whose mirror is a job's folder is mirrored as SUB~2; names are made safe part by part."""
    daemon.start().until_ready()
    daemon.drop("cats.txt", "a cat\n")
    daemon.job("cats")
    daemon.drop("cats/a.txt", "a cat\n")
    daemon.drop("A b/c d/e.txt", "a cat\n")
    daemon.drop("nul/f.txt", "a cat\n")
    daemon.drop("g.txt/h.txt", "a cat\n")

    assert daemon.job("cats~2/a")["folder"] == "cats~2/a"
    assert daemon.job("A_b/c_d/e")["outcome"] == "done"
    assert daemon.job("nul_/f")["outcome"] == "done"
    assert daemon.job("g.txt/h")["outcome"] == "done"
    assert daemon.stop() == 0


def test_hard_links_are_ordinary_files(daemon: Daemon) -> None:
    """Two names of one file are two jobs, and the third name elsewhere keeps its content."""
    source = daemon.home / "source.txt"
    source.write_text("a cat\n")
    os.link(source, daemon.inbox / "a.txt")
    os.link(source, daemon.inbox / "b.txt")
    daemon.drain()

    assert (daemon.job("a")["outcome"], daemon.job("b")["outcome"]) == ("done", "done")
    assert source.read_text() == "a cat\n"
    assert (daemon.outbox / "a/request.txt").exists()
    assert (daemon.outbox / "b/request.txt").exists()


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


# --- folders and disks --------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["inbox", "outbox", "failed"])
def test_a_folder_that_goes_missing_is_waited_for(daemon: Daemon, folder: str) -> None:
    """Status says which; nothing is made in its place; work goes on when it is back."""
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
    """More events than the kernel keeps for us are lost; the scan finds what they would have told."""
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
    """A claim is one rename: nothing is taken from another file system, and all goes on without it."""
    daemon.start().until_ready()
    with tmpfs(daemon.inbox):
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
    daemon.drop("a.txt", "!slow 0.2\n")
    daemon.start()
    daemon.until_begun()
    away = daemon.home / "away"
    daemon.outbox.rename(away)
    daemon.until_log("disk.trouble")
    away.rename(daemon.outbox)

    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["job"]["attempt"] == 1
    assert daemon.stop() == 0


def test_min_free_disk_mib(make_daemon: MakeDaemon) -> None:
    """Less free space than asked for: work waits, status says so; SIGHUP with less goes on."""
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


def test_a_drain_without_enough_disk_exits_1(make_daemon: MakeDaemon) -> None:
    """It says which disk it waits for."""
    daemon = make_daemon({"limits": {"min_free_disk_mib": 10**9}})
    daemon.drop("a.txt", "a cat\n")
    done = daemon.drain()

    assert done.returncode == 1
    assert "min_free_disk_mib" in daemon.log("daemon.ending")[-1]["reason"]


def test_a_drain_without_its_outbox_exits_1(make_daemon: MakeDaemon) -> None:
    """Also when the outbox was never there: run makes no configured folder, and says which is missing."""
    daemon = make_daemon({"paths": {"outbox": "elsewhere"}})
    daemon.drop("a.txt", "a cat\n")
    done = daemon.drain(timeout=20)

    assert done.returncode == 1
    assert "elsewhere is missing" in daemon.log("daemon.ending")[-1]["reason"]
    assert not (daemon.home / "elsewhere").exists()
    assert (daemon.inbox / "a.txt").exists() or len(daemon.unfinished()) == 1


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
    """A sub-folder that is not ours to write: its file waits with a reason, others are rendered."""
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
    with tmpfs(daemon.outbox), tmpfs(daemon.failed):
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
    """What was a mount point and is an empty folder now is not written to, across a restart."""
    with tmpfs(daemon.outbox):
        daemon.start().until_ready()
        works(daemon)
        assert daemon.stop() == 0
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    status = daemon.until_status("waiting", lambda s: s["state"] == "waiting")
    there = list(daemon.outbox.iterdir())
    with tmpfs(daemon.outbox):
        job = daemon.job("a")
        assert daemon.stop() == 0

    assert "not mounted" in status["reason"]
    assert there == []
    assert job["outcome"] == "done"


def test_another_file_system_below_the_inbox_is_not_entered(daemon: Daemon) -> None:
    """A claim is one rename; doctor names the mount."""
    mount = daemon.inbox / "mounted"
    mount.mkdir()
    with tmpfs(mount):
        (mount / "a.txt").write_text("a cat\n")
        daemon.drop("b.txt", "a cat\n")
        drained = daemon.drain()
        report = daemon.run("doctor").stdout
        kept = (mount / "a.txt").exists()

    assert drained.returncode == 0
    assert kept
    assert "mounted: another file system is not entered" in report


# --- configurations that cannot work ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"paths": {"outbox": "spool/inbox/out"}}, "inside the inbox"),
        ({"paths": {"failed": "spool/.promptdrop/failed"}}, "inside the .promptdrop"),
        ({"paths": {"outbox": "."}}, "contains the inbox"),
        ({"engine": {"max_atempts": 2}}, "did you mean 'max_attempts'"),
        ({"whatch": {}}, "did you mean 'watch'"),
        ({"model": {"id": "Tongyi-MAI/Z-Image-Turbo-none"}}, "promptdrop model fetch Tongyi-MAI/Z-Image-Turbo-none"),
        ({"engine": {"workers": 2}, "model": {"device": "cuda:1"}}, "is one device"),
        ({"engine": {"compile": True}}, "compile"),
        ({"engine": {"quantization": "fp4"}}, "fp8"),
        ({"engine": {"quantization": "fp8"}, "model": {"dtype": "float32"}}, "expected bfloat16"),
        ({"engine": {"offload": "vae"}}, "offload"),
        ({"engine": {"reserve_memory_mib": 0}}, "reserve_memory_mib"),
        ({"defaults": {"scheduler": "heum"}}, "dpmpp_2m_sde"),
        ({"defaults": {"width": 65}}, "16"),
        ({"watch": {"settle_seconds": -1}}, "watch.settle_seconds"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_exit_78(
    make_daemon: MakeDaemon, changes: dict[str, Any], said: str
) -> None:
    """The text names the key and what helps; no engine is started, no file touched."""
    daemon = make_daemon(changes)
    daemon.drop("a.txt", "a cat\n")
    began = time.monotonic()
    done = daemon.run("run")

    assert done.returncode == 78, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 20
    assert (daemon.inbox / "a.txt").exists()
