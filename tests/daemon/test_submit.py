"""`submit`, with and without --wait."""

import os
import subprocess
import sys
from pathlib import Path

from harness import Daemon, MakeDaemon


def test_submit_wait_exits_with_the_outcome(make_daemon: MakeDaemon) -> None:
    """It is 0 for done; 1 for failed, partial and refused, with the reason. Each --prompt is a job."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.start().until_ready()
    done = daemon.run("submit", "--wait", "--prompt", "a cat", "--count", "2", "--seed", "7")
    failed = daemon.run("submit", "--wait", "--prompt", "!raise")
    refused = daemon.run("submit", "--wait", "--prompt", "a cat", "--width", "65")
    two = daemon.run("submit", "--wait", "--prompt", "a dog", "--prompt", "a fox")
    usage = daemon.run("submit", "--wait")

    assert two.returncode == 0
    assert two.stdout.count("done ") == 2
    assert (done.returncode, failed.returncode, refused.returncode) == (0, 1, 1)
    assert usage.returncode == 2
    assert "scripted by !raise" in failed.stdout
    assert "width" in refused.stdout
    (home,) = {p.parent for p in daemon.outbox.rglob("*-0002.png")}
    assert [s["request"]["seed"] for s in daemon.sidecars(home.name)] == [7, 8]
    assert daemon.stop() == 0


def test_submit_waits_for_a_daemon_to_come(daemon: Daemon, tmp_path: Path) -> None:
    """It says that none runs, and ends when one has rendered the job."""
    job = tmp_path / "cats.txt"
    job.write_text("a cat\n")
    with subprocess.Popen(
        daemon.command("submit", "--wait", "--folder", "sub", str(job)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=daemon.home,
    ) as waiting:
        assert waiting.stderr
        said = waiting.stderr.readline()
        daemon.start()
        out, _ = waiting.communicate(timeout=60)

    assert "no daemon" in said
    assert waiting.returncode == 0
    assert "done sub/cats.txt" in out
    assert daemon.job("sub/cats")["outcome"] == "done"
    assert job.exists()
    assert daemon.stop() == 0


def test_submit_wait_is_not_fooled_by_an_earlier_job(daemon: Daemon, tmp_path: Path) -> None:
    """A job with the same file name and inode number that has ended before is not taken for this one."""
    job = tmp_path / "a.txt"
    job.write_text("a cat\n")
    daemon.start().until_ready()
    first = daemon.run("submit", "--wait", str(job))
    request = daemon.outbox / "a/request.txt"
    link = daemon.home / "kept"
    os.link(request, link)  # the first job's inode, to be dropped again under its old name
    daemon.run("pause")
    daemon.until_log("daemon.paused")
    inode = link.stat().st_ino
    link.rename(daemon.inbox / "a.txt")
    program = (
        "import os, sys; from pathlib import Path; from promptdrop.cli import client; from promptdrop import clock; from promptdrop import config_file;"
        "from promptdrop.spool.spool import Spool;"
        "spool = Spool(config_file.load(Path(sys.argv[1])));"
        "dropped = client.Dropped('a.txt', int(sys.argv[2]), clock.timestamp());"
        "client.wait(spool, [dropped], lambda status, drops: os._exit(9))"
    )
    again = subprocess.run(
        [sys.executable, "-c", program, str(daemon.config), str(inode)],
        timeout=60,
        check=False,
    )

    assert first.returncode == 0
    assert again.returncode == 9  # it waits: the second job has not ended
    assert daemon.stop() == 0


def test_submit_wait_of_more_files_than_the_status_lists(daemon: Daemon, tmp_path: Path) -> None:
    """However many jobs end meanwhile, each one's outcome is known."""
    files = [tmp_path / f"job{n:03d}.yaml" for n in range(120)]
    for n, path in enumerate(files):
        path.write_text(
            f"prompt: a cat\npriority: {min(n, 100)}\n" if n else "prompt: a\npriority: -100\n"
        )
    daemon.write_config({"watch": {"settle_seconds": 0}, "defaults": {"steps": 1}})
    daemon.run("pause")
    daemon.start().until_ready()
    with subprocess.Popen(
        daemon.command("submit", "--wait", *map(str, files)), stdout=subprocess.PIPE, text=True
    ) as waiting:
        daemon.until_log("job.claimed", times=120)
        daemon.run("resume")
        out, _ = waiting.communicate(timeout=60)

    assert waiting.returncode == 0, out[-500:]
    assert len([line for line in out.splitlines() if line.startswith("done ")]) == 120
    assert daemon.stop() == 0


def test_submit_takes_files_with_any_name(daemon: Daemon, tmp_path: Path) -> None:
    """A name that is not UTF-8 is submitted and shown escaped."""
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write("a cat\n")
    done = subprocess.run(
        [*map(os.fsencode, daemon.command("submit")), path],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=60,
        check=False,
    )
    checked = subprocess.run(
        [*map(os.fsencode, daemon.command("check")), path],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr.decode()[-300:]
    assert rb"caf\xe9.txt" in done.stdout
    assert checked.returncode == 0, checked.stderr.decode()[-300:]
    assert os.listdir(os.fsencode(daemon.inbox)) == [b"caf\xe9.txt"]


def test_submit_marks_its_files_ready(daemon: Daemon) -> None:
    """With watch.ready_suffix, `submit` makes the marker of each file that it drops."""
    daemon.write_config({"watch": {"ready_suffix": ".done"}})
    daemon.start().until_ready()
    done = daemon.run("submit", "--prompt", "a cat", "--wait")

    assert done.returncode == 0, done.stderr
    assert daemon.stop() == 0
