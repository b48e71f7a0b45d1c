"""Which files of the inbox are jobs, and which stay where they are."""

import os
import socket
import stat
from pathlib import Path

import disks
from harness import Daemon, MakeDaemon


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
    if os.geteuid() == 0:
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


def test_another_file_system_below_the_inbox_is_not_entered(daemon: Daemon) -> None:
    """A claim is one rename; doctor names the mount."""
    mount = daemon.inbox / "mounted"
    mount.mkdir()
    with disks.tmpfs(mount):
        (mount / "a.txt").write_text("a cat\n")
        daemon.drop("b.txt", "a cat\n")
        drained = daemon.drain()
        report = daemon.run("doctor").stdout
        kept = (mount / "a.txt").exists()

    assert drained.returncode == 0
    assert kept
    assert "mounted: another file system is not entered" in report
