"""`promptdrop retry`: parked jobs go on, refused files are dropped again."""

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest

import crash_at
from promptdrop import fs, untrusted
from promptdrop.errors import Problem, UsageError
from promptdrop.outbox import publish
from promptdrop.spool import claim, ending, record, recovery, retry
from promptdrop.spool.job import Job
from promptdrop.spool.spool import Spool
from spools import claimed_job, files_below, make_spool, publication, put, recovered


def parked_job(spool: Spool, path: str) -> Job:
    """A job of three images that has ended: one rendered, one a placeholder, one failed."""
    job = claimed_job(spool, path, images=3)
    claim.take(job)
    publication(job, 1).run(spool.outbox)
    publication(job, 2, rendering=None, error="too slow").run(spool.outbox)
    record.fail_image(job, 3, "no luck")
    ending.finish(spool, job)
    return job


def refuse(spool: Spool, path: str) -> None:
    """Drop a file that is refused."""
    sub, _, file = path.rpartition("/")
    (spool.paths.inbox / sub).mkdir(exist_ok=True)
    (spool.paths.inbox / path).write_text("promt: a\n")
    ending.refuse(spool, claim.claim(spool, sub, file), [Problem("unknown field")])


def test_a_parked_job_goes_on_with_what_is_missing(spool: Spool) -> None:
    """It keeps its id and folder; a placeholder counts as missing, too."""
    job = parked_job(spool, "sub/a.txt")
    again = retry.retry(spool, "sub/a.txt")

    assert again
    assert (again.id, again.folder, again.place) == (job.id, job.folder, "pending")
    assert again.todo() == [2, 3]
    assert again.drop.read_text() == "a\n"
    assert files_below(spool.paths.failed) == []


def test_a_cancelled_job_is_wanted_again(spool: Spool) -> None:
    """`retry` of a cancelled job takes the cancel back."""
    job = claimed_job(spool, "a.txt")
    record.cancel(job)
    job.cancelled = True
    ending.finish(spool, job)
    again = retry.retry(spool, "a.txt")

    assert again
    assert not again.cancelled
    assert again.todo() == [1]


def test_a_refused_file_is_dropped_again(tmp_path: Path) -> None:
    """It gets its marker, and another name if a new file has its own."""
    spool = make_spool(tmp_path, watch={"ready_suffix": ".done"})
    spool.folders.init()
    refuse(spool, "sub/a.txt")
    (spool.paths.inbox / "sub/a.txt").write_text("new\n")
    again = retry.retry(spool, "sub/a.txt")

    assert again is None
    assert files_below(spool.paths.inbox) == ["sub/a.txt", "sub/a~2.txt", "sub/a~2.txt.done"]
    assert (spool.paths.inbox / "sub/a.txt").read_text() == "new\n"
    assert files_below(spool.paths.failed) == []


@pytest.mark.parametrize(
    "target",
    [
        "", "sub/", "/etc/passwd", "../inbox/a.txt", "sub/../../inbox/a.txt", "..", "a\0b",
        "\ud800", "x" * 300, "link/a.txt", "link", "folder", "nothing.txt", "nothing/a.txt",
    ],
)  # fmt: skip
def test_nothing_outside_failed_is_moved(spool: Spool, tmp_path: Path, target: str) -> None:
    """Paths that lead out of failed/, also by a link, are refused, as anybody in the group may name them."""
    (tmp_path / "a.txt").write_text("mine\n")
    (spool.paths.inbox / "a.txt").write_text("waits\n")
    (spool.paths.failed / "link").symlink_to(tmp_path)
    (spool.paths.failed / "folder").mkdir()

    with pytest.raises(UsageError):
        retry.retry(spool, target)
    assert (tmp_path / "a.txt").read_text() == "mine\n"
    assert files_below(spool.paths.inbox) == ["a.txt"]


def test_a_reason_that_names_another_job_moves_only_its_own_file(spool: Spool) -> None:
    """Anybody may write a reason, but the place of a job's file is the one that the daemon recorded."""
    parked_job(spool, "a.txt")
    refuse(spool, "b.txt")
    reason = (spool.paths.failed / "a.txt.error.json").read_bytes()
    (spool.paths.failed / "b.txt.error.json").write_bytes(reason)
    again = retry.retry(spool, "b.txt")

    assert again is None
    assert files_below(spool.paths.inbox) == ["b.txt"]
    assert (spool.paths.failed / "a.txt").exists()


def test_a_marker_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """Somebody may have put FILE.done there as a link; the file is dropped beside it."""
    spool = make_spool(tmp_path, watch={"ready_suffix": ".done"})
    spool.folders.init()
    refuse(spool, "a.txt")
    (spool.paths.inbox / "a.txt.done").symlink_to(tmp_path / "aim")
    retry.retry(spool, "a.txt")

    assert not (tmp_path / "aim").exists()
    assert files_below(spool.paths.inbox) == ["a.txt", "a.txt.done"]


@pytest.mark.parametrize("swapped", ["link", "pipe", "folder"])
def test_only_a_regular_file_is_moved_back(spool: Spool, tmp_path: Path, swapped: str) -> None:
    """What somebody has put into the place of a parked job's file stays there, and the job stays parked."""
    job = parked_job(spool, "a.txt")
    place = spool.paths.failed / "a.txt"
    place.unlink()
    {
        "link": lambda: place.symlink_to(tmp_path / "aim"),
        "pipe": lambda: os.mkfifo(place),
        "folder": place.mkdir,
    }[swapped]()

    with pytest.raises(untrusted.NotPlain):
        retry.retry(spool, "a.txt")
    assert os.path.lexists(place)
    assert spool.paths.home("parked", job.id).is_dir()
    assert files_below(spool.paths.home("parked", job.id) / "drop") == []


@pytest.mark.parametrize(
    "target", ["../inbox/a.txt", "/etc/passwd", "sub/../../a.txt", "", 7, None]
)
def test_a_forged_place_is_none(spool: Spool, target: object) -> None:
    """A record that leads out of failed/ says nothing; the job's file stays where it is."""
    job = parked_job(spool, "a.txt")
    home = spool.paths.home("parked", job.id)
    plan = json.loads((home / "failing.json").read_bytes())
    (home / "failing.json").write_text(json.dumps({**plan, "target": target}))
    put(spool, "a.txt")
    recovery.recover(spool)

    assert spool.parked.targets() == []
    assert (spool.paths.failed / "a.txt").exists()
    assert (spool.paths.inbox / "a.txt").exists()


def test_a_job_that_has_not_quite_ended_is_not_dropped_again(spool: Spool) -> None:
    """Its file lies in failed/ already while its outbox folder is in trouble: a retry waits for its end."""
    job = claimed_job(spool, "a.txt")
    claim.take(job)
    record.fail_image(job, 1, "no luck")
    away = spool.paths.outbox.rename(spool.paths.root / "away")
    with pytest.raises(OSError, match="outbox"):
        ending.finish(spool, job)
    away.rename(spool.paths.outbox)

    with pytest.raises(OSError, match="has not ended yet"):
        retry.retry(spool, "a.txt")
    ending.finish(spool, job)
    again = retry.retry(spool, "a.txt")

    assert again
    assert again.id == job.id


def test_a_retry_that_is_cut_short_is_completed(tmp_path: Path) -> None:
    """Whenever the daemon dies, the retry is done once, by recovery or when the command is read again."""
    n, died = 0, True
    while died:
        n += 1
        spool = make_spool(tmp_path / str(n))
        spool.folders.init()
        job = parked_job(spool, "a.txt")
        died = crash_at.dies_before(n, partial(retry.retry, spool, "a.txt"))
        left, unresolved = recovered(spool)
        if not left and (again := retry.retry(spool, "a.txt")):
            left.append(again)

        assert [(one.id, one.todo()) for one in left] == [(job.id, [2, 3])]
        assert unresolved == []
        publish.recover(left[0], spool.outbox)
        assert left[0].drop.read_text() == "a\n"
        assert files_below(spool.paths.failed) == []
    assert n > 5


def test_no_folder_is_made_that_is_never_entered(spool: Spool) -> None:
    """A target may lie deeper in failed/ than the inbox is looked at."""
    deep = "/".join(["d"] * 1500)
    fs.make_directories(spool.paths.failed, deep, 0o775)
    with untrusted.below(spool.paths.failed, deep) as folder:
        (folder / "a.txt").write_text("a cat\n")
    with pytest.raises(UsageError):
        retry.retry(spool, f"{deep}/a.txt")
    subprocess.run(["rm", "-rf", str(spool.paths.failed / "d")], check=True)

    assert list(spool.paths.inbox.iterdir()) == []


def test_a_retry_that_had_trouble_is_completed(spool: Spool) -> None:
    """The job is pending already, but nobody has accepted it: the same command goes on with it."""
    job = parked_job(spool, "a.txt")
    pending = spool.paths.home("pending", job.id)
    retry.unpark(spool, spool.paths.home("parked", job.id))  # and then a disk failed
    again = retry.retry(spool, "a.txt")

    assert again
    assert (again.id, again.home) == (job.id, pending)
    assert spool.parked.targets() == []


def test_a_recovery_that_had_trouble_is_completed(spool: Spool) -> None:
    """A job whose retry a crash cut short is gone on with, also if it is recovered by itself."""
    job = parked_job(spool, "a.txt")
    parked = spool.paths.home("parked", job.id)
    (spool.paths.failed / "a.txt").rename(parked / "drop/a.txt")
    left = [recovery.recover_one(make_spool(spool.paths.root.parent), parked) for _ in range(2)]

    assert [one.id for one in left if isinstance(one, Job)] == [job.id, job.id]
    assert not parked.exists()


@pytest.mark.parametrize("name", ["a.old", "a.txt.error.json.bak", ".a.txt", "note"])
def test_only_what_a_job_file_is_called_goes_back(spool: Spool, name: str) -> None:
    """A command may name anything in failed/; in the inbox other names would lie for ever."""
    (spool.paths.failed / name).write_text("a cat\n")
    with pytest.raises(UsageError):
        retry.retry(spool, name)

    assert (spool.paths.failed / name).exists()
    assert list(spool.paths.inbox.iterdir()) == []


def test_a_reason_is_no_job(spool: Spool) -> None:
    """It stays beside its file, though its name ends like a job file's; without such a file it is one."""
    refuse(spool, "a.txt")
    refuse(spool, "b.error.json")
    with pytest.raises(UsageError):
        retry.retry(spool, "a.txt.error.json")
    retry.retry(spool, "b.error.json")

    assert files_below(spool.paths.failed) == ["a.txt", "a.txt.error.json"]
    assert files_below(spool.paths.inbox) == ["b.error.json"]
