"""Clocks that jump, descriptors that run out, pipes nobody reads, names that mean harm, twins."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from harness import Daemon, until

Make = Callable[..., Daemon]
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)

# time.sleep fails under libfaketime (EINVAL), so the engine, which sleeps, lives in real time.
UNFAKED_CHILDREN = (
    "import os, sys; del os.environ['LD_PRELOAD']; "
    "from promptdrop.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def test_the_wall_clock_may_jump(make_daemon: Make, tmp_path: Path) -> None:
    """It jumps a day forwards during an image, and two days back and one forwards during others. Nothing
    times out, nothing is charged, and latencies are those of the monotonic clock."""
    if FAKETIME is None:
        pytest.skip("libfaketime is not installed")
    clock = tmp_path / "clock"
    clock.write_text("+0d")
    daemon = make_daemon({"engine": {"image_timeout_seconds": 20, "stall_seconds": 20}})
    daemon.start(
        wrapper=[sys.executable, "-c", UNFAKED_CHILDREN],
        env={
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        },
    )
    for name, jump in (("a", "+1d"), ("b", "-1d"), ("c", "+0d")):
        go = daemon.home / name
        daemon.drop(f"{name}.txt", f"!wait {go}\n")
        daemon.until_log("job.claimed", file=f"{name}.txt")
        daemon.until_begun()
        clock.write_text(jump)
        time.sleep(0.9)  # the least that its latency must be
        go.touch()
        assert daemon.job(name)["outcome"] == "done"
    sidecars = [daemon.sidecars(name)[0] for name in ("a", "b", "c")]
    started = [datetime.fromisoformat(s["time"]["started"]) for s in sidecars]
    status = daemon.until_status("all three", lambda s: s["images_published"] == 3)

    assert [round((b - a).total_seconds() / 86400) for a, b in pairwise(started)] == [-2, 1]
    assert [s["job"]["attempt"] for s in sidecars] == [1, 1, 1]
    assert all(900 <= s["latency_ms"]["total"] < 60_000 for s in sidecars)
    assert [s["job"]["id"] for s in sidecars] == sorted(s["job"]["id"] for s in sidecars)
    assert status["reason"] is None
    assert daemon.log("engine.killed") == []
    daemon.kill()  # a stop waits with a timeout, which libfaketime makes EINVAL


def test_out_of_descriptors_is_waited_out(daemon: Daemon) -> None:
    """If no file can be opened, no memory shared and no engine started, the daemon says so and lives.
    With descriptors again all goes on, and no image was charged."""
    daemon.start().until_ready()
    assert daemon.process
    pid = daemon.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    daemon.drop("a.txt", "a cat\n")
    reason = daemon.until_log("disk.trouble")["reason"]
    os.kill(daemon.engine_pid(), signal.SIGKILL)
    daemon.until_log("engine.not_started")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)

    assert "Too many open files" in reason
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["job"]["attempt"] == 1
    daemon.until_status("no reason", lambda s: s["reason"] is None)
    assert daemon.stop() == 0


def test_memory_for_pixels_that_cannot_be_had_is_waited_for(daemon: Daemon) -> None:
    """If descriptors run out between claim and render, the image is put back, uncharged."""
    assert daemon.run("pause").returncode == 0
    daemon.start().until_ready()
    daemon.drop("a.txt", "a cat\n")
    daemon.until_log("job.claimed")
    assert daemon.process
    pid = daemon.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    daemon.until_log("disk.trouble")
    assert daemon.run("resume").returncode == 0
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)

    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["job"]["attempt"] == 1
    assert daemon.stop() == 0


def test_a_log_that_nobody_reads_stops_nothing(daemon: Daemon) -> None:
    """Jobs go on while stderr is a full pipe, as behind a pager or a terminal stopped by Ctrl-S, and the
    daemon stops when it is told to."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    daemon.process = subprocess.Popen(
        [sys.executable, "-m", "promptdrop", "run", "--config", str(daemon.config)],
        stderr=write,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    os.close(write)
    for n in range(30):
        daemon.drop(f"{n}.txt", "a cat\n")
    for n in range(30):
        assert daemon.job(str(n))["outcome"] == "done"
    until(lambda: not daemon.unfinished(), "the end of the last job")

    assert daemon.stop() == 0
    os.close(read)


def test_control_characters_never_reach_a_terminal(make_daemon: Make) -> None:
    """A bell and a title sequence, in names or in files, are escaped everywhere we print."""
    daemon = make_daemon({"log": {"format": "console"}})
    harm = "\x1b]0;harm\x07"
    daemon.drop(f"{harm}good.txt", f'--prompt "{harm}" --seed 1\n')
    daemon.drop(f"{harm}bad.yaml", f'prompt: x\nsize: "\\x1b]0;harm\\x07"\n"{chr(92)}x07": 1\n')
    done = daemon.drain()
    daemon.start()
    until(lambda: daemon.status().get("state") == "ready", "a daemon that is ready")
    waiting = daemon.drop(f"{harm}waits.yaml", "promt: 1\n")
    said = [done.stdout, done.stderr, daemon.log_file.read_text()]
    for command in (
        ["status"],
        ["status", "--json"],
        ["doctor"],
        ["check", str(waiting), str(daemon.failed / f"{harm}bad.yaml")],
        ["retry", f"{harm}bad.yaml"],
        ["cancel", f"{harm}never.txt"],
    ):
        ran = daemon.run(*command)
        said += [ran.stdout, ran.stderr]
    assert daemon.stop() == 0

    assert done.returncode == 0
    assert "harm" in "".join(said)
    for text in said:
        assert "\x07" not in text
        assert "\x1b]" not in text


def test_of_daemons_started_at_once_one_runs(daemon: Daemon) -> None:
    """One owns the spool; the others exit 75 and touch nothing."""
    daemon.drop("a.txt", "a cat\n")
    twins = [
        subprocess.Popen(
            daemon.command("run"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(4)
    ]
    try:
        ended = until(
            lambda: [t for t in twins if t.poll() is not None][2:] and twins, "three ends"
        )
        assert daemon.job("a")["outcome"] == "done"
        assert sorted(str(t.poll()) for t in ended) == ["75", "75", "75", "None"]
    finally:
        for twin in twins:
            twin.terminate()
            twin.wait(30)
