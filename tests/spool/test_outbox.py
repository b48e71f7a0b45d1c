"""The jobs' folders in the outbox, and their names."""

import subprocess

import pytest

from promptdrop.spool.spool import Spool
from spools import claimed, claimed_job, put, resolved


def test_folders_are_never_shared(spool: Spool) -> None:
    """Names are compared without case (JOB, JOB~2); no sub-folder is mirrored into a job's folder."""
    paths = (
        "cat.txt", "cat.yaml", "CAT.txt", "cat/dog.txt",
        "Night/a.txt", "night/a.txt", "a b/con.txt",
    )  # fmt: skip
    folders = [claimed_job(spool, path).folder for path in paths]

    assert folders == [
        "cat", "cat~2", "CAT~3", "cat~4/dog", "Night/a", "Night/a~2", "a_b/con_",
    ]  # fmt: skip


def test_a_free_name_is_free_in_any_case(spool: Spool) -> None:
    """`Cat` is taken if `cat` exists, as some clients cannot tell them apart. status.json is taken, too."""
    for stranger in ("cat", "CAT~2"):
        (spool.paths.outbox / stranger).mkdir()

    folders = [claimed_job(spool, path).folder for path in ("Cat.txt", "STATUS.json.txt")]

    assert folders == ["Cat~3", "STATUS.json~2"]


def test_a_name_is_free_again_once_its_folder_is_taken_away(spool: Spool) -> None:
    """A folder that readers have removed does not count as taken."""
    first = claimed_job(spool, "sub/Cat.txt")
    (spool.paths.outbox / "sub" / "stranger").mkdir()
    spool.outbox.release(first)
    second = claimed_job(spool, "sub/cat.txt")
    first.outbox_folder.rmdir()
    spool.outbox.release(second)
    third = claimed_job(spool, "SUB/CAT.txt")

    assert [job.folder for job in (first, second, third)] == ["sub/Cat", "sub/cat~2", "sub/CAT"]


def test_a_job_in_hand_keeps_its_name(spool: Spool) -> None:
    """It keeps the name also if its folder was removed: its next image goes there again."""
    first = claimed_job(spool, "cat.txt")
    first.outbox_folder.rmdir()
    second = claimed_job(spool, "cat.txt")

    assert (first.folder, second.folder) == ("cat", "cat~2")


def test_a_file_named_like_a_sub_folder_stays(spool: Spool) -> None:
    """A file of a reader in the way of a sub-folder is kept; the sub-folder gets another name."""
    (spool.paths.outbox / "sub").write_text("mine\n")

    assert claimed_job(spool, "sub/a.txt").folder == "sub~2/a"
    assert (spool.paths.outbox / "sub").read_text() == "mine\n"


def test_a_folder_that_was_taken_away_is_made_again(spool: Spool) -> None:
    """The folders above it are made, too, since a reader may have removed the whole tree."""
    job = claimed_job(spool, "sub/a.txt")
    job.outbox_folder.rmdir()
    job.outbox_folder.parent.rmdir()
    spool.outbox.renew(job)

    assert job.outbox_folder.is_dir()


def test_an_outbox_that_takes_no_folder_is_trouble(spool: Spool) -> None:
    """Not one name after the other is tried there: the claimed file waits, and has the first in the end."""
    put(spool, "a.txt")
    unresolved, outbox = claimed(spool, "a.txt"), str(spool.paths.outbox)
    closed = subprocess.run(["chattr", "+i", outbox], capture_output=True, check=False)
    if closed.returncode:
        pytest.skip(f"no folder can be made immutable here: {closed.stderr.decode()}")
    try:
        with pytest.raises(PermissionError):
            resolved(spool, unresolved)
    finally:
        subprocess.run(["chattr", "-i", outbox], check=True)

    assert resolved(spool, unresolved).folder == "a"
