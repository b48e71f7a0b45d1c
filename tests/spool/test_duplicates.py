"""Files that were taken before (inbox.duplicates: refuse)."""

import os
import time

from promptdrop.spool import claim
from promptdrop.spool.duplicates import KEPT_DAYS
from promptdrop.spool.job import Unresolved
from promptdrop.spool.spool import Spool

LIMIT = 1000  # bytes


def drop(spool: Spool, path: str, text: str) -> Unresolved:
    """Drop a file and claim it."""
    sub, _, file = path.rpartition("/")
    (spool.paths.inbox / sub).mkdir(exist_ok=True)
    (spool.paths.inbox / path).write_text(text)
    return claim.claim(spool, sub, file)


def test_the_same_bytes_from_the_same_folder_are_known(spool: Spool) -> None:
    """They are known under any name; from another folder they may be somebody else's."""
    dropped = [
        drop(spool, path, text)
        for path, text in (
            ("a.txt", "one"), ("b.txt", "one"), ("sub/a.txt", "one"), ("a.txt", "two"),
        )
    ]  # fmt: skip
    found = [spool.duplicates.find_or_remember(one, LIMIT) for one in dropped]

    assert found == [None, "a.txt", None, None]
    assert spool.duplicates.find_or_remember(dropped[0], LIMIT) is None  # asked again after a crash


def test_a_job_that_did_not_end_well_may_come_back(spool: Spool) -> None:
    """The note is removed only by the job that it is of."""
    first, second = drop(spool, "a.txt", "one"), drop(spool, "b.txt", "one")
    spool.duplicates.find_or_remember(first, LIMIT)
    spool.duplicates.forget(second, LIMIT)
    still = spool.duplicates.find_or_remember(second, LIMIT)
    spool.duplicates.forget(first, LIMIT)

    assert still == "a.txt"
    assert spool.duplicates.find_or_remember(second, LIMIT) is None


def test_what_cannot_be_read_whole_is_not_known(spool: Spool) -> None:
    """A file that a writer has made larger, or that was moved, is neither remembered nor refused."""
    large, gone = drop(spool, "a.txt", "x" * (LIMIT + 1)), drop(spool, "b.txt", "b")
    gone.drop.unlink()
    for one in (large, gone):
        assert spool.duplicates.find_or_remember(one, LIMIT) is None
        spool.duplicates.forget(one, LIMIT)

    assert not spool.paths.taken.exists()


def test_files_are_forgotten_in_the_end(spool: Spool) -> None:
    """They are forgotten after thirty days, so that the state folder does not grow for ever."""
    first, second = drop(spool, "a.txt", "one"), drop(spool, "b.txt", "one")
    spool.duplicates.find_or_remember(first, LIMIT)
    spool.duplicates.forget_old()
    young = spool.duplicates.find_or_remember(second, LIMIT)
    (note,) = (p for p in spool.paths.taken.rglob("*") if p.is_file())
    then = time.time() - KEPT_DAYS * 86400 - 1
    os.utime(note, (then, then))
    spool.duplicates.forget_old()

    assert young == "a.txt"
    assert not note.exists()
