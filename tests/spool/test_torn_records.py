"""A disk that lied about fsync leaves a job's record torn: its file is read again, nothing is lost."""

import pytest

from promptdrop.nouns import Request
from promptdrop.spool import claim, ending, record, retry
from promptdrop.spool.job import Job
from promptdrop.spool.paths import REQUEST
from promptdrop.spool.spool import Spool
from spools import claimed_job, recovered

TORN = b'{"id": "'
LACKING = b'{"id": "x", "sub": "", "file": "cat.txt", "images": [], "settings": {}}'


@pytest.fixture
def job(spool: Spool) -> Job:
    """A claimed job of two images, the first of which failed."""
    resolved = claimed_job(spool, "cat.txt", images=2)
    record.fail_image(resolved, 1, "boom")
    return resolved


@pytest.mark.parametrize("bytes_of_record", [TORN, LACKING])
def test_a_torn_record_is_a_claim_again(spool: Spool, job: Job, bytes_of_record: bytes) -> None:
    """The file is read anew; results of images of the torn request do not count for the new one."""
    (job.home / REQUEST).write_bytes(bytes_of_record)

    jobs, unresolved = recovered(spool)

    assert jobs == []
    assert [claimed.path for claimed in unresolved] == ["cat.txt"]
    assert not list(job.home.glob("0*"))


@pytest.mark.parametrize("bytes_of_record", [TORN, LACKING])
def test_a_retry_of_a_torn_record_drops_the_file_anew(
    spool: Spool, job: Job, bytes_of_record: bytes
) -> None:
    """Nothing of the job can be resumed; the command ends, and the file is in the inbox."""
    ending.finish(spool, job)
    (spool.paths.home("parked", job.id) / REQUEST).write_bytes(bytes_of_record)

    resumed = retry.retry(spool, "cat.txt")

    assert resumed is None
    assert (spool.paths.inbox / "cat.txt").read_text() == "a\n"
    assert recovered(spool) == ([], [])


def test_a_retry_cut_short_with_a_torn_record_is_a_claim_again(spool: Spool, job: Job) -> None:
    """The file was on its way back when the power went: it is read anew, at the next start."""
    ending.finish(spool, job)
    home = spool.paths.home("parked", job.id)
    (spool.paths.failed / "cat.txt").rename(home / "drop" / "cat.txt")
    (home / REQUEST).write_bytes(TORN)

    jobs, unresolved = recovered(spool)

    assert jobs == []
    assert [claimed.path for claimed in unresolved] == ["cat.txt"]


def test_a_retry_of_a_torn_record_forgets_that_the_job_was_cancelled(
    spool: Spool, job: Job
) -> None:
    """A retry takes the cancel back: no later start may find it again."""
    record.cancel(job)
    job.cancelled = True
    asked = job.detail
    ending.finish(spool, job)
    home = spool.paths.home("parked", job.id)
    (spool.paths.failed / "cat.txt").rename(home / "drop" / "cat.txt")
    (home / REQUEST).write_bytes(TORN)
    ((), (claimed,)) = recovered(spool)
    claim.resolve(spool, claimed, Request(asked.specs), asked.settled, asked.settings)

    ((resumed,), ()) = recovered(spool)

    assert not resumed.cancelled
