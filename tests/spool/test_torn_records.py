"""A disk that lied about fsync leaves a job's record torn: its file is read again, nothing is lost."""

import json
from typing import Any

import pytest

from promptdrop.errors import Problem
from promptdrop.nouns import Request
from promptdrop.spool import claim, ending, record, retry
from promptdrop.spool.job import Job
from promptdrop.spool.paths import FAILING, REQUEST
from promptdrop.spool.spool import Spool
from spools import claimed_job, put, recovered

TORN = b'{"id": "'
# One value that we never recorded, in a record that is whole otherwise: where it stands, and the value.
WRONG: list[tuple[str, Any]] = [
    ("id", "20260101T000000000000-abcdef"),
    ("sub", "/etc"),
    ("sub", "../.."),
    ("sub", None),
    ("file", "a/b"),
    ("file", "a\0b"),
    ("file", ".."),
    ("file", "\ud800"),
    ("file", "x" * 300),
    ("folder", "../../x"),
    ("folder", "a/../../b"),
    ("folder", "/x"),
    ("folder", ""),
    ("folder", "lnk/.promptdrop"),
    ("folder", "a//b"),
    ("inode", "7"),
    ("priority", 10**6),
    ("claimed", 5),
    ("settled", {"monotonic": "x"}),
    ("settled", {"monotonic": 10**400}),
    ("texts", "abc"),
    ("texts", []),
    ("texts", [7, 7, 7]),
    ("images", []),
    ("images", 10**9),
    ("settings.prompt.overflow", "sideways"),
    ("settings.prompt.max_tokens", 10**9),
    ("settings.output.name", "{nobody}-{image}"),
    ("settings.output.name", "../{image}"),
    ("settings.output.mode", "rw"),
    ("settings.max_attempts", -1),
    ("settings.on_timeout", "weep"),
    ("images.0.image", 2),
    ("images.1.prompt", 99),
    ("images.1.prompt", -1),
    ("images.1.meta", "x"),
    ("images.1.width", "x"),
    ("images.1.width", "64"),
    ("images.1.width", 65),
    ("images.1.height", 10**9),
    ("images.1.steps", -1),
    ("images.1.guidance_scale", "much"),
    ("images.1.seed", [1]),
    ("images.1.seed", -1),
    ("images.1.seed", None),
    ("images.1.scheduler", "nobody's"),
    ("images.1.format", "exe"),
    ("images.1.timeout_seconds", 0),
]
LACKING = b'{"id": "x", "sub": "", "file": "cat.txt", "images": [], "settings": {}}'


@pytest.fixture
def job(spool: Spool) -> Job:
    """A claimed job of two images, the first of which failed."""
    resolved = claimed_job(spool, "cat.txt", images=2)
    record.fail_image(resolved, 1, "boom")
    return resolved


def write_wrong(job: Job, where: str, value: Any) -> None:
    """Change one value of a job's request.json."""
    document = json.loads((job.home / REQUEST).read_bytes())
    *parts, last = [int(part) if part.isdecimal() else part for part in where.split(".")]
    inner = document
    for part in parts:
        inner = inner[part]
    inner[last] = value
    (job.home / REQUEST).write_text(json.dumps(document))


@pytest.mark.parametrize(("where", "value"), WRONG, ids=str)
def test_a_record_with_one_wrong_value_is_a_claim_again(
    spool: Spool, job: Job, where: str, value: Any
) -> None:
    """It is found at the start, so that no path leads out and no later moment ends the daemon."""
    write_wrong(job, where, value)

    jobs, unresolved = recovered(spool)

    assert jobs == []
    assert [claimed.path for claimed in unresolved] == ["cat.txt"]


@pytest.mark.parametrize(("where", "value"), [WRONG[n] for n in (0, 9, 33, 34, 37)], ids=str)
def test_a_retry_of_a_record_with_one_wrong_value_drops_the_file_anew(
    spool: Spool, job: Job, where: str, value: Any
) -> None:
    """The command ends as for a torn record."""
    ending.finish(spool, job)
    job.place = "parked"
    write_wrong(job, where, value)

    assert retry.retry(spool, "cat.txt") is None
    assert (spool.paths.inbox / "cat.txt").read_text() == "a\n"
    assert recovered(spool) == ([], [])


@pytest.mark.parametrize("target", ["../x", "/etc/x", "a/../../x", "", "a\0", 5, None])
def test_a_plan_that_leads_out_of_failed_is_none(spool: Spool, job: Job, target: Any) -> None:
    """The file goes to failed/ under a name that is chosen anew, and nowhere else."""
    put(spool, "bad.txt")
    reason = ending.refuse(spool, claim.claim(spool, "", "bad.txt"), [Problem("bad")])
    plan = {"target": target, "record": reason.model_dump(mode="json")}
    (job.home / FAILING).write_text(json.dumps(plan))

    assert record.read_failing(spool.paths, job.home) == {}


@pytest.mark.parametrize(
    "name", ["9999999.failed", "0000.failed", "0003.failed", "1.failed", "²001.failed"]
)
def test_a_record_of_an_image_that_the_job_does_not_have_counts_for_nothing(
    spool: Spool, job: Job, name: str
) -> None:
    """The job has two images."""
    (job.home / name).write_text("{}")
    ((found,), ()) = recovered(spool)

    assert found.states.keys() == {1}


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
