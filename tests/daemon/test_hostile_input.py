"""Hostile files: swapped while we look, in folders we cannot read, or in jobs that grow."""

import os
import resource
import subprocess
from pathlib import Path

import pytest

import disks
from harness import Daemon, MakeDaemon, until, works
from promptdrop import config, untrusted
from promptdrop.nouns import Request
from promptdrop.request import parse
from promptdrop.spool import claim
from promptdrop.spool.detail import ClaimedSettings, Settled
from promptdrop.spool.failed import failures
from promptdrop.spool.spool import Spool
from spools import recovered
from users import obedient

# --- swaps between look and open ----------------------------------------------------------------


def test_a_folder_swapped_for_a_link_gives_nothing_away(spool: Spool, tmp_path: Path) -> None:
    """A claim follows no link below the inbox: files elsewhere stay where they are."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep/a.txt").write_text("a secret\n")
    (spool.paths.inbox / "sub").symlink_to(elsewhere)

    for sub in ("sub/deep", "sub"):
        with pytest.raises(untrusted.NotPlain):
            claim.claim(spool, sub, "a.txt")
    assert (elsewhere / "deep/a.txt").read_text() == "a secret\n"
    assert not list((spool.paths.state / "pending").iterdir())


def test_a_folder_in_the_place_of_a_file_stays_where_it_is(spool: Spool) -> None:
    """A folder that is swapped in just before the claim is put back with all that it holds."""
    (spool.paths.inbox / "a.txt").mkdir()
    (spool.paths.inbox / "a.txt/b.bin").write_text("mine\n")

    with pytest.raises(untrusted.NotPlain):
        claim.claim(spool, "", "a.txt")
    assert (spool.paths.inbox / "a.txt/b.bin").read_text() == "mine\n"
    assert not list((spool.paths.state / "pending").iterdir())


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_file_swapped_before_its_claim_is_moved_not_read(
    daemon: Daemon, tmp_path: Path, kind: str
) -> None:
    """A link or pipe that was claimed goes to failed/ as such, even on another file system."""
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret prompt\n")
    daemon.drain()
    home = daemon.own / "pending" / "20260101T000000000000-abcdef"
    (home / "drop").mkdir(parents=True)
    swapped = home / "drop" / "a.txt"
    swapped.symlink_to(secret) if kind == "link" else os.mkfifo(swapped)
    with disks.tmpfs(daemon.failed):
        done = daemon.drain()
        moved = daemon.failed / "a.txt"
        is_as_it_was = moved.is_symlink() if kind == "link" else moved.is_fifo()
        said = (daemon.failed / "a.txt.error.json").read_text()

    assert done.returncode == 0
    assert is_as_it_was
    assert "secret prompt" not in said + daemon.log_file.read_text()
    assert daemon.published() == []


def test_a_pipe_among_the_records_of_others_hangs_nobody(spool: Spool) -> None:
    """Anybody who may write to failed/ can leave a pipe named like a reason there; it is not read."""
    (spool.paths.failed / "a.txt").write_text("a cat\n")
    os.mkfifo(spool.paths.failed / "a.txt.error.json")

    assert list(failures(spool.paths.failed)) == [("a.txt", None)]


# --- folders --------------------------------------------------------------------------------


def test_a_folder_that_can_be_listed_but_not_entered_blocks_nobody(daemon: Daemon) -> None:
    """Mode 0744 shows names and refuses stat: the files in such a folder wait, all others go on."""
    wrapper = obedient()
    daemon.drop("theirs/a.txt", "a cat\n")
    (daemon.inbox / "theirs/inner").mkdir()
    (daemon.inbox / "theirs").chmod(0o644)
    try:
        daemon.start(wrapper=wrapper).until_ready()
        works(daemon)
        status = daemon.status()
    finally:
        (daemon.inbox / "theirs").chmod(0o775)

    assert status["state"] != "waiting"
    assert daemon.job("theirs/a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_a_path_that_grows_too_long_blocks_nobody(daemon: Daemon) -> None:
    """Folders deeper than PATH_MAX cannot be opened by name and are left out; doctor says where."""
    here = os.open(daemon.inbox, os.O_RDONLY)
    for _ in range(30):  # 6 KB in all
        os.mkdir("d" * 200, dir_fd=here)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
        os.close(os.open("a.txt", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    daemon.start().until_ready()
    works(daemon)
    report = daemon.run("doctor").stdout
    stopped = daemon.stop()
    subprocess.run(["rm", "-rf", str(daemon.inbox / ("d" * 200))], check=True)

    assert "bytes is not entered" in report
    assert stopped == 0


# --- jobs that are small and ask for much ---------------------------------------------------


def test_a_long_prompt_is_recorded_once(spool: Spool) -> None:
    """With 80 KB of prompt and 16 KB of meta for 10,000 images, request.json stays the job's size."""
    asked = parse.parse(
        ("prompt: " + "😀" * 20_000 + "\ncount: 10000\nmeta: {a: " + "x" * 16_000 + "}\n").encode(),
        ".yaml",
        spool.config,
    )
    (spool.paths.inbox / "a.yaml").write_text("a cat\n")
    settings = spool.config
    job = claim.resolve(
        spool,
        claim.claim(spool, "", "a.yaml"),
        parse.with_seeds(asked, "x"),
        Settled(0.0, spool.boot),
        ClaimedSettings(settings.prompt, settings.output, 3, "fail"),
    )
    (again,), _ = recovered(spool)

    assert (job.home / "request.json").stat().st_size < 4_000_000
    assert again.specs == job.specs


def test_a_job_of_many_long_prompts_leaves_the_daemon_small(make_daemon: MakeDaemon) -> None:
    """The daemon's own memory stays near what it was, and the job can be cancelled."""
    daemon = make_daemon()
    daemon.start().until_ready()
    works(daemon)
    assert daemon.process
    before = _resident_mib(daemon.process.pid)
    content = (
        "prompt: '!slow 5 " + "😀" * 19_000 + "'\ncount: 10000\nmeta: {a: " + "x" * 16_000 + "}\n"
    )
    daemon.drop("a.yaml", content)
    daemon.until_log("job.claimed", times=2)
    daemon.until_begun()
    grown = _resident_mib(daemon.process.pid) - before
    daemon.run("cancel", "a.yaml")
    until(lambda: daemon.log("job.cancelled") or daemon.job("a"), "the end of the job")

    assert grown < 64
    assert daemon.stop() == 0


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def test_with_seeds_keeps_what_images_share() -> None:
    """10,000 images of one prompt share one string in memory."""
    asked = parse.parse(b"prompt: a cat\ncount: 3\n", ".yaml", config.parse({"model": {"id": "x"}}))
    seeded: Request = parse.with_seeds(asked, "x")

    assert len({id(spec.prompt) for spec in seeded.images}) == 1
