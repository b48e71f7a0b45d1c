"""The images of a job, in a folder where the whole group may write."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from promptdrop.cli import client
from promptdrop.spool.spool import Spool

OURS = "20261128T100000000000-aaaaaa"
THEIRS = "20261128T100000000000-bbbbbb"


@pytest.fixture
def home(spool: Spool) -> Path:
    """The outbox folder of our job, with one image."""
    folder = spool.paths.outbox / "cat"
    folder.mkdir()
    publish(folder, 1)
    return folder


def document(number: int, file: str) -> dict[str, Any]:
    """The part of a sidecar that says which image it is of."""
    image = {"job": {"id": OURS, "image": number}, "image": {"file": file}}
    return {"schema": "promptdrop.image/1", **image}


def publish(folder: Path, number: int, **changes: Any) -> Path:
    """Put an image and its sidecar there; returns the image."""
    picture = folder / f"cat-{number:04d}.png"
    picture.write_text(f"pixels {number}")
    sidecar = folder / f"cat-{number:04d}.json"
    sidecar.write_text(json.dumps({**document(number, picture.name), **changes}))
    return picture


def contents(spool: Spool, folder: str = "cat") -> list[str]:
    """The bytes of our job's images."""
    return [found.file.read().decode() for found in client.pictures(spool, OURS, folder)]


def test_pictures_come_in_order(spool: Spool, home: Path) -> None:
    """Images come by number, each open and with its sidecar; other JSON files are passed over."""
    for number in (10, 9):
        publish(home, number)
    (home / "stranger.json").write_text("[]")
    (home / "job.json").write_text("{}")
    found = list(client.pictures(spool, OURS, "cat"))

    assert [one.path for one in found] == [home / f"cat-{n:04d}.png" for n in (1, 9, 10)]
    assert [one.sidecar.job.image for one in found] == [1, 9, 10]
    assert found[1].sidecar.latency_ms.render is None
    assert contents(spool) == ["pixels 1", "pixels 9", "pixels 10"]


@pytest.mark.parametrize(
    "changes",
    [
        {"job": {"id": THEIRS, "image": 2}},
        {"job": {"id": OURS, "image": 3}},
        {"job": {"id": [], "image": 2}},
        {"job": []},
        {"schema": "promptdrop.image/2"},
        {"latency_ms": {"render": 10**400}},
        {"latency_ms": {"render": float("inf")}},
        {"request": {"seed": "7"}},
        {"steps_ms": "many"},
    ],
)
def test_a_sidecar_of_something_else(spool: Spool, home: Path, changes: dict[str, Any]) -> None:
    """One of another job, image or schema, or with a value that does not fit, is as if it were not there."""
    publish(home, 2, **changes)

    assert contents(spool) == ["pixels 1"]


@pytest.mark.parametrize(
    "file",
    ["/secret.png", "../secret.png", "../cat/cat-0002.png", "..", ".hidden.png", "secret.txt", "x\0.png",
     "\ud800.png", "a\x1b[2J.png", "link.png", "pipe.png", "folder.png", "gone.png", "n" * 300 + ".png"],
)  # fmt: skip
def test_a_picture_is_a_plain_file_beside_its_sidecar(spool: Spool, home: Path, file: str) -> None:
    """No path, no link, pipe or folder, and nothing that is no picture is opened."""
    secret = spool.paths.outbox / "secret.png"
    for name in (secret, home / "secret.txt", home / ".hidden.png", home / "a\x1b[2J.png"):
        name.write_text("a secret")
    (home / "link.png").symlink_to(secret)
    os.mkfifo(home / "pipe.png")
    (home / "folder.png").mkdir()
    publish(home, 2, image={"file": str(secret) if file == "/secret.png" else file})

    assert contents(spool) == ["pixels 1"]


def test_no_file_is_read_that_is_larger_than_ours_are(spool: Spool, home: Path) -> None:
    """A sidecar of 8 GiB, and the sidecar of a picture of 8 GiB, are as if they were not there."""
    os.truncate(publish(home, 2), 8 << 30)
    os.truncate(publish(home, 3).with_suffix(".json"), 8 << 30)

    assert contents(spool) == ["pixels 1"]


def test_a_number_comes_once(spool: Spool, home: Path) -> None:
    """Of two sidecars of one image the second is passed over."""
    (home / "dog-0001.json").write_text(json.dumps(document(1, "cat-0001.png")))

    assert contents(spool) == ["pixels 1"]


@pytest.mark.parametrize(
    "folder", ["link", "link/cat", "../outbox/cat", "gone", "cat/cat-0001.png"]
)
def test_a_folder_is_reached_through_no_link(spool: Spool, home: Path, folder: str) -> None:
    """What is no folder below the outbox has no pictures."""
    (spool.paths.outbox / "link").symlink_to(home if folder == "link" else spool.paths.outbox)

    assert contents(spool, folder) == []
