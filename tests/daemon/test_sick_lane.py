"""Whatever fails in one lane's folders, and however, nobody else waits (issue 16).

Every call on one lane's paths in inbox, outbox and failed fails, behind a FUSE file system.
"""

import errno
import json
import os
import time

import pytest

from disks import ALL_OPERATIONS, Faulty
from harness import Daemon, until
from told import hidden, pairs, summaries, tells

LANE = r"/(inbox|outbox|failed)/alice(/|$)"
ERRORS = ("EIO", "ENOSPC", "EACCES", "ESTALE", "ENOTDIR", "ELOOP")
NOT_FOR_US = ("EACCES", "ENOTDIR", "ELOOP")  # jobs may go to alice~2 in the outbox instead
FILES = 40  # of Alice's lane, which fails: more than any room has threads
MORE = 4.0  # times as long that Bob's lane may take beside it ...
MORE_SECONDS = 10.0  # ... and so much longer


def drop(disk: Faulty, name: str, text: str) -> None:
    """Drop a file behind the mount, into a sub-folder that is made."""
    path = disk.behind / "spool/inbox" / name
    path.parent.mkdir(exist_ok=True)
    new = disk.behind / "spool/drop"
    new.write_text(text)
    new.rename(path)


def is_served(disk: Faulty, name: str) -> float:
    """Let Bob drop three files, and wait for them. Returns the seconds that took."""
    began = time.monotonic()
    for n in range(3):
        drop(disk, f"bob/{name}{n}.txt", "a cat\n")
    for n in range(3):
        path = disk.behind / f"spool/outbox/bob/{name}{n}/job.json"
        until(path.exists, f"Bob's job {name}{n}")
    return time.monotonic() - began


@pytest.mark.parametrize(
    "moment", ["before a look", "before they are read", "before they are published"]
)
@pytest.mark.parametrize("error", ERRORS)
def test_a_lane_whose_every_call_fails(sick: Daemon, disk: Faulty, error: str, moment: str) -> None:
    """Others are served as without it; status and `--drain` name what is held; once the disk is well
    all of it is done, once, and nobody was charged."""
    sick.write_config({"engine": {"max_attempts": 1}})
    outbox, go = disk.behind / "spool/outbox", disk.behind / "go"
    sick.start().until_ready()
    alone = is_served(disk, "alone")
    if moment == "before a look":
        disk.fail(*ALL_OPERATIONS, error=error, match=LANE)
    elif moment == "before they are read":
        disk.fail(*set(ALL_OPERATIONS) - {"getattr", "readdir"}, error=error, match=LANE)
    for n in range(FILES):
        drop(disk, f"alice/{n}.txt", f"!wait {go}\n")
    if moment == "before they are published":
        until(lambda: len(sick.unfinished()) == FILES, "forty claims")
        disk.fail(*ALL_OPERATIONS, error=error, match=LANE)
    go.touch()

    def is_held_or_elsewhere() -> bool:
        said = (os.strerror(_number(error)), "no folder")
        is_held = any(tells(sick.status(), "alice", why) for why in said)
        return is_held or (error in NOT_FOR_US and len(summaries(outbox)) == FILES + 3)

    until(is_held_or_elsewhere, "the reason")
    beside = is_served(disk, "beside")
    is_elsewhere = error in NOT_FOR_US and len(summaries(outbox)) == FILES + 6
    assert sick.stop() == 0
    drained = sick.drain()
    disk.heal()
    process = sick.start().process
    assert process
    sick.until_status("a daemon that heeds signals", lambda s: s["pid"] == process.pid)
    until(lambda: len(summaries(outbox)) == FILES + 6, "all jobs")
    assert sick.stop() == 0

    assert beside < MORE * alone + MORE_SECONDS
    assert drained.returncode == (0 if is_elsewhere else 1)
    assert is_elsewhere or "alice" in drained.stdout + drained.stderr
    jobs = summaries(outbox)
    assert {job["outcome"] for job in jobs.values()} == {"done"}
    assert sorted(pairs(outbox)) == sorted((job["id"], 1) for job in jobs.values())
    attempts = [json.loads(p.read_bytes())["job"]["attempt"] for p in outbox.rglob("*-0001.json")]
    assert attempts == [1] * (FILES + 6)
    assert hidden(outbox) == []
    assert sick.log("image.failed") == []


def _number(error: str) -> int:
    return int(getattr(errno, error))
