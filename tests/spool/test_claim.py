"""Claiming, resolving and taking: a file in the inbox becomes a job in hand."""

from pathlib import Path

import pytest

from promptdrop.spool import claim
from promptdrop.spool.paths import REQUEST
from promptdrop.spool.spool import Spool
from spools import claimed_job, make_spool, recovered


def test_a_claim_of_a_withdrawn_file_leaves_nothing(spool: Spool) -> None:
    """If a file is gone between look and rename, no folder is left in pending/."""
    with pytest.raises(FileNotFoundError):
        claim.claim(spool, "", "gone.txt")

    assert list(spool.paths.of_state("pending").iterdir()) == []


def test_a_ready_mark_goes_with_its_file(tmp_path: Path) -> None:
    """The next file of the name needs a mark of its own; a crash between the two is made good."""
    spool = make_spool(tmp_path, watch={"ready_suffix": ".done"})
    spool.folders.init()
    mark = spool.paths.inbox / "a.txt.done"
    mark.touch()
    claimed_job(spool, "a.txt")
    taken_along = not mark.exists()
    (spool.paths.inbox / "a.txt").write_text("a\n")
    claim.claim(spool, "", "a.txt")
    mark.touch()  # as after a crash before the mark was moved
    recovered(spool)

    assert taken_along
    assert not mark.exists()


def test_the_request_is_recorded_before_its_folder_stands(spool: Spool) -> None:
    """A folder JOB in the outbox always has a recorded job."""
    job = claimed_job(spool, "sub/a.txt")

    assert (job.home / REQUEST).exists()
    assert job.outbox_folder.is_dir()
    assert job.drop.read_text() == "a\n"
    assert not (spool.paths.inbox / "sub/a.txt").exists()


def test_a_job_is_taken_once(spool: Spool) -> None:
    """Its first image moves it to active; its next ones find it there."""
    job = claimed_job(spool, "a.txt", images=2)
    for _ in range(2):
        claim.take(job)

    assert job.home == spool.paths.home("active", job.id)
    assert job.home.is_dir()


def test_a_job_that_cannot_be_read_is_not_taken(spool: Spool) -> None:
    """Trouble with a disk shows before the rename, so that the same work can be tried again."""
    job = claimed_job(spool, "a.txt")
    job.close()
    record = job.home / REQUEST
    record.rename(job.home / "away")
    with pytest.raises(FileNotFoundError):
        claim.take(job)
    waiting = job.place
    (job.home / "away").rename(record)
    claim.take(job)

    assert waiting == "pending"
    assert job.place == "active"
    assert job.specs[0].prompt


def test_a_cancel_file_that_is_gone_is_done_with(spool: Spool, tmp_path: Path) -> None:
    """Removing it is no error; nothing is removed through a link that took its folder's place."""
    (tmp_path / "x.cancel").touch()
    (spool.paths.inbox / "sub").symlink_to(tmp_path)
    (spool.paths.inbox / "b.cancel").touch()
    for path in ("a.cancel", "sub/x.cancel", "b.cancel"):
        claim.take_cancel(spool, path)

    assert (tmp_path / "x.cancel").exists()
    assert not (spool.paths.inbox / "b.cancel").exists()
