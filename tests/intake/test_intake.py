"""From a file in the inbox to a job, with the real loop, spool and threads; a desk records reports."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from front import Front
from harness import PATIENCE_SECONDS
from promptdrop.errors import RequestError
from promptdrop.spool import claim, control
from promptdrop.spool.lanes import Lane


@pytest.fixture
def make_front(tmp_path: Path) -> Iterator[Callable[..., Front]]:
    """`make_front(root, **sections of config.yaml)`."""
    made: list[Front] = []

    def make(root: Path = tmp_path / "spool", **sections: Any) -> Front:
        made.append(Front(root, **sections))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def front(make_front: Callable[..., Front]) -> Front:
    """An intake on an empty spool."""
    return make_front()


def test_a_drop_is_read_claimed_and_resolved(front: Front) -> None:
    """It leaves the inbox in one step and is reported as a job with all its seeds."""
    file = front.drop("night/cat.yaml", "prompts: [a, b]\nseed: 7\npriority: 3\n")
    front.look_twice(0.0)
    front.rest()
    (job,) = front.desk.accepted

    assert not file.exists()
    assert job.drop.read_text() == "prompts: [a, b]\nseed: 7\npriority: 3\n"
    assert (job.path, job.folder, job.priority) == ("night/cat.yaml", "night/cat", 3)
    assert [(spec.prompt, spec.seed) for spec in job.specs] == [("a", 7), ("b", 7)]
    assert front.desk.refused == []


def test_the_desk_hears_of_a_look_before_its_files_are_taken(front: Front) -> None:
    """The supervisor knows trouble and commands before new work comes."""
    front.drop("a.txt")
    release = front.hold("reader")
    front.look_twice(0.0)
    heard = front.desk.surveys[-1], list(front.desk.accepted), front.intake.is_idle()
    release()
    front.rest()

    assert [offer.path for offer in heard[0].lanes[Lane(os.getuid(), "")]] == ["a.txt"]
    assert heard[1:] == ([], False)
    assert front.desk.paths == ["a.txt"]


def test_an_empty_inbox_is_quiet_until_something_happens(front: Front) -> None:
    """The inbox is quiet once a look that began after the last activity has found no job file."""
    front.look(0.0)
    before = front.intake.is_quiet()
    front.drop("a.txt")
    front.look_twice(1.0)
    during = front.intake.is_quiet()
    front.rest()
    claimed = front.intake.is_quiet()
    front.look(PATIENCE_SECONDS)

    assert (before, during, claimed, front.intake.is_quiet()) == (True, False, False, True)


def test_a_look_lists_commands_also_where_the_inbox_cannot_be_read(front: Front) -> None:
    """A command is obeyed while a disk is sick; the folder that is missing is named."""
    control.send(front.spool.paths.control, control.Cancel(("x",)))
    front.inbox.rmdir()
    front.look(0.0)
    (survey,) = front.desk.surveys

    assert [command.targets for command in survey.commands] == [("x",)]
    assert survey.scan is None
    assert str(front.inbox) in (survey.trouble or "")


def test_a_file_that_changes_while_it_waits_is_put_back(front: Front) -> None:
    """It settles anew, and is then rendered with its new content."""
    file = front.drop("a.txt", "half\n")
    release = front.hold("reader")
    front.look_twice(0.0)
    file.write_text("half and half\n")
    release()
    front.rest()
    untouched = file.exists(), list(front.desk.accepted)
    front.look(2.0)
    settling = dict(front.intake.waiting)
    front.look(3.0)
    front.rest()

    assert untouched == (True, [])
    assert settling == {"a.txt": "still settling"}
    assert [spec.prompt for spec in front.desk.accepted[0].specs] == ["half and half"]


def test_a_bad_file_is_refused_only_after_give_up_seconds(front: Front) -> None:
    """Until then it stays in the inbox, as it may still be arriving, and the reason is told."""
    file = front.drop("a.yaml", "prompt: a\nsteps: 0\n")
    front.look_twice(0.0)
    front.rest()
    front.look(9.0)
    waiting = dict(front.intake.waiting)
    early = file.exists(), list(front.desk.refused)
    front.look(10.0)
    front.rest()
    ((claimed, error),) = front.desk.refused

    assert waiting == {"a.yaml": "would be refused: line 2: steps=0 is not an integer in [1, 100]"}
    assert early == (True, [])
    assert (claimed.path, str(error)) == ("a.yaml", "line 2: steps=0 is not an integer in [1, 100]")
    assert not file.exists()
    assert front.desk.accepted == []


def test_a_bad_file_that_is_corrected_is_a_job(front: Front) -> None:
    """A file that would be refused becomes a job when the rest of its upload arrives."""
    file = front.drop("a.yaml", "prompt: a\nsteps:")
    file.write_text("prompt: a\nsteps: many\n")
    front.look_twice(0.0)
    front.rest()
    file.write_text("prompt: a\nsteps: 4\n")
    front.look_twice(2.0)
    front.rest()

    assert [job.specs[0].steps for job in front.desk.accepted] == [4]
    assert front.desk.refused == []


def test_a_file_withdrawn_between_look_and_claim_is_forgotten(front: Front) -> None:
    """No job is made of it, nothing is reported, and its name is free for another file."""
    file = front.drop("a.txt")
    release = front.hold("clerk")
    front.look_twice(0.0)
    front.through("reader")
    file.unlink()
    release()
    front.rest()
    nothing = [*front.desk.accepted, *front.desk.refused, *front.jobs_on_disk()]
    front.drop("a.txt", "another\n")
    front.look_twice(2.0)
    front.rest()

    assert nothing == []
    assert [spec.prompt for spec in front.desk.accepted[0].specs] == ["another"]


def test_a_file_changed_between_look_and_claim_is_read_again(front: Front) -> None:
    """A writer may hold the file through the rename, so the bytes that were moved count."""
    file = front.drop("a.txt", "first\n")
    release = front.hold("clerk")
    front.look_twice(0.0)
    front.through("reader")
    file.write_text("second thoughts\n")
    release()
    front.rest()

    assert [spec.prompt for spec in front.desk.accepted[0].specs] == ["second thoughts"]


def test_the_next_file_of_a_name_is_taken_too(front: Front) -> None:
    """The next file may come right after the claim, before any look has found the name missing."""
    front.drop("a.txt", "one\n")
    front.look_twice(0.0)
    front.rest()
    front.drop("a.txt", "two\n")
    front.look_twice(2.0)
    front.rest()

    assert [job.specs[0].prompt for job in front.desk.accepted] == ["one", "two"]
    assert [job.folder for job in front.desk.accepted] == ["a", "a~2"]


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("fair", ["a/1.txt", "b/1.txt", "c.txt", "a/2.txt", "b/sub/2.txt", "a/3.txt"]),
        ("fifo", ["a/1.txt", "a/2.txt", "a/3.txt", "b/1.txt", "b/sub/2.txt", "c.txt"]),
    ],
)
def test_files_are_taken_in_turn(
    make_front: Callable[..., Front], policy: str, order: list[str]
) -> None:
    """`fair` takes one from each top-level folder in turn, the root included; `fifo` goes by arrival."""
    front = make_front(queue={"policy": policy})
    for path in ("c.txt", "b/sub/2.txt", "b/1.txt", "a/3.txt", "a/2.txt", "a/1.txt"):
        front.drop(path)
    front.look_twice(0.0)
    front.rest()

    assert front.desk.paths == order


def test_a_crowd_leaves_the_clerk_room_for_other_work(front: Front) -> None:
    """Only some files are read at once; all of them are taken in the end."""
    for n in range(40):
        front.drop(f"{n:02}.txt")
    release = front.hold("reader")
    front.look_twice(0.0)
    had_room = front.intake.has_room()
    release()
    front.until(lambda: len(front.desk.accepted) == 40)

    assert not had_room
    assert front.intake.has_room()


def test_a_file_that_cannot_be_moved_out_is_blocked_and_said(
    make_front: Callable[..., Front], tmp_path: Path
) -> None:
    """Its path would be too long. It is tried again, and a drain does not wait for it."""
    root = tmp_path
    while len(str(root)) < 3900:
        root /= "d" * min(200, 3905 - len(str(root)))
    front = make_front(root)
    file = front.drop("s" * 160 + "/a.txt")
    front.look_twice(0.0)
    front.rest()
    front.look(2.0)
    obstacle = front.intake.obstacle or ""

    assert file.exists()
    name = "s" * 160 + "/a.txt"
    assert obstacle.startswith(f"{name}: cannot be moved out of the inbox: File name too long: ")
    assert front.intake.waiting == {name: obstacle.removeprefix(f"{name}: ")}
    assert [*front.desk.accepted, *front.desk.refused, *front.jobs_on_disk()] == []


def test_a_file_claimed_before_a_crash_is_read_where_it_lies(front: Front) -> None:
    """Its request had not been recorded, so the file is read again in the job's folder."""
    front.drop("night/a.txt", "again\n")
    front.intake.resolve_again(claim.claim(front.spool, "night", "a.txt"))
    front.rest()

    assert front.desk.paths == ["night/a.txt"]
    assert front.intake.is_idle()


def test_a_file_claimed_before_a_crash_may_be_refused(front: Front) -> None:
    """It cannot wait in the inbox any more, so the reason is told at once."""
    front.drop("a.yaml", "steps: 9\n")
    front.intake.resolve_again(claim.claim(front.spool, "", "a.yaml"))
    front.rest()

    assert [str(error) for _, error in front.desk.refused] == ["line 1: prompt is required"]


def test_a_file_is_turned_away_unread(front: Front) -> None:
    """A file that is turned away, as a cancel mark may be, is claimed and refused without being read."""
    file = front.drop("night/a.txt")
    front.intake.turn_away("night/a.txt", RequestError("cancelled"))
    front.rest()
    ((claimed, error),) = front.desk.refused

    assert (claimed.path, str(error), file.exists()) == ("night/a.txt", "cancelled", False)


def test_the_same_bytes_again_are_refused_where_that_is_configured(
    make_front: Callable[..., Front],
) -> None:
    """Sync clients drop a file twice; the first one is named."""
    front = make_front(inbox={"duplicates": "refuse"})
    front.drop("a.txt", "a cat\n")
    front.look_twice(0.0)
    front.rest()
    front.drop("b.txt", "a cat\n")
    front.look_twice(2.0)
    front.rest()

    assert front.desk.paths == ["a.txt"]
    assert "has the same bytes as a.txt" in str(front.desk.refused[0][1])


def test_too_little_space_is_reported_and_files_are_claimed_all_the_same(
    make_front: Callable[..., Front],
) -> None:
    """Only images wait for space: a claim is one rename and a small record."""
    front = make_front(limits={"min_free_disk_mib": 1 << 30})
    front.drop("a.txt")
    front.look_twice(0.0)
    front.rest()

    assert "MiB" in (front.desk.surveys[-1].trouble or "")
    assert front.desk.paths == ["a.txt"]


def test_what_was_found_is_taken_though_the_commands_cannot_be_read(front: Front) -> None:
    """The control folder is no folder for a while: that is told, and no file of that look is forgotten."""
    control = front.spool.paths.control
    control.rmdir()
    control.touch()
    front.drop("a.txt")
    front.look_twice(0.0)
    front.until(lambda: front.desk.accepted)

    assert front.desk.paths == ["a.txt"]
