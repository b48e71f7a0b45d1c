"""One person's folder stops nobody, links lead nowhere, readers lose nothing (issue 16).

Real users play it: Alice, by accident or on purpose, Bob, who wants his picture, and a daemon of its own user.
"""

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import disks
from harness import Daemon, until
from people import ALICE, BOB, DAEMON, drain_as, promptdrop_as, shared_daemon
from told import hidden, lone, pairs, summaries, tells

WATCH = {"settle_seconds": 0.1, "rescan_seconds": 0.2, "give_up_seconds": 0.3}
MORE_SECONDS = 5.0  # that Bob may wait longer because Alice has trouble
FILES = 40
LEASES = """
import fcntl, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
files = [open(path, "r+") for path in sys.argv[2:]]
for file in files:
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
open(sys.argv[1], "w").close()
sys.stdin.read()
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon of its own user on a group's spool, warm."""
    with shared_daemon({"watch": WATCH, "engine": {"max_attempts": 1}}) as daemon:
        yield daemon.until_ready()


@pytest.fixture
def archive(daemon: Daemon) -> Path:
    """A folder of Alice's on the outbox's file system."""
    folder = daemon.home / "archive"
    folder.mkdir()
    os.chown(folder, ALICE.uid, ALICE.gid)
    return folder


def is_served(daemon: Daemon, name: str, image: int = 3) -> float:
    """Let Bob drop a file, and wait for its pictures. Returns the seconds that took."""
    began = time.monotonic()
    BOB.drop(daemon, f"bob/{name}.txt", "a cat\n" * image)
    assert daemon.job(f"bob/{name}")["outcome"] == "done"
    return time.monotonic() - began


def held_back(daemon: Daemon, images: int) -> tuple[str, Path]:
    """The text of a job whose images wait for a file, and that file."""
    go = daemon.home / "go"
    return "".join(f'--prompt "!wait {go}" --seed {n}\n' for n in range(images)), go


def all_are_there_once(daemon: Daemon, jobs: int, images: int) -> None:
    """Assert that so many jobs and images are in the outbox, and nothing that should not be."""
    found = pairs(daemon.outbox)

    assert len(summaries(daemon.outbox)) == jobs
    assert (len(found), set(found.values())) == (images, {1})
    assert hidden(daemon.outbox, daemon.failed) == []
    assert lone(daemon.outbox) == []
    assert daemon.log("image.failed") == []


def seen(folder: Path) -> list[tuple[str, int, int, int]]:
    """What is in a folder and in those below it: names, modes, groups and the times of changes."""
    paths = [folder, *sorted(folder.rglob("*"))]
    status = [(path, path.lstat()) for path in paths]
    return [(str(path), s.st_mode, s.st_gid, s.st_ctime_ns) for path, s in status]


# --- no shared slot waits for one person's trouble ------------------------------------------------


@pytest.mark.parametrize("place", ["mkdir -m 755 a", "touch a", "ln -s nowhere a"])
def test_something_else_in_the_place_of_a_job_folder(daemon: Daemon, place: str) -> None:
    """The job has another folder, a~2; what stands there stays as it is, and nobody else waits."""
    text, go = held_back(daemon, 12)
    ALICE.drop(daemon, "a.txt", text)
    daemon.until_begun()
    ALICE.sh(f"mv a a.old; {place}", daemon.outbox)
    before = seen(daemon.outbox / "a")
    go.touch()
    is_served(daemon, "b")
    job = daemon.job("a~2")
    assert daemon.stop() == 0

    assert job["outcome"] == "done"
    assert [s["job"]["image"] for s in daemon.sidecars("a~2")] == list(range(1, 13))
    assert seen(daemon.outbox / "a") == before
    all_are_there_once(daemon, jobs=2, images=15)


@pytest.mark.parametrize("what", ["space", "inodes"])
def test_a_full_file_system_in_the_outbox(daemon: Daemon, what: str) -> None:
    """Thirty jobs of its folder wait, with the reason; others are served as ever; a drain names them."""
    alone = is_served(daemon, "alone")
    full = daemon.outbox / "alice"
    small = "64k" if what == "space" else "16m,nr_inodes=8"
    with disks.tmpfs(full, small):
        assert os.path.ismount(full)
        os.chown(full, DAEMON.uid, ALICE.gid)
        full.chmod(0o2775)
        _fill(full, what)
        for n in range(30):
            ALICE.drop(daemon, f"alice/{n}.txt", "a cat\n")
        daemon.until_status("the reason", lambda s: tells(s, "alice", "No space left"))
        beside = is_served(daemon, "beside")
        assert daemon.stop() == 0
        drained = drain_as(DAEMON, daemon)
        subprocess.run(["mount", "-o", "remount,size=16m,nr_inodes=10000", str(full)], check=True)
        daemon.start(wrapper=promptdrop_as(DAEMON))
        for n in range(30):
            daemon.job(f"alice/{n}")
        assert daemon.stop() == 0
        all_are_there_once(daemon, jobs=32, images=36)

    assert beside < alone + MORE_SECONDS
    assert drained.returncode == 1
    assert "alice/" in drained.stdout + drained.stderr
    assert "Traceback" not in drained.stderr


def _fill(folder: Path, what: str) -> None:
    """Leave no byte, or no inode, in a small file system."""
    assert os.path.ismount(folder)
    n = 0
    try:
        while True:
            with (folder / f".filler{n * (what == 'inodes')}").open("ab", buffering=0) as file:
                file.write(bytes(4096 if what == "space" else 0))
            n += 1
    except OSError:
        pass  # it is full


@pytest.mark.parametrize("place", ["touch big", "ln -s big big"])
def test_a_folder_of_the_inbox_moved_away_while_it_is_read(daemon: Daemon, place: str) -> None:
    """Its files are left alone until the folder is back; others are served meanwhile."""
    (daemon.inbox / "PAUSE").touch()
    for n in range(FILES):
        ALICE.drop(daemon, f"big/{n}.txt", "a cat\n")
    left = "ls big/*.txt 2>/dev/null | wc -l"
    ALICE.sh(f"while [ $({left}) -eq {FILES} ]; do :; done; mv big .big2; {place}", daemon.inbox)
    (daemon.inbox / "PAUSE").unlink()
    is_served(daemon, "b")
    ALICE.sh("rm big; mv .big2 big", daemon.inbox)
    for n in range(FILES):
        daemon.job(f"big/{n}")
    assert daemon.stop() == 0

    all_are_there_once(daemon, jobs=FILES + 1, images=FILES + 3)


def test_files_under_a_write_lease(daemon: Daemon) -> None:
    """They wait with a reason and are rendered once the lease is given back; nobody waits for them."""
    assert daemon.stop() == 0
    paths = [str(ALICE.drop(daemon, f"alice/{n}.txt", "a cat\n")) for n in range(20)]
    held = daemon.inbox / "alice/.held"
    with ALICE.python(LEASES, str(held), *paths) as holder:
        until(held.exists, "the leases")
        daemon.start(wrapper=promptdrop_as(DAEMON))
        daemon.until_status("the reason", lambda s: tells(s, "alice/"))
        is_served(daemon, "b")
        assert holder.stdin
        holder.stdin.close()
    for n in range(20):
        daemon.job(f"alice/{n}")
    assert daemon.stop() == 0

    all_are_there_once(daemon, jobs=21, images=23)


def test_a_folder_in_the_place_of_job_json(daemon: Daemon) -> None:
    """Its job alone waits, status says for what; it ends once the folder is gone."""
    text, go = held_back(daemon, 2)
    ALICE.drop(daemon, "a.txt", text)
    daemon.until_begun()
    ALICE.sh("mkdir a/job.json", daemon.outbox)
    go.touch()
    for n in range(3):
        is_served(daemon, f"b{n}")
    daemon.until_status("the reason", lambda s: tells(s, "a/job.json"))
    ALICE.sh("rmdir a/job.json", daemon.outbox)
    daemon.until_log("job.done", file="a.txt")
    assert daemon.stop() == 0

    all_are_there_once(daemon, jobs=4, images=11)


# --- readers take, move and delete ----------------------------------------------------------------


def test_a_folder_taken_again_and_again_while_it_is_published(
    daemon: Daemon, archive: Path
) -> None:
    """Each image is once with its sidecar in what was taken or in the outbox; nothing hidden stays."""
    until_stopped = (
        'n=0; while [ ! -e stop ]; do mv "$OUTBOX/j" $n 2>/dev/null && n=$((n+1)); sleep 0.02; done'
    )
    taker = ALICE.start(until_stopped.replace("$OUTBOX", str(daemon.outbox)), archive)
    ALICE.drop(daemon, "j.yaml", f"prompt: a cat\nseed: {list(range(150))}\n")
    job = daemon.until_log("job.done", file="j.yaml")["job"]
    ALICE.sh("touch stop", archive)
    assert taker.wait(20) == 0
    assert daemon.stop() == 0

    assert pairs(daemon.outbox, archive) == {(job, n): 1 for n in range(1, 151)}
    assert lone(daemon.outbox, archive) == []
    assert hidden(daemon.outbox, archive) == []
    assert [one["outcome"] for one in summaries(daemon.outbox, archive).values()] == ["done"]


def test_a_folder_deleted_again_and_again_while_it_is_published(daemon: Daemon) -> None:
    """The job ends, others are served, nothing hidden stays."""
    deleter = ALICE.start("while [ ! -e .stop ]; do rm -rf j; sleep 0.02; done", daemon.outbox)
    ALICE.drop(daemon, "j.yaml", f"prompt: a cat\nseed: {list(range(150))}\n")
    is_served(daemon, "b")
    done = daemon.until_log("job.done", file="j.yaml")
    ALICE.sh("touch .stop", daemon.outbox)
    assert deleter.wait(20) == 0
    assert daemon.stop() == 0

    assert done["rendered"] == 150
    assert daemon.unfinished() == []
    assert hidden(daemon.outbox) == []
    assert lone(daemon.outbox) == []
    assert daemon.log("image.failed") == []


def test_a_retry_leaves_the_next_job_of_that_name_alone(daemon: Daemon, archive: Path) -> None:
    """A parked job whose folder was taken away goes on in one of its own."""
    ALICE.drop(daemon, "a.yaml", f"prompts: [a cat, '!once-raise {daemon.home}/flag']\n")
    parked = daemon.error("a.yaml")["id"]
    ALICE.sh(f"mv a {archive}/a", daemon.outbox)
    BOB.drop(daemon, "a.yaml", "prompt: a dog\n")
    others = daemon.job("a")
    before = sorted((p.name, p.read_bytes()) for p in (daemon.outbox / "a").iterdir())
    words = [*promptdrop_as(ALICE), "retry", "a.yaml", "--config", str(daemon.config)]
    subprocess.run(words, check=True, capture_output=True)
    daemon.until_log("job.done", job=parked)
    assert daemon.stop() == 0

    assert sorted((p.name, p.read_bytes()) for p in (daemon.outbox / "a").iterdir()) == before
    assert pairs(daemon.outbox) == {(others["id"], 1): 1, (parked, 2): 1}
    (own,) = (f for f, job in summaries(daemon.outbox).items() if job["id"] == parked)
    assert own == "a~2"
    assert pairs(archive) == {(parked, 1): 1}


def test_failed_cleared_by_hand(daemon: Daemon) -> None:
    """A parked job whose file in failed/ was deleted is forgotten without a restart."""
    ALICE.drop(daemon, "a.txt", "!raise\n")
    daemon.error("a.txt")
    parked = daemon.own / "parked"
    assert len(list(parked.iterdir())) == 1
    BOB.sh("rm a.txt a.txt.error.json", daemon.failed)

    until(lambda: not list(parked.iterdir()), "the end of the parked job", 20)
    is_served(daemon, "b")
    assert daemon.stop() == 0


# --- links lead nowhere ---------------------------------------------------------------------------


@pytest.fixture
def victim(daemon: Daemon) -> Path:
    """A folder of the daemon's own user, with a file that is nobody else's."""
    folder = daemon.home / "victim"
    folder.mkdir()
    (folder / "x.txt").write_text("a secret\n")
    for path in (folder, folder / "x.txt"):
        os.chown(path, DAEMON.uid, ALICE.gid)
    (folder / "x.txt").chmod(0o600)
    return folder


@pytest.mark.parametrize(("place", "text"), [("outbox", "a cat\n"), ("failed", "--wdith 3\n")])
def test_a_link_in_the_place_of_a_mirrored_folder(
    daemon: Daemon, victim: Path, place: str, text: str
) -> None:
    """Nothing is made or changed behind it; the job's file comes to its last place beside the link."""
    before = seen(victim)
    ALICE.sh(f"ln -s {victim} lnk", daemon.root / place)
    ALICE.drop(daemon, "lnk/x.txt", text)
    is_served(daemon, "b")
    name = "request.txt" if place == "outbox" else "x.txt"
    found = until(lambda: _found(daemon.root / place, name, text), "the file in its last place")
    assert daemon.stop() == 0

    assert seen(victim) == before
    assert "lnk" not in found.relative_to(daemon.root / place).parts


def _found(folder: Path, name: str, text: str) -> Path | None:
    """The file of this name and content below a folder; no link is followed."""
    found = (p for p in folder.rglob(name) if p.read_text() == text)
    return next((path for path in found if "bob" not in path.parts), None)


@pytest.mark.parametrize("place", ["outbox", "failed"])
def test_a_link_to_the_daemon_s_own_records(daemon: Daemon, place: str) -> None:
    """The state folder keeps its modes, and has nothing that the group may write but control/."""
    pending = daemon.own / "pending"
    before = pending.stat()
    ALICE.sh("ln -s ../.promptdrop/pending lnk", daemon.root / place)
    ALICE.drop(daemon, "lnk/x.txt", "a cat\n" if place == "outbox" else "--wdith 3\n")
    ALICE.drop(daemon, "lnk/deep.txt", "a cat\n" if place == "outbox" else "--wdith 3\n")
    is_served(daemon, "b")
    until(lambda: not any(daemon.inbox.rglob("*.txt")), "an empty inbox")
    until(lambda: not daemon.unfinished(), "the end of all jobs")
    assert daemon.stop() == 0

    after = pending.stat()
    assert (after.st_mode, after.st_gid) == (before.st_mode, before.st_gid)
    assert list(pending.iterdir()) == []
    open_to_all = [p for p in daemon.own.rglob("*") if p.lstat().st_mode & stat.S_IWGRP]
    assert [p for p in open_to_all if p.name != "control"] == []


def test_a_folder_swapped_for_a_link_again_and_again(daemon: Daemon, victim: Path) -> None:
    """What lies behind the link is neither taken nor changed, and what was dropped is rendered once."""
    before = seen(victim)
    ALICE.drop(daemon, "sub/x.txt", "a cat\n")
    daemon.job("sub/x")
    for _ in range(8):
        ALICE.drop(daemon, "sub/x.txt", "a cat\n")
        swap = f"mv sub .sub; ln -s {victim} sub; sleep 0.03; rm sub; mv .sub sub; sleep 0.03"
        ALICE.sh(f"for n in 1 2 3 4 5; do {swap}; done", daemon.inbox)
        until(lambda: not (daemon.inbox / "sub/x.txt").exists(), "the claim")
    is_served(daemon, "b")
    daemon.until_log("job.done", times=10)
    assert daemon.stop() == 0

    assert seen(victim) == before
    all_are_there_once(daemon, jobs=10, images=12)
