"""`generate`: the files it writes, the engine it uses, and the images that an interruption leaves."""

import os
import signal
import subprocess
from pathlib import Path

from harness import Daemon, until


def test_where_images_go(daemon: Daemon) -> None:
    """A file's ending is the format, or is added; in a folder each image keeps its own name."""
    (daemon.home / "folder").mkdir()
    assert daemon.run("generate", "cat", "-o", "named").returncode == 0
    assert daemon.run("generate", "cat", "-o", "folder").returncode == 0
    assert daemon.run("generate", "cat", "-o", "new/", "--format", "webp").returncode == 0

    assert (daemon.home / "named.png").stat().st_size > 100
    assert len(list((daemon.home / "folder").glob("cat-*-0001.png"))) == 1
    assert len(list((daemon.home / "new").glob("cat-*-0001.webp"))) == 1


def test_an_interrupted_generate_keeps_what_is_finished(daemon: Daemon) -> None:
    """After SIGINT the finished images are put where they were asked for."""
    daemon.write_config({"engine": {"stop_seconds": 0}})
    command = daemon.command("generate", "--prompts", "a;!slow 60 b", "--output", "out")
    env = {**os.environ, "TMPDIR": str(daemon.home)}  # where its own spool is made
    with subprocess.Popen(
        command, cwd=daemon.home, env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        first = "promptdrop-*/spool/outbox/a-*/*-0001.json"
        until(lambda: list(daemon.home.glob(first)), "the first image")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)

    assert process.returncode == 1
    assert "interrupted" in said
    assert len(list((daemon.home / "out").glob("*.png"))) == 1


def test_generate_goes_through_the_daemon(daemon: Daemon, tmp_path: Path) -> None:
    """If a daemon runs, its engine renders the image, which is copied to where it was asked for."""
    daemon.start().until_ready()
    one = daemon.run("generate", "a fox", "-o", str(tmp_path / "fox.jpg"), "--seed", "7")
    failed = daemon.run("generate", "a fox", "-o", str(tmp_path / "no.png"), "--width", "65")
    several = daemon.run("generate", "--prompts", "cat;dog", "--output", str(tmp_path / "pets"))

    assert (one.returncode, several.returncode) == (0, 0)
    assert (tmp_path / "fox.jpg").read_bytes()[:3] == b"\xff\xd8\xff"
    assert str(tmp_path / "fox.jpg") in one.stdout
    pets = sorted(path.name for path in (tmp_path / "pets").iterdir())
    assert [name.partition("-")[0] for name in pets] == ["cat", "cat"]
    dropped = [entry["file"] for entry in daemon.log("job.claimed")]
    assert [name.rpartition("-")[0] for name in dropped] == ["generate-a_fox", "generate-cat"]
    assert failed.returncode == 2
    assert "width" in failed.stderr
    assert not (tmp_path / "no.png").exists()
    assert daemon.stop() == 0
    assert len(daemon.published()) == 3


def test_generate_with_an_engine_of_its_own(daemon: Daemon, tmp_path: Path) -> None:
    """--own-engine leaves daemon and spool alone; same seed, same picture."""
    daemon.start().until_ready()
    theirs, own = tmp_path / "theirs.png", tmp_path / "own.png"
    arguments = ("--seed", "7", "--size", "64x64")
    through = daemon.run("generate", "a fox", "-o", str(theirs), *arguments)
    alone = daemon.run("generate", "a fox", "-o", str(own), "--own-engine", *arguments)

    assert (through.returncode, alone.returncode) == (0, 0)
    assert theirs.read_bytes() == own.read_bytes()
    assert len(daemon.published()) == 1
    assert daemon.stop() == 0
