"""Recovery of what a crash has left in the state folder."""

import json
import os
from pathlib import Path

from promptdrop.nouns import Request
from promptdrop.spool import claim, ending, record
from promptdrop.spool.paths import REQUEST
from promptdrop.spool.spool import Spool
from spools import claimed_job, files_below, make_spool, recovered


def test_jobs_come_back_in_the_order_they_came(spool: Spool, tmp_path: Path) -> None:
    """Jobs in hand and jobs that wait come back, each with the states of its images."""
    jobs = [claimed_job(spool, f"{name}.txt", images=2) for name in "cab"]
    claim.take(jobs[1])
    record.fail_image(jobs[1], 1, "no luck")
    left, unresolved = recovered(make_spool(tmp_path))

    assert [(job.id, job.place, job.todo()) for job in left] == [
        (jobs[0].id, "pending", [1, 2]), (jobs[1].id, "active", [2]), (jobs[2].id, "pending", [1, 2]),
    ]  # fmt: skip
    assert unresolved == []


def test_a_claim_that_was_not_recorded_is_read_again(spool: Spool) -> None:
    """So is one whose record a disk has torn; a claim that moved no file is removed."""
    (spool.paths.inbox / "sub").mkdir()
    (spool.paths.inbox / "sub/a.txt").write_text("a\n")
    claimed = claim.claim(spool, "sub", "a.txt")
    torn = claimed_job(spool, "b.txt")
    claim.take(torn)
    (torn.home / REQUEST).write_text("{")
    (spool.paths.inbox / "c.txt").write_text("c\n")
    empty = claim.claim(spool, "", "c.txt")
    empty.drop.unlink()
    left, unresolved = recovered(spool)

    assert left == []
    assert unresolved == [claimed, torn.unresolved()]
    assert not empty.home.exists()


def test_a_claim_is_resolved_where_it_lies(spool: Spool) -> None:
    """A job that was active before its record was torn stays active."""
    torn = claimed_job(spool, "a.txt")
    claim.take(torn)
    asked = torn.detail
    (torn.home / REQUEST).write_text("{")
    ((), (claimed,)) = recovered(spool)
    job = claim.resolve(spool, claimed, Request(asked.specs), asked.settled, asked.settings)

    assert (job.place, job.home) == ("active", torn.home)
    assert (job.home / REQUEST).exists()


def test_strangers_among_our_folders_are_left_alone(spool: Spool) -> None:
    """Other files and folders there are no jobs."""
    for state in ("pending", "active", "parked", "finished"):
        (spool.paths.state / state / "notes").mkdir()
        (spool.paths.state / state / "notes/a.txt").write_text("mine\n")
        (spool.paths.state / state / "20260101T000000000000-abcdef").write_text("mine\n")

    assert recovered(spool) == ([], [])
    assert len(files_below(spool.paths.state)) == 8 + 1  # and the version


def test_what_has_ended_is_removed(spool: Spool) -> None:
    """These are jobs that were half removed, and parked ones whose file somebody has taken back."""
    done, parked, kept = (claimed_job(spool, f"{name}.txt") for name in "abc")
    done.home.rename(spool.paths.home("finished", done.id))
    for job in (parked, kept):
        record.fail_image(job, 1, "no luck")
        ending.finish(spool, job)
    (spool.paths.failed / "b.txt").rename(spool.paths.root / "taken back")
    recovered(spool)

    assert list(spool.paths.homes("parked", "finished")) == [
        str(spool.paths.home("parked", kept.id))
    ]


def test_a_folder_that_a_stranger_filled_is_not_ours(spool: Spool, tmp_path: Path) -> None:
    """If a crash came before a recorded folder was made, somebody else may have made one of this name."""
    missing, taken, ours = (claimed_job(spool, f"{name}.txt") for name in "abc")
    missing.outbox_folder.rmdir()
    (taken.outbox_folder / "note").write_text("mine\n")
    (ours.outbox_folder / "job.json").write_text(json.dumps({"id": ours.id}))
    again = make_spool(tmp_path)
    left, _ = recovered(again)
    for job in left:
        again.outbox.renew(job)

    assert [job.folder for job in left] == ["a", "b~2", "c"]
    assert all(job.outbox_folder.is_dir() for job in left)
    assert os.listdir(taken.outbox_folder) == ["note"]


def test_half_written_files_go(spool: Spool) -> None:
    """They are removed in the state folder, among the commands, in jobs' folders and in failed/."""
    job = claimed_job(spool, "a.txt")
    (spool.paths.failed / "sub").mkdir()
    folders = (spool.paths.state, spool.paths.control, job.home, spool.paths.failed / "sub")
    for folder in folders:
        (folder / ".promptdrop-x.tmp").touch()
    recovered(spool)

    assert not [path for path in files_below(spool.paths.root) if "promptdrop-x" in path]


def test_recovery_is_repeatable(spool: Spool) -> None:
    """After trouble with a disk it is run again from the start."""
    claimed_job(spool, "a.txt")
    first, second = recovered(spool), recovered(spool)

    assert first == second
