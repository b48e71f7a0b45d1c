"""Droppers who make, move, replace and delete folders of the inbox all night."""

import shutil
from collections import Counter
from pathlib import Path

from harness import Daemon, MakeDaemon, jsonl, until


def kept_open(pid: int) -> Counter[str]:
    """Count a process's threads, descriptors and inotify watches."""
    counted = Counter(
        threads=len(list(Path(f"/proc/{pid}/task").iterdir())),
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
    )
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            counted["watches"] += info.read_text().count("inotify wd:")
        except FileNotFoundError:
            pass  # closed since
    return counted


def turn(daemon: Daemon, n: int) -> None:
    """Make folders, move one away, delete one, replace the inbox itself, and drop into a new one."""
    (daemon.inbox / "a/b/c").mkdir(parents=True)
    (daemon.inbox / "gone/by/morning").mkdir(parents=True)
    (daemon.inbox / "a/b").rename(daemon.home / f"b{n}")
    (daemon.inbox / "a/b/d").mkdir(parents=True)
    shutil.rmtree(daemon.inbox / "gone")
    if n % 5 == 0:
        daemon.inbox.rename(daemon.home / f"inbox{n}")
        daemon.inbox.mkdir()
    daemon.drop(f"{n}.jsonl", jsonl("a cat"), daemon.inbox / "a/b/d")
    daemon.until_log("job.done", file=f"a/b/d/{n}.jsonl")
    shutil.rmtree(daemon.inbox / "a")


def test_folders_that_come_and_go_cost_nothing(make_daemon: MakeDaemon) -> None:
    """After 50 turns threads, descriptors and watches are those of before, and no drop was missed."""
    daemon = make_daemon({"watch": {"settle_seconds": 0.05, "rescan_seconds": 0.5}})
    daemon.start().until_ready()
    assert daemon.process
    pid = daemon.process.pid
    for n in range(5):
        turn(daemon, n)
    before = kept_open(pid)
    for n in range(5, 55):
        turn(daemon, n)
    until(lambda: kept_open(pid) <= before, f"no more than {before}")

    assert daemon.stop() == 0
    assert daemon.log("stderr.line") + daemon.log("python.warning") == []
    assert len(daemon.log("job.done")) == 55
