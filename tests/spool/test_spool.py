"""The queue on disk, called directly."""

import os
from pathlib import Path
from typing import Any

import pytest

from promptdrop import config, fs
from promptdrop.errors import ConfigError, DiskTrouble, SpoolBusy
from promptdrop.nouns import ImageSpec, Request
from promptdrop.spool import claim, recovery
from promptdrop.spool.detail import ClaimedSettings, Settled
from promptdrop.spool.job import Job
from promptdrop.spool.permissions import why_not_moved
from promptdrop.spool.spool import Spool

SPEC = ImageSpec(1, "a", None, 64, 64, 1, 0.0, 1, "euler", "png", 60.0)
SETTINGS = ClaimedSettings(config.Prompt(), config.Output(), 3, "fail")


def make_spool(tmp_path: Path, **keys: Any) -> Spool:
    """A spool on a temporary folder."""
    settings = config.parse({"root": str(tmp_path / "spool"), "model": {"id": "gradient"}, **keys})
    return Spool(settings)


def claimed_job(spool: Spool, sub: str, file: str, priority: int = 0, images: int = 1) -> Job:
    """Drop a file, claim and resolve it."""
    (spool.paths.inbox / sub).mkdir(exist_ok=True, parents=True)
    (spool.paths.inbox / sub / file).write_text("a\n")
    specs = tuple(ImageSpec(**{**SPEC.to_json(), "image": n + 1}) for n in range(images))
    claimed = claim.claim(spool, sub, file)
    return claim.resolve(
        spool, claimed, Request(specs, priority), Settled(0.0, spool.boot), SETTINGS
    )


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """An initialised spool."""
    made = make_spool(tmp_path)
    made.folders.init()
    return made


def test_a_newer_spool_is_refused(spool: Spool) -> None:
    """78: an old daemon must not touch what it does not understand."""
    (spool.paths.state / "version").write_text("99\n")

    with pytest.raises(ConfigError, match="version 99, written by a newer promptdrop"):
        spool.folders.prepare()


def test_one_daemon_per_spool(spool: Spool, tmp_path: Path) -> None:
    """The second is told the first one's pid; when the first ends, the spool is free."""
    spool.lock.acquire()
    other = make_spool(tmp_path)
    with pytest.raises(SpoolBusy, match=rf"pid {os.getpid()}"):
        other.lock.acquire()
    busy = other.lock.daemon_pid()
    spool.lock.release()

    assert busy == os.getpid()
    assert other.lock.daemon_pid() is None
    other.lock.acquire()
    other.lock.release()


@pytest.mark.parametrize("name", ["outbox", "failed"])
def test_folders_that_feed_on_themselves_are_refused(tmp_path: Path, name: str) -> None:
    """An outbox inside the inbox would be taken as jobs for ever."""
    inside = make_spool(tmp_path, paths={name: str(tmp_path / "spool" / "inbox" / "x")})

    with pytest.raises(ConfigError, match=rf"paths\.{name}: .* lies inside the inbox"):
        inside.folders.prepare()


def test_run_never_makes_a_configured_outbox(tmp_path: Path) -> None:
    """Where a mount is missing, an empty folder must not take its place."""
    outbox = tmp_path / "share"
    spool = make_spool(tmp_path, paths={"outbox": str(outbox)})
    spool.folders.prepare()

    assert not outbox.exists()
    with pytest.raises(DiskTrouble, match=f"outbox {outbox} is missing"):
        spool.folders.require()
    spool.folders.init()
    spool.folders.require()


def test_a_mount_point_is_remembered(spool: Spool) -> None:
    """One that was mounted and is not is missing, though an empty folder stands there."""
    fs.write_durably(spool.paths.state / "mounts.json", b'{"mounts": ["outbox"]}')
    spool.folders.prepare()

    with pytest.raises(DiskTrouble, match="was a mount point and is not mounted"):
        spool.folders.require()


def test_folders_are_never_shared(spool: Spool) -> None:
    """JOB, JOB~2 ... compared without case; a sub-folder is never mirrored into a job's folder."""
    folders = [
        claimed_job(spool, sub, file).folder
        for sub, file in (
            ("", "cat.txt"), ("", "cat.yaml"), ("", "CAT.txt"), ("cat", "dog.txt"),
            ("Night", "a.txt"), ("night", "a.txt"), ("a b", "con.txt"),
        )
    ]  # fmt: skip

    assert folders == [
        "cat", "cat~2", "CAT~3", "cat~4/dog", "Night/a", "Night/a~2", "a_b/con_",
    ]  # fmt: skip


def test_a_claim_of_a_withdrawn_file_leaves_nothing(spool: Spool) -> None:
    """Gone between look and rename: forgotten."""
    with pytest.raises(FileNotFoundError):
        claim.claim(spool, "", "gone.txt")

    assert list((spool.paths.state / "pending").iterdir()) == []


def test_ids_sort_by_arrival(spool: Spool) -> None:
    """Also within a microsecond, and when the wall clock is set back."""
    ids = [claimed_job(spool, "", f"{n}.txt").id for n in range(20)]
    spool.ids.last = "99991231T235959999999"
    later = [claimed_job(spool, "", f"later{n}.txt").id for n in range(2)]

    assert ids == sorted(ids)
    assert [*ids, *later] == sorted([*ids, *later])


def test_a_move_never_overwrites(tmp_path: Path) -> None:
    """Another file under the name stays; the same bytes are the rest of a move cut short."""
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / name).write_text(text)

    with pytest.raises(FileExistsError):
        fs.move(tmp_path / "a", tmp_path / "b")
    fs.move(tmp_path / "a", tmp_path / "c")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    assert (tmp_path / "b").read_text() == "two"


def test_a_free_name_is_free_in_any_case(spool: Spool) -> None:
    """`Cat` is taken where `cat` stands: some client could not tell them apart. So is status.json."""
    for stranger in ("cat", "CAT~2"):
        (spool.paths.outbox / stranger).mkdir()

    folders = [claimed_job(spool, "", file).folder for file in ("Cat.txt", "STATUS.json.txt")]

    assert folders == ["Cat~3", "STATUS.json~2"]


def test_a_name_is_free_again_once_its_folder_is_taken_away(spool: Spool) -> None:
    """What readers fetch and remove does not count."""
    first = claimed_job(spool, "sub", "Cat.txt")
    (spool.paths.outbox / "sub" / "stranger").mkdir()
    spool.outbox._live.clear()
    second = claimed_job(spool, "sub", "cat.txt")
    (spool.paths.outbox / first.folder).rmdir()
    spool.outbox._live.clear()
    third = claimed_job(spool, "SUB", "CAT.txt")

    assert [job.folder for job in (first, second, third)] == ["sub/Cat", "sub/cat~2", "sub/CAT"]


def test_a_ready_mark_goes_with_its_file(tmp_path: Path) -> None:
    """The next file of the name needs a mark of its own; a crash between the two is made good."""
    spool = make_spool(tmp_path, watch={"ready_suffix": ".done"})
    spool.folders.init()
    mark = spool.paths.inbox / "a.txt.done"
    mark.touch()
    claimed_job(spool, "", "a.txt")
    taken_along = not mark.exists()
    (spool.paths.inbox / "a.txt").write_text("a\n")
    claim.claim(spool, "", "a.txt")
    mark.touch()  # as if we had died before it was taken along
    recovery.recover(spool)

    assert taken_along
    assert not mark.exists()


def test_new_files_have_their_folders_group(tmp_path: Path) -> None:
    """Also where no setgid bit passes it on."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files to any group")
    os.chown(tmp_path, -1, 12345)
    os.chmod(tmp_path, 0o755)
    fs.make_directory(tmp_path / "folder", 0o2770)
    fs.write_durably(tmp_path / "folder" / "file", b"", 0o640)
    made = [os.stat(tmp_path / "folder"), os.stat(tmp_path / "folder" / "file")]

    assert [(s.st_gid, oct(s.st_mode & 0o7777)) for s in made] == [
        (12345, "0o2770"),
        (12345, "0o640"),
    ]


@pytest.mark.parametrize(
    ("mode", "words"),
    [(0o1777, "is sticky: only the owner of a file"), (0o755, "is read-only for us"), (0o777, "")],
)
def test_why_files_of_others_cannot_be_moved(tmp_path: Path, mode: int, words: str) -> None:
    """A sticky or read-only inbox is told in words, with the cure."""
    if os.geteuid() != 0:
        pytest.skip("needs a second user")
    tmp_path.chmod(mode)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.setuid(65534)
        os.write(write, (why_not_moved(Path()) or "").encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()

    assert words in told
    assert bool(words) == bool(told)
