"""When a file in the inbox is complete. Files are real, tests make the looks and say the time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from promptdrop.config import Watch
from promptdrop.intake.inbox import Inbox, Scan
from promptdrop.intake.writers import is_open_for_writing

WATCH = Watch(settle_seconds=1.0, give_up_seconds=10.0, writer_seconds=60.0)


def offered(scan: Scan) -> list[str]:
    """The paths of the files that a scan offers."""
    return [offer.path for offer in scan.offers]


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    """An inbox without any file."""
    return Inbox(tmp_path)


def test_a_file_is_offered_after_two_looks_and_the_settle_time(
    tmp_path: Path, inbox: Inbox
) -> None:
    """It must be unchanged over two looks and settle_seconds; it is offered once."""
    (tmp_path / "a.txt").write_text("x")

    first, second, third, fourth = (inbox.scan(now, WATCH, True) for now in (5.0, 5.9, 6.0, 6.1))

    assert (offered(first), first.waiting, first.next_look) == (
        [],
        {"a.txt": "still settling"},
        6.0,
    )
    assert offered(second) == []
    assert offered(third) == ["a.txt"]
    assert offered(fourth) == []
    assert fourth.found == 1


def test_an_old_modification_time_says_nothing(tmp_path: Path, inbox: Inbox) -> None:
    """rsync and unzip arrive with old times; quiet is measured on our clock."""
    (tmp_path / "a.txt").write_text("x")
    os.utime(tmp_path / "a.txt", (0, 0))

    assert offered(inbox.scan(0.0, WATCH, True)) == []
    assert offered(inbox.scan(0.5, WATCH, True)) == []
    assert offered(inbox.scan(1.0, WATCH, True)) == ["a.txt"]


@pytest.mark.parametrize("change", ["content", "times", "replaced"])
def test_every_change_starts_the_clock_again(tmp_path: Path, inbox: Inbox, change: str) -> None:
    """A change of inode, size, mtime or ctime counts as a change of the file."""
    path = tmp_path / "a.txt"
    path.write_text("x")
    inbox.scan(0.0, WATCH, True)
    if change == "content":
        path.write_text("xy")
    elif change == "times":
        os.utime(path, (1, 1))
    else:
        (tmp_path / "b").write_text("x")
        (tmp_path / "b").rename(path)

    assert offered(inbox.scan(1.0, WATCH, True)) == []
    assert offered(inbox.scan(1.9, WATCH, True)) == []
    assert offered(inbox.scan(2.0, WATCH, True)) == ["a.txt"]


def test_an_empty_file_waits_and_is_given_up(tmp_path: Path, inbox: Inbox) -> None:
    """An empty file is not complete; after give_up_seconds it is offered to be refused."""
    (tmp_path / "a.txt").touch()

    waiting = inbox.scan(0.0, WATCH, True)
    early = inbox.scan(9.9, WATCH, True)
    late = inbox.scan(10.0, WATCH, True)

    assert waiting.waiting == {"a.txt": "would be refused: is empty"}
    assert offered(early) == []
    assert [offer.give_up for offer in late.offers] == ["is empty"]


def test_an_objection_waits_for_a_correction(tmp_path: Path, inbox: Inbox) -> None:
    """A file that would be refused may still be arriving; changed, it is offered anew."""
    path = tmp_path / "a.txt"
    path.write_text("x")
    inbox.scan(0.0, WATCH, True)
    inbox.scan(1.0, WATCH, True)
    inbox.object("a.txt", "no good")

    waiting = inbox.scan(2.0, WATCH, True)
    path.write_text("better")
    inbox.scan(3.0, WATCH, True)
    better = inbox.scan(4.0, WATCH, True)

    assert waiting.waiting == {"a.txt": "would be refused: no good"}
    assert waiting.next_look == 10.0
    assert [offer.give_up for offer in better.offers] == [None]


def test_a_withdrawn_file_is_forgotten(tmp_path: Path, inbox: Inbox) -> None:
    """The same name later is a new file, which settles from the beginning."""
    path = tmp_path / "a.txt"
    path.write_text("x")
    inbox.scan(0.0, WATCH, True)
    path.unlink()
    gone = inbox.scan(0.5, WATCH, True)
    path.write_text("x")
    again = inbox.scan(1.0, WATCH, True)

    assert (gone.waiting, gone.found) == ({}, 0)
    assert again.waiting == {"a.txt": "still settling"}


def test_a_writer_holds_a_file_back_for_a_while(tmp_path: Path, inbox: Inbox) -> None:
    """A file that somebody has open for writing waits, but at most writer_seconds."""
    path = tmp_path / "a.txt"
    with path.open("w") as writer:
        writer.write("x")
        writer.flush()
        if not is_open_for_writing(path):
            pytest.skip("this file system has no leases")
        inbox.scan(0.0, WATCH, True)
        held = inbox.scan(1.0, WATCH, True)
        at_last = inbox.scan(61.0, WATCH, True)

    assert held.waiting == {"a.txt": "open for writing"}
    assert offered(at_last) == ["a.txt"]


def test_a_writer_holds_a_refusal_back_for_a_while(tmp_path: Path, inbox: Inbox) -> None:
    """An empty file that is open for writing is not refused yet: rsync --inplace may write for the first
    time after longer than we wait."""
    path = tmp_path / "a.txt"
    with path.open("w"):
        if not is_open_for_writing(path):
            pytest.skip("this file system has no leases")
        inbox.scan(0.0, WATCH, True)
        held = inbox.scan(10.0, WATCH, True)
        at_last = inbox.scan(61.0, WATCH, True)

    assert held.waiting == {"a.txt": "would be refused: is empty; open for writing"}
    assert [offer.give_up for offer in at_last.offers] == ["is empty"]


def test_a_writer_who_comes_while_we_look_kills_nobody(tmp_path: Path) -> None:
    """The signal by which the kernel tells the holder of a lease of a writer does not end the process."""
    path = tmp_path / "a.txt"
    path.write_text("x")
    append = "import os\nwhile True: os.close(os.open('a.txt', os.O_WRONLY | os.O_APPEND))"
    look = (
        "import time; from promptdrop.intake.writers import is_open_for_writing as look; end = time.monotonic() + 60\n"
        "held = free = 0\n"
        "while (held < 20 or free < 20_000) and time.monotonic() < end:\n"
        "    held, free = (held + 1, free) if look('a.txt') else (held, free + 1)\n"
        "print(held)"
    )
    with subprocess.Popen([sys.executable, "-c", append], cwd=tmp_path) as writer:
        try:
            looked = subprocess.run([sys.executable, "-c", look], cwd=tmp_path, stdout=subprocess.PIPE, check=False)  # fmt: skip
        finally:
            writer.kill()
    if looked.returncode == 0 and not int(looked.stdout):
        pytest.skip("this file system has no leases")

    assert looked.returncode == 0


def test_only_regular_files_with_job_names(tmp_path: Path, inbox: Inbox) -> None:
    """Links, pipes, folders named like jobs, ignored names and ignored folders stay where they are."""
    (tmp_path / "real.txt").write_text("x")
    (tmp_path / "link.txt").symlink_to("real.txt")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    for folder in ("@eaDir", ".hidden", "sub", "sub/deep"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "in.txt").write_text("x")
    (tmp_path / "loop").symlink_to(".")
    for name in ("a.txt~", ".a.txt", "Thumbs.db", "a.png"):
        (tmp_path / name).write_text("x")

    inbox.scan(0.0, WATCH, True)
    found = inbox.scan(1.0, WATCH, True)

    assert sorted(offered(found)) == ["real.txt", "sub/deep/in.txt", "sub/in.txt"]
    assert offered(inbox.scan(2.0, WATCH, False)) == []


def test_ready_suffix(tmp_path: Path, inbox: Inbox) -> None:
    """FILE is taken only once FILE.done exists."""
    watch = WATCH.model_copy(update={"ready_suffix": ".done"})
    (tmp_path / "a.txt").write_text("x")
    inbox.scan(0.0, watch, True)
    unready = inbox.scan(5.0, watch, True)
    (tmp_path / "a.txt.done").touch()
    ready = inbox.scan(6.0, watch, True)

    assert unready.waiting == {"a.txt": "waiting for a.txt.done"}
    assert offered(ready) == ["a.txt"]


def test_offers_come_in_the_order_of_arrival(tmp_path: Path, inbox: Inbox) -> None:
    """The file that came first is offered first; of those that came together, the first by name."""
    (tmp_path / "z.txt").write_text("x")
    inbox.scan(0.0, WATCH, True)
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    inbox.scan(0.5, WATCH, True)

    assert offered(inbox.scan(2.0, WATCH, True)) == ["z.txt", "a.txt", "b.txt"]


def test_a_cancel_has_its_own_time(tmp_path: Path, inbox: Inbox) -> None:
    """The time of a cancel mark begins when the file it names has left the inbox."""
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "a.cancel").touch()
    for now in (0.0, 50.0, 100.0):
        assert inbox.scan(now, Watch(), True).cancels == {}
    (tmp_path / "a.txt").unlink()

    assert inbox.scan(101.0, Watch(), True).cancels == {"a.cancel": 100.0}


def test_an_offer_says_whose_file_it_is(tmp_path: Path, inbox: Inbox) -> None:
    """The uid of the file as it was when it settled."""
    (tmp_path / "a.txt").write_text("x")
    if os.geteuid() == 0:
        os.chown(tmp_path / "a.txt", 12345, -1)
    inbox.scan(0.0, WATCH, True)
    (offer,) = inbox.scan(1.0, WATCH, True).offers

    assert offer.owner == (tmp_path / "a.txt").stat().st_uid
