"""The end of a job: the place of its file, and the record of the reason."""

import fcntl
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import crash_at
from promptdrop.errors import Problem
from promptdrop.outbox import publish
from promptdrop.spool import claim, ending, record
from promptdrop.spool.job import ImageState, Job
from promptdrop.spool.spool import Spool
from spools import claimed_job, files_below, make_spool, publication, recovered

PROBLEMS = [Problem("unknown field 'promt'", line=2, field="promt")]


def ended_job(spool: Spool, path: str, *outcomes: Any) -> Job:
    """A job in hand whose images have these outcomes."""
    job = claimed_job(spool, path, images=len(outcomes))
    claim.take(job)
    for number, outcome in enumerate(outcomes, 1):
        if outcome == "rendered":
            publication(job, number).run(spool.outbox)
        elif outcome == "failed":
            record.fail_image(job, number, "no luck")
    return job


def read(path: Path) -> dict[str, Any]:
    """A JSON document."""
    loaded: dict[str, Any] = json.loads(path.read_bytes())
    return loaded


@pytest.mark.parametrize(
    ("outcomes", "cancelled", "expected"),
    [
        (["rendered", "rendered"], False, "done"),
        (["rendered", "failed"], False, "partial"),
        (["placeholder", "failed"], False, "failed"),
        (["rendered", "todo"], True, "cancelled"),
        (["rendered", "rendered"], True, "done"),  # the cancel came too late
    ],
)
def test_the_images_decide_how_a_job_ended(
    spool: Spool, outcomes: list[Any], cancelled: bool, expected: str
) -> None:
    """The outcome follows from the images; a placeholder does not count as rendered."""
    job = claimed_job(spool, "a.txt", images=2)
    job.cancelled = cancelled
    for number, outcome in enumerate(outcomes, 1):
        job.states[number] = ImageState(outcome)

    assert ending.outcome_of(job) == expected


def test_the_file_of_a_done_job_lies_beside_its_images(spool: Spool) -> None:
    """job.json is there, too; nothing of the job is left in the state folder."""
    job = ended_job(spool, "sub/a.txt", "rendered")
    ending.finish(spool, job)

    assert files_below(job.outbox_folder) == [
        "a-0001.json", "a-0001.png", "job.json", "request.txt",
    ]  # fmt: skip
    assert read(job.outbox_folder / "job.json")["outcome"] == "done"
    assert not list(spool.paths.homes("pending", "active", "parked", "finished"))


def test_the_file_of_a_failed_job_lies_in_failed_with_its_reason(spool: Spool) -> None:
    """The job's records are kept for `retry`."""
    job = ended_job(spool, "sub/a.txt", "rendered", "failed")
    ending.finish(spool, job)
    reason = read(spool.paths.failed / "sub/a.txt.error.json")

    assert (spool.paths.failed / "sub/a.txt").read_text() == "a\n"
    assert (reason["outcome"], reason["missing"]) == ("partial", [2])
    assert reason["error"] == "image 2: no luck"
    assert read(job.outbox_folder / "job.json")["outcome"] == "partial"
    assert list(spool.paths.homes("parked")) == [str(spool.paths.home("parked", job.id))]


def test_a_refused_file_lies_in_failed_with_its_reason(spool: Spool) -> None:
    """Nothing else of it is kept, since `retry` just drops the file again."""
    (spool.paths.inbox / "a.yaml").write_text("promt: a\n")
    ending.refuse(spool, claim.claim(spool, "", "a.yaml"), PROBLEMS)
    reason = read(spool.paths.failed / "a.yaml.error.json")

    assert reason["outcome"] == "refused"
    assert reason["problems"][0]["line"] == 2
    assert files_below(spool.paths.failed) == ["a.yaml", "a.yaml.error.json"]
    assert not list(spool.paths.homes("pending", "active", "parked", "finished"))


def test_nothing_in_failed_is_overwritten(spool: Spool) -> None:
    """A file or a reason that somebody left stays; SUB~2 is used if a file is named like the folder."""
    for path in ("a.txt", "b.txt.error.json", "sub"):
        (spool.paths.failed / path).write_text("mine\n")
    for path in ("a.txt", "b.txt", "sub/c.txt"):
        ending.finish(spool, ended_job(spool, path, "failed"))

    assert files_below(spool.paths.failed) == [
        "a.txt", "a~2.txt", "a~2.txt.error.json", "b.txt.error.json",
        "b~2.txt", "b~2.txt.error.json", "sub", "sub~2/c.txt", "sub~2/c.txt.error.json",
    ]  # fmt: skip


def test_a_job_is_refused_before_its_first_image(spool: Spool) -> None:
    """Its outbox folder is removed, unless somebody has put something there."""
    empty, used = claimed_job(spool, "a.txt"), claimed_job(spool, "b.txt")
    (used.outbox_folder / "note").write_text("mine\n")
    for job in (empty, used):
        ending.refuse_job(spool, job, PROBLEMS)

    assert not empty.outbox_folder.exists()
    assert files_below(used.outbox_folder) == ["note"]
    assert claimed_job(spool, "a.txt").folder == "a"  # its name is free again


@pytest.mark.parametrize("outcome", ["rendered", "failed"])
def test_an_end_that_is_cut_short_is_completed(tmp_path: Path, outcome: str) -> None:
    """Whenever the daemon dies, the next life ends the job, and its file lies in one place."""
    n, died = 0, True
    while died:
        n += 1
        spool = make_spool(tmp_path / str(n))
        spool.folders.init()
        job = ended_job(spool, "a.txt", outcome)
        died = crash_at.dies_before(n, partial(ending.finish, spool, job))
        left, _ = recovered(spool)
        for again in left:
            publish.recover(again, spool.outbox)
            ending.finish(spool, again)

        assert (job.outbox_folder / "job.json").exists()
        assert (job.outbox_folder / "request.txt").exists() == (outcome == "rendered")
        assert (spool.paths.failed / "a.txt").exists() == (outcome == "failed")
        assert (spool.paths.failed / "a.txt.error.json").exists() == (outcome == "failed")
        assert not list(spool.paths.homes("pending", "active", "finished"))
        assert not [p for p in files_below(spool.paths.root) if ".promptdrop-" in p]
    assert n > 5


def test_a_refusal_that_is_cut_short_is_completed(tmp_path: Path) -> None:
    """Whenever the daemon dies, the file is refused, or becomes a claim that is read again."""
    n, died = 0, True
    while died:
        n += 1
        spool = make_spool(tmp_path / str(n))
        spool.folders.init()
        (spool.paths.inbox / "a.txt").write_text("a\n")
        claimed = claim.claim(spool, "", "a.txt")
        died = crash_at.dies_before(n, partial(ending.refuse, spool, claimed, PROBLEMS))
        _, left = recovered(spool)
        for again in left:
            ending.refuse(spool, again, PROBLEMS)

        assert files_below(spool.paths.failed) == ["a.txt", "a.txt.error.json"]
        assert not list(spool.paths.homes("pending", "active", "finished"))
    assert n > 5


def test_nobodys_file_in_the_place_of_the_request_is_waited_for(spool: Spool) -> None:
    """A lease on a file of that name, or its size, costs nothing: the dropped file gets the next name."""
    job = ended_job(spool, "a.txt", "rendered")
    os.truncate(job.drop, 64 << 30)  # sparse: a writer has it open still
    request = job.outbox_folder / "request.txt"
    request.touch()
    os.truncate(request, 64 << 30)
    with request.open("r+b") as file:
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # whoever opens it breaks the lease: fcntl(2)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        ended = ending.finish(spool, job)

    assert ended == "done"
    assert (job.outbox_folder / "request~2.txt").stat().st_size == 64 << 30
