"""A job's records on the disk."""

import json
import os
from pathlib import Path

import pytest

from promptdrop.spool import record
from promptdrop.spool.job import CLOSED_IMAGES, ImageState, Job
from promptdrop.spool.paths import CANCELLED, REQUEST
from promptdrop.spool.spool import Spool
from spools import SETTINGS, claimed, claimed_job, finish, put, resolved


def again(spool: Spool, job: Job) -> Job:
    """The job as the next life of the daemon reads it."""
    return record.load(spool.paths, job.home, os.listdir(job.home))


def test_a_job_is_read_as_it_was_recorded(spool: Spool) -> None:
    """Every field of the job is read back, and every image with its prompt."""
    job = claimed_job(spool, "sub/a.txt", priority=7, images=3)
    read = again(spool, job)
    read.open()

    assert read == job
    assert read.settings == SETTINGS


def test_what_a_record_lacks_has_its_default(spool: Spool) -> None:
    """A field that an older version did not write has its default; one of a newer version is ignored."""
    job = claimed_job(spool, "a.txt", priority=7)
    document = json.loads((job.home / REQUEST).read_bytes())
    for name in ("inode", "owner", "priority", "settled"):
        del document[name]
    document["settings"] |= {"prompt": {"overflow": "keep_tail", "later": 1}, "later": 1}
    document["settings"]["output"] = {"later": 1}
    document["images"][0]["later"] = 1
    for name in ("meta", "negative_prompt"):
        del document["images"][0][name]
    document["later"] = 1
    (job.home / REQUEST).write_text(json.dumps(document))
    read = again(spool, job)

    assert (read.inode, read.priority, read.settled.boot) == (0, 0, "")
    assert read.settings.prompt.overflow == "keep_tail"
    assert read.settings.prompt.max_tokens == SETTINGS.prompt.max_tokens
    assert read.settings.output == SETTINGS.output
    assert read.specs == job.specs


@pytest.mark.parametrize("torn", ["", "{", "[]", "{}", '{"id": 1, "images": []}'])
def test_a_torn_record_is_no_job(spool: Spool, torn: str) -> None:
    """A disk that lied about fsync leaves anything; the drop is read again."""
    job = claimed_job(spool, "a.txt")
    (job.home / REQUEST).write_text(torn)

    assert record.load_if_whole(spool.paths, str(job.home), os.listdir(job.home)) is None
    assert record.load_if_whole(spool.paths, str(job.home), ["drop"]) is None


@pytest.mark.parametrize("damaged", [{"settings": 1}, {"images": ["x"]}, {"images": [None]}])
def test_a_record_with_values_of_other_types_is_no_job(
    spool: Spool, damaged: dict[str, object]
) -> None:
    """It is whole JSON and has every field; reading it does not end the daemon at each start."""
    job = claimed_job(spool, "a.txt")
    whole = json.loads((job.home / REQUEST).read_bytes())
    (job.home / REQUEST).write_text(json.dumps({**whole, **damaged}))

    assert record.load_if_whole(spool.paths, str(job.home), os.listdir(job.home)) is None


def test_a_death_is_counted_before_it_comes(spool: Spool) -> None:
    """It is taken back when the image ends while the daemon lives; attempts that were charged stay."""
    job = claimed_job(spool, "a.txt", images=2)
    record.begin_image(job, 1)
    job.state(2).attempts = 1
    record.begin_image(job, 2)
    died = again(spool, job)
    record.end_attempt(job, 1)
    record.end_attempt(job, 2)
    lived = again(spool, job)

    assert (died.deaths(1), died.deaths(2)) == (1, 1)
    assert lived.states == {2: ImageState(attempts=1)}
    assert not job.record_path(1, "begun").exists()


def test_a_torn_count_is_one_death(spool: Spool) -> None:
    """The count is not flushed to the disk, so after a power cut only the file's name may be left."""
    job = claimed_job(spool, "a.txt")
    job.record_path(1, "begun").touch()

    assert again(spool, job).deaths(1) == 1


def test_an_image_that_is_given_up_stays_so(spool: Spool) -> None:
    """It has failed for the recorded reason, and is not in hand any more."""
    job = claimed_job(spool, "a.txt", images=2)
    record.begin_image(job, 1)
    record.fail_image(job, 1, "no luck")
    read = again(spool, job)

    assert read.states == job.states == {1: ImageState("failed", None, "no luck")}
    assert read.todo() == [2]


def test_a_cancel_is_remembered(spool: Spool) -> None:
    """It is remembered over a crash; nothing is recorded for a job that has ended meanwhile."""
    job, ended = claimed_job(spool, "a.txt"), claimed_job(spool, "b.txt")
    ended.home.rename(spool.paths.root / "away")
    for one in (job, ended):
        record.cancel(one)

    assert again(spool, job).cancelled
    assert not ended.home.exists()


def test_only_small_jobs_are_closed(spool: Spool) -> None:
    """A large job stays open, since reading it again would hold up the loop."""
    small, large = claimed_job(spool, "a.txt"), claimed_job(spool, "b.txt", 0, CLOSED_IMAGES + 1)
    for job in (small, large):
        job.close()

    assert small.detail_in_memory is None
    assert small.specs
    assert large.detail_in_memory
    assert again(spool, small).detail_in_memory is None
    assert again(spool, large).detail_in_memory


def test_what_is_no_record_is_empty(tmp_path: Path) -> None:
    """A file that is gone, torn, no mapping, a pipe or nested too deeply reads as an empty record."""
    for name, text in (("torn", '{"a": '), ("list", "[1]"), ("deep", "[" * 100_000), ("empty", "")):
        (tmp_path / name).write_text(text)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "list")
    names = ("torn", "list", "deep", "empty", "pipe", "link", "gone", "list/inner")

    assert [record.read_json(tmp_path / name) for name in names] == [{}] * len(names)


def test_a_record_over_its_limit_is_empty(tmp_path: Path) -> None:
    """No more than the limit is read, however large the file is; None reads all of our own."""
    file = tmp_path / "record"
    file.write_text('{"a": 1}')
    sizes = [record.read_json(file, limit) for limit in (8, 7, None)]
    os.truncate(file, 8 << 30)

    assert sizes == [{"a": 1}, {}, {"a": 1}]
    assert record.read_json(file, 100) == {}
    assert record.read_json(file) == {}


def test_a_cancel_is_recorded_though_the_job_is_taken_just_then(spool: Spool) -> None:
    """The loop may move the job to active while the clerk records its cancel; this is no disk trouble."""
    job = claimed_job(spool, "a.txt")
    job.home.rename(job.paths.home("active", job.id))  # job.place does not say so yet
    record.cancel(job)
    job.place = "active"

    assert (job.home / CANCELLED).exists()


def test_a_cancel_of_a_job_that_has_ended_records_nothing(spool: Spool) -> None:
    """The job's folder is gone, and is not made again."""
    job = claimed_job(spool, "a.txt")
    finish(spool, job)
    record.cancel(job)

    assert not job.home.exists()


def test_the_owner_of_a_drop_is_recorded(spool: Spool) -> None:
    """A restart keeps whose turn a job waits for. Where it was not recorded, it is that of the dropped
    file; 0 if that is gone."""
    file = spool.paths.inbox / "sub/a.txt"
    put(spool, "sub/a.txt")
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
    uid = file.stat().st_uid
    job = resolved(spool, claimed(spool, "sub/a.txt"))
    document = json.loads((job.home / REQUEST).read_bytes())
    recorded = document.pop("owner")
    (job.home / REQUEST).write_text(json.dumps(document))
    read = again(spool, job)
    job.drop.unlink()

    assert (job.owner, recorded, read.owner, again(spool, job).owner) == (uid, uid, uid, 0)
