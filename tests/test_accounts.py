"""The soak's own counting: what is lost, there twice, torn or left about is told, and nothing else."""

import hashlib
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import accounts

JOB, OTHER = "20260101T000000000000-abcdef", "20260101T000000000000-fedcba"
TIMES = ("2026-01-01T00:00:00.000Z", "2026-01-01T00:00:09.000Z")
DEATH = datetime.fromisoformat("2026-01-01T00:00:05.000Z").timestamp()
TEXT = "a cat\n" * 2  # the dropped file of seeds 1 and 2


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What a soak leaves of one job of two images: one in the outbox, one in a reader's archive."""
    for folder in ("spool/outbox/a", "spool/failed", "archive/dave/1", "other", "people/dave/1"):
        (tmp_path / folder).mkdir(parents=True)
    line = {"doing": "dropped", "path": "a.txt", "sha256": digest(TEXT.encode()), "seeds": [1, 2]}
    (tmp_path / "people/alice.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "spool/outbox/a/request.txt").write_text(TEXT)
    summary = {"schema": "promptdrop.job/1", "outcome": "done", "images": [{"seed": 1}]}
    (tmp_path / "spool/outbox/a/job.json").write_text(json.dumps(summary))
    put(tmp_path / "spool/outbox/a", 1)
    put(tmp_path / "archive/dave/1", 2)
    return tmp_path


def digest(data: bytes) -> str:
    """The SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def put(folder: Path, seed: int, job: str = JOB, more: str = "") -> Path:
    """Put an image of this seed and its sidecar into a folder. Returns the image."""
    image = folder / f"a-{seed:04d}.png"
    image.write_bytes(f"picture Seed: {seed}, {more}".encode())
    sidecar: dict[str, Any] = {"schema": "promptdrop.image/1", "request": {"seed": seed}}
    sidecar |= {
        "job": {"id": job, "image": seed},
        "time": {"published": TIMES["people" in str(folder)]},
    }
    sidecar |= {"image": {"file": image.name, "sha256": digest(image.read_bytes())}}
    image.with_suffix(".json").write_text(json.dumps(sidecar))
    return image


def test_a_night_in_which_all_went_well(home: Path) -> None:
    """Images are counted wherever readers took them."""
    figures = accounts.count(home, deaths=[])

    assert (figures["images"], figures["delivered"], figures["duplicates"]) == (2, 2, 0)


def test_an_image_that_a_reader_deleted_counts(home: Path) -> None:
    """What a reader deleted having seen image and sidecar was delivered."""
    for path in sorted((home / "archive/dave/1").iterdir()):
        path.rename(home / "people/dave/1" / path.name)

    assert accounts.count(home, deaths=[])["delivered"] == 2


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("archive/dave/1/a-0002.png", "1 of 2 images are lost"),
        ("archive/dave/1/a-0002.json", "1 of 2 images are lost"),
        ("spool/outbox/a/a-0001.json", "in the outbox without a sidecar"),
        ("spool/outbox/a/job.json", "no job.json says that it is done"),
        ("spool/outbox/a/request.txt", "is in 0 places"),
    ],
)
def test_what_is_lost_is_told(home: Path, gone: str, said: str) -> None:
    """Nobody's doing explains it, so that it is named."""
    (home / gone).unlink()

    with pytest.raises(AssertionError, match=said):
        accounts.count(home, deaths=[1.0] * 9)


def test_an_image_that_came_twice(home: Path) -> None:
    """The same image twice is explained by a death of the daemon; another one of its seed by nothing."""
    put(home / "people/dave/1", 1)
    assert accounts.count(home, deaths=[DEATH])["duplicates"] == 1
    with pytest.raises(AssertionError, match="twice, and no death in between"):
        accounts.count(home, deaths=[])

    put(home / "people/dave/1", 1, more="another")
    with pytest.raises(AssertionError, match="as different images"):
        accounts.count(home, deaths=[DEATH])
    put(home / "people/dave/1", 1, job=OTHER)
    with pytest.raises(AssertionError, match="as different images"):
        accounts.count(home, deaths=[DEATH])


def test_a_picture_that_is_not_what_its_sidecar_says(home: Path) -> None:
    """The SHA-256 in each sidecar is looked at."""
    with (home / "archive/dave/1/a-0002.png").open("ab") as file:
        file.write(b"torn")

    with pytest.raises(AssertionError, match="is not what its sidecar says"):
        accounts.count(home, deaths=[DEATH])


def test_what_lies_about_is_told(home: Path) -> None:
    """A temporary in the spool is never right; in what was taken it needs a death."""
    taken = home / "archive/dave/1/.promptdrop-1.tmp"
    taken.touch()
    assert accounts.count(home, deaths=[DEATH])["temporaries_taken"] == 1
    with pytest.raises(AssertionError, match="temporaries_taken"):
        accounts.count(home, deaths=[])

    os.rename(taken, home / "spool/outbox/a" / taken.name)
    with pytest.raises(AssertionError, match="1 temporaries are left in the spool"):
        accounts.count(home, deaths=[DEATH])


def test_a_file_that_went_takes_its_images_along(home: Path) -> None:
    """Images of a file that somebody took back, or cleared from failed/, are not missed."""
    (home / "archive/dave/1/a-0002.png").unlink()
    (home / "spool/outbox/a/job.json").unlink()
    (home / "spool/outbox/a/request.txt").rename(home / "people/dave/1/a.txt")

    assert accounts.count(home, deaths=[])["gone_with_their_file"] == 1


def test_a_file_in_two_places(home: Path) -> None:
    """Each dropped file is in one place."""
    (home / "spool/failed/a.txt").write_text(TEXT)

    with pytest.raises(AssertionError, match=r"a\.txt is in 2 places"):
        accounts.count(home, deaths=[])
