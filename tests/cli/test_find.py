"""The jobs that a NAME of `cancel` or `retry` fits."""

import pytest

from promptdrop.cli import find
from promptdrop.errors import UsageError
from promptdrop.spool import claim
from promptdrop.spool.spool import Spool
from spools import claimed, claimed_job, finish, put, refuse


def test_jobs_in_hand_by_each_of_their_names(spool: Spool) -> None:
    """An id, SUB/FILE, SUB/FILE as a terminal shows it, and SUB/JOB fit a pending or active job."""
    pending, active = claimed_job(spool, "a.txt"), claimed_job(spool, "s/b\x1b.txt")
    claim.take(active)

    for name in ("a.txt", "a", pending.id):
        assert [match.target for match in find.unfinished(spool, name)] == [pending.id]
    for name in ("s/b\x1b.txt", "s/b\\x1b.txt", active.folder, active.id):
        assert [match.target for match in find.unfinished(spool, name)] == [active.id]


def test_jobs_that_are_not_in_hand(spool: Spool) -> None:
    """A file in the inbox, one that is claimed and not resolved, and a finished one fit no name."""
    put(spool, "new.txt")
    put(spool, "claimed.txt")
    claimed(spool, "claimed.txt")
    finish(spool, claimed_job(spool, "done.txt"))

    for name in ("new.txt", "claimed.txt", "done.txt", "done", ""):
        assert find.unfinished(spool, name) == []


def test_failed_files_by_each_of_their_names(spool: Spool) -> None:
    """An id, SUB/FILE and SUB/JOB fit a failed job, its path alone a refused file; None fits all."""
    partial = claimed_job(spool, "s/a.txt", images=2)
    finish(spool, partial, "no luck")
    refuse(spool, "b.txt", "is empty")
    (spool.paths.failed / "stranger.txt").touch()

    for name in ("s/a.txt", "s/a", partial.id):
        assert [match.target for match in find.failed(spool, name)] == ["s/a.txt"]
    assert [match.target for match in find.failed(spool, "b.txt")] == ["b.txt"]
    assert find.failed(spool, "stranger.txt") == []
    assert [match.description for match in find.failed(spool, None)] == [
        "refused  b.txt: is empty",
        f"{partial.id}  s/a.txt: image 1: no luck",
    ]


def test_a_reason_that_is_torn(spool: Spool) -> None:
    """A file in failed/ can be retried by its path whatever lies beside it, which is named as unreadable."""
    refuse(spool, "a.txt", "is empty")
    for text in ("{", "[]", '{"error": 5, "id": ["x"]}'):
        (spool.paths.failed / "a.txt.error.json").write_text(text)

        assert find.failed(spool, "a.txt") == [
            find.Match("a.txt", "unknown  a.txt: its reason cannot be read")
        ]


def test_the_only_one() -> None:
    """No match and several matches are wrong usage; several are listed."""
    one, two = find.Match("x", "x  a.txt"), find.Match("y", "y  s/a.txt")

    assert find.only([one], "a", "in hand") is one
    with pytest.raises(UsageError, match="a: no such job in hand"):
        find.only([], "a", "in hand")
    with pytest.raises(UsageError, match=r"fits 2 jobs, nothing was done.*\n  x  a.txt\n  y  s/a"):
        find.only([one, two], "a", "in hand")


def test_a_parked_job_whose_reason_was_taken_away_is_found(spool: Spool) -> None:
    """The daemon's own record says where its file lies, and why."""
    job = claimed_job(spool, "a.txt")
    finish(spool, job, "no luck")
    (spool.paths.failed / "a.txt.error.json").unlink()

    assert [match.target for match in find.failed(spool, job.id)] == ["a.txt"]
    assert [match.target for match in find.failed(spool, None)] == ["a.txt"]
