"""Dropping a file into a spool, and waiting until its job has ended."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from promptdrop.cli import client
from promptdrop.cli.client import Dropped, Ended
from promptdrop.errors import ConfigError, PromptdropError, UsageError
from promptdrop.records import Status
from promptdrop.spool.spool import Spool
from spools import claimed, claimed_job, finish, init_spool, make_spool, refuse, resolved
from statuses import end, write_status


def wait(spool: Spool, dropped: Dropped, *steps: Callable[[], Any]) -> tuple[Ended, list[str]]:
    """Wait for one file, doing one step at each look. Returns how it ended and where it was seen."""
    todo, seen = iter(steps), []

    def look(_: Status | None, drops: list[Dropped]) -> None:
        seen.extend(one.where for one in drops)
        next(todo, lambda: None)()

    (ended,) = client.wait(spool, [dropped], look, sleep=lambda seconds: None)
    return ended, seen


def test_a_drop_is_whole_at_once_and_takes_no_name(spool: Spool) -> None:
    """A name that is taken becomes FILE~2; no temporary is left; the inode is the file's own."""
    first = client.drop(spool, b"a", "cat.txt", "s")
    second = client.drop(spool, b"b", "cat.txt", "s")
    folder = spool.paths.inbox / "s"

    assert (first.path, second.path) == ("s/cat.txt", "s/cat~2.txt")
    assert sorted(os.listdir(folder)) == ["cat.txt", "cat~2.txt"]
    assert (folder / "cat.txt").read_bytes() == b"a"
    assert second.inode == (folder / "cat~2.txt").stat().st_ino


def test_a_drop_has_its_marker(tmp_path: Path) -> None:
    """With watch.ready_suffix, the marker is made beside the file."""
    spool = init_spool(tmp_path, watch={"ready_suffix": ".done"})
    client.drop(spool, b"a", "cat.txt")

    assert sorted(os.listdir(spool.paths.inbox)) == ["cat.txt", "cat.txt.done"]


def test_without_an_inbox_nothing_is_dropped(tmp_path: Path) -> None:
    """The error has status 78 and names the command that makes the folders."""
    with pytest.raises(ConfigError, match="no such inbox; make the spool with: promptdrop init"):
        client.drop(make_spool(tmp_path), b"a", "cat.txt")


def test_a_prompt_names_its_file() -> None:
    """The file is named after the first words, made safe; two files of one prompt differ."""
    name = client.name_of_prompt("A red fox, in ../the snow! " + "x" * 200)

    assert name.startswith("A_red_fox_in_the_snow_")
    assert name.endswith(".json")
    assert len(name) <= 50
    assert client.name_of_prompt("a") != client.name_of_prompt("a")
    assert client.name_of_prompt("///").startswith("prompt-")


def test_a_status_is_of_a_daemon_that_runs(spool: Spool) -> None:
    """The status that a stopped daemon has left is ignored, and so is one that is torn."""
    write_status(spool.paths.status, state="paused")

    assert client.read_status(spool) is None
    spool.lock.acquire()
    status = client.read_status(spool)
    spool.paths.status.write_text("{")
    torn = client.read_status(spool)
    spool.lock.release()

    assert status is not None
    assert status.state == "paused"
    assert torn is None


def test_waiting_sees_a_file_in_each_place(spool: Spool) -> None:
    """A file is followed from the inbox through its claim until job.json stands."""
    dropped = client.drop(spool, b"a cat", "cat.txt", "s")
    jobs: list[Any] = []
    ended, seen = wait(
        spool,
        dropped,
        lambda: jobs.append(claimed(spool, "s/cat.txt")),
        lambda: jobs.append(resolved(spool, jobs[0])),
        lambda: finish(spool, jobs[1]),
    )

    assert seen == ["inbox", "being claimed", "in hand"]
    assert ended == Ended("done", "s/cat", None, dropped.job_id)
    assert dropped.job_id == jobs[1].id


def test_the_errors_of_a_job_are_told(spool: Spool) -> None:
    """The errors of the first three failed images are read from job.json."""
    dropped = client.drop(spool, b"a cat", "cat.txt")
    made = resolved(spool, claimed(spool, "cat.txt"), images=5)
    ended, _ = wait(spool, dropped, lambda: finish(spool, made, "e1", "e2", "e3", "e4"))

    assert ended == Ended("partial", "cat", "e1; e2; e3", made.id)


def test_a_refused_file_is_known_from_the_status(spool: Spool) -> None:
    """It never had a record, so inode, path and time tell its end from that of an earlier job."""
    dropped = client.drop(spool, b"", "a\x1b.txt")
    refused = end("a\\x1b.txt", "refused", inode=dropped.inode, error="is empty")
    earlier = {**refused, "finished": "2000-01-01T00:00:00.000Z", "error": "another"}
    stranger = {**refused, "inode": dropped.inode + 1, "finished": "9999-01-01T00:00:00.000Z"}
    own = {**refused, "finished": "9998-01-01T00:00:00.000Z"}

    def refuse_it() -> None:
        (spool.paths.inbox / dropped.path).unlink()
        write_status(spool.paths.status, finished=[earlier, own, stranger])

    assert wait(spool, dropped, refuse_it)[0] == Ended("refused", None, "is empty", "id")


def test_a_withdrawn_file_is_not_waited_for(spool: Spool) -> None:
    """A file that is gone for five seconds is lost; one that comes back sooner is waited for."""
    dropped = client.drop(spool, b"a", "cat.txt")
    path, away = spool.paths.inbox / "cat.txt", spool.paths.root / "away"
    moments = iter(range(100))
    moves = iter([lambda: path.rename(away), lambda: away.rename(path), lambda: path.rename(away)])
    looks = []

    def look(_: Status | None, drops: list[Dropped]) -> None:
        looks.append(drops[0].where)
        next(moves, lambda: None)()

    with pytest.raises(PromptdropError, match="no longer in the spool; somebody withdrew it"):
        client.wait(spool, [dropped], look, lambda: next(moments), lambda seconds: None)

    assert looks[:4] == ["inbox", "gone", "inbox", "gone"]


def test_ends_come_in_the_order_of_the_drops(spool: Spool) -> None:
    """The order of finishing does not matter; each look is told which drops are still open."""
    drops = [client.drop(spool, b"a", name) for name in ("a.txt", "b.txt")]
    jobs = [resolved(spool, claimed(spool, name)) for name in ("a.txt", "b.txt")]
    opened: list[list[str]] = []

    def look(status: Status | None, still: list[Dropped]) -> None:
        assert status is None  # no daemon runs
        opened.append([one.path for one in still])
        if jobs:
            finish(spool, jobs.pop())

    ends = client.wait(spool, drops, look, sleep=lambda seconds: None)

    assert [one.folder for one in ends] == ["a", "b"]
    assert opened == [["a.txt", "b.txt"], ["a.txt"], []]


def test_a_status_of_another_version_ends_no_wait(owned: Spool) -> None:
    """Keys that are new, lacking or of another type are no error."""
    dropped = client.drop(owned, b"a", "cat.txt")
    made = resolved(owned, claimed(owned, "cat.txt"))
    other = {"state": "dreaming", "finished": [{"id": "x"}], "jobs": 5, "new": [1]}
    owned.paths.status.write_text(json.dumps(other))
    ended, _ = wait(owned, dropped, lambda: finish(owned, made))

    assert ended.outcome == "done"


def test_what_is_no_job_in_hand(spool: Spool) -> None:
    """Refused files, a stranger's folder and a torn record are not listed and raise no error."""
    refuse(spool, "a.txt", "is empty")
    (spool.paths.state / "pending" / "stranger").mkdir()
    for text in ("{", '{"id": "x"}'):
        torn = claimed_job(spool, "cat.txt")
        (torn.home / "request.json").write_text(text)

    assert list(client.jobs_in_hand(spool)) == []


# --- a spool where others are at work -----------------------------------------------------------


@pytest.mark.parametrize("sub", ["night", "night/s", "s/night", "file"])
def test_nothing_is_dropped_through_a_link(spool: Spool, tmp_path: Path, sub: str) -> None:
    """A link or a file in the place of a sub-folder is named, and nothing is made behind it."""
    behind = tmp_path / "behind"
    behind.mkdir()
    (spool.paths.inbox / "s").mkdir()
    for link in ("night", "s/night"):
        (spool.paths.inbox / link).symlink_to(behind)
    (spool.paths.inbox / "file").touch()

    with pytest.raises(
        UsageError, match="a link, or no folder; expected a sub-folder of the inbox"
    ):
        client.drop(spool, b"a", "cat.txt", sub)
    assert list(behind.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "file"])
def test_a_marker_that_is_taken(tmp_path: Path, kind: str) -> None:
    """Where something has the marker's name, file and marker get other names; no link is followed."""
    spool = init_spool(tmp_path, watch={"ready_suffix": ".done"})
    marker, target = spool.paths.inbox / "cat.txt.done", tmp_path / "target"
    if "link" in kind:
        marker.symlink_to(target)
    if kind == "link":
        target.write_text("a secret")
    if kind == "folder":
        marker.mkdir()
    if kind == "file":
        marker.touch()
    dropped = client.drop(spool, b"a", "cat.txt")

    assert dropped.path == "cat~2.txt"
    assert sorted(os.listdir(spool.paths.inbox)) == ["cat.txt.done", "cat~2.txt", "cat~2.txt.done"]
    assert target.exists() == (kind == "link")


@pytest.mark.parametrize(
    ("mode", "directory_mode", "expected"),
    [
        ("0664", "2775", (0o664, 0o2775)),
        ("0660", "2770", (0o660, 0o2770)),
        ("0640", "2750", (0o640, 0o2770)),
        ("0600", "0700", (0o600, 0o2770)),
        ("0444", "0555", (0o644, 0o2775)),
    ],
)
def test_the_mode_of_a_drop(
    tmp_path: Path, mode: str, directory_mode: str, expected: tuple[int, int]
) -> None:
    """It keeps from people what output.mode keeps from them; we and the daemon can always use it."""
    output = {"mode": mode, "directory_mode": directory_mode}
    spool = init_spool(tmp_path, watch={"ready_suffix": ".done"}, output=output)
    client.drop(spool, b"a", "cat.txt", "s")
    folder = spool.paths.inbox / "s"
    file, inner, marker = (
        stat.S_IMODE((folder / name).stat().st_mode) for name in ("cat.txt", "", "cat.txt.done")
    )

    assert (file, inner) == expected
    assert marker == file


@pytest.mark.parametrize("forged", ["link", "huge", "wrong", "folder", "another's"])
def test_a_job_json_that_is_not_ours_ends_no_wait(
    spool: Spool, tmp_path: Path, forged: str
) -> None:
    """It is as if it were not there, until job.json is the job's again."""
    dropped = client.drop(spool, b"a cat", "cat.txt")
    made = resolved(spool, claimed(spool, "cat.txt"))
    own, kept = spool.paths.outbox / "cat/job.json", tmp_path / "kept"

    def forge() -> None:
        finish(spool, made)
        document = json.loads(own.read_bytes())
        own.rename(kept)
        if forged == "link":
            own.symlink_to(kept)
        elif forged == "huge":
            own.touch()
            os.truncate(own, 8 << 30)
        elif forged == "wrong":
            own.write_text(json.dumps({**document, "images": [{"error": 5}]}))
        elif forged == "another's":
            own.write_text(json.dumps({**document, "id": "x", "outcome": "failed"}))
        else:
            own.mkdir()

    def restore() -> None:
        (own.rmdir if own.is_dir() else own.unlink)()
        kept.rename(own)

    ended, seen = wait(spool, dropped, forge, lambda: None, restore)

    assert ended.outcome == "done"
    assert seen[-2:] == ["gone", "gone"]
