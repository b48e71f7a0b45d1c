"""The log has JSON lines only: whatever else reaches stderr becomes lines of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness import PATIENCE_SECONDS, Daemon, MakeDaemon, works

# Run at the start of the daemon and its engines, beside whatever promptdrop does.
NOISE = """
import ctypes, os, sys, threading, time, warnings, logging

def speak(who):
    warnings.warn("a warning of the " + who, RuntimeWarning)
    logging.getLogger("library").error("a complaint of the %s", who)
    print("printed by the " + who + chr(27) + "]0;harm" + chr(7), file=sys.stderr)
    print("on stdout by the " + who, flush=True)
    ctypes.CDLL(None).write(2, b"raw bytes of the " + who.encode() + b" \\xff\\n", 20 + len(who))
    print("cut off by the " + who, end="", file=sys.stderr, flush=True)

def begin(who, module, wanted):
    while not getattr(sys.modules.get(module), wanted, False):
        time.sleep(0.01)
    speak(who)
    if who == "daemon":
        raise ValueError("a thread of the daemon")

if "run" in sys.argv:
    threading.Thread(target=begin, args=("daemon", "promptdrop.captured", "_is_captured"), daemon=True).start()
elif "promptdrop.engines.worker" in sys.orig_argv:
    threading.Thread(target=begin, args=("engine", "promptdrop.engines.gradient", "GradientEngine"), daemon=True).start()
"""


def with_site(tmp_path: Path, text: str) -> dict[str, str]:
    """The environment of processes that run a text at their start."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")}


def lines(daemon: Daemon) -> list[dict[str, Any]]:
    """Every line of the log; each is one JSON object."""
    read = [json.loads(line) for line in daemon.log_file.read_text().splitlines()]
    assert all({"timestamp", "level", "event"} <= line.keys() for line in read)
    return read


def test_whatever_reaches_stderr_is_a_line_of_the_log(daemon: Daemon, tmp_path: Path) -> None:
    """Warnings, prints, logging, raw writes of C and half lines, of the daemon and of its engine; a
    traceback is one line."""
    daemon.start(env=with_site(tmp_path, NOISE))
    for who in ("daemon", "engine"):
        for said in (
            *(f"a complaint of the {who}", f"on stdout by the {who}", f"cut off by the {who}"),
            *(f"raw bytes of the {who} \\xff", f"printed by the {who}\\x1b]0;harm\\x07"),
        ):
            if said != "on stdout by the daemon":  # which the harness has sent elsewhere
                daemon.until_log("stderr.line", text=said)
    daemon.until_log("python.warning", text="a warning of the daemon", kind="RuntimeWarning")
    (died,) = [e for e in (daemon.until_log("thread.died"),) if "a thread of" in e["exception"]]
    works(daemon)

    assert daemon.stop() == 0
    assert died["exception"].startswith("Traceback")
    assert any("a warning of the engine" in e["text"] for e in daemon.log("stderr.line"))
    assert lines(daemon)


def test_an_unknown_error_that_ends_the_daemon_is_one_line(daemon: Daemon, tmp_path: Path) -> None:
    """The exit status is 1, and the traceback is in the log, whatever its level."""
    fault = """
import sys
if "run" in sys.argv:
    import promptdrop.supervisor.gate as gate
    def broken(*_):
        raise ValueError("scripted")
    gate.Gate.surveyed = broken
"""
    daemon.write_config({"log": {"level": "error"}})
    daemon.start(env=with_site(tmp_path, fault))
    assert daemon.process

    assert daemon.process.wait(PATIENCE_SECONDS) == 1
    (died,) = [line for line in lines(daemon) if line["event"] == "daemon.died"]
    assert died["exception"].endswith("ValueError: scripted")


def test_a_refused_start_says_so_in_the_log(daemon: Daemon) -> None:
    """What a command would print is a line, too, whatever log.level is; the exit status is as ever."""
    daemon.write_config({"log": {"level": "error"}})
    daemon.start().until_status("a start", lambda status: status)
    second = daemon.run("run")
    daemon.stop()
    (said,) = [json.loads(line) for line in second.stderr.splitlines()]

    assert second.returncode == 75
    assert (said["event"], "another promptdrop daemon" in said["text"]) == ("stderr.line", True)


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_a_daemon_that_a_fatal_signal_ended_is_explained_by_the_next(
    daemon: Daemon, number: int
) -> None:
    """As systemd's watchdog ends a loop that hangs: where each thread was is one line of the next life."""
    daemon.start().until_ready()
    assert daemon.process
    daemon.process.send_signal(number)
    assert daemon.process.wait(PATIENCE_SECONDS) == -number
    mode = (daemon.own / "last-words").stat().st_mode & 0o777
    left = (daemon.own / "last-words").read_text()
    daemon.start()
    said = daemon.until_log("daemon.had_died")
    daemon.stop()
    daemon.start().until_log("daemon.started", times=3)
    daemon.stop()

    assert mode == 0o600
    assert "supervisor.py" in said["exception"]
    assert said["exception"] == left
    assert len(daemon.log("daemon.had_died")) == 1
    assert lines(daemon)


def test_the_last_words_of_an_engine_are_in_the_log(daemon: Daemon) -> None:
    """Of a segfault: Python's own account of where it was."""
    daemon.write_config({"engine": {"max_attempts": 1}})
    daemon.start().until_ready()
    daemon.drop("a.txt", "!segfault\n")
    daemon.error("a.txt")
    daemon.stop()
    said = [line["text"] for line in lines(daemon) if line["event"] == "stderr.line"]

    assert any("Segmentation fault" in text for text in said)
    assert any("gradient.py" in text for text in said)


def test_a_log_that_nobody_reads_stops_no_library(daemon: Daemon, tmp_path: Path) -> None:
    """stderr is a pipe that is full: what is written there does not block whoever writes; what is lost is
    counted in a line of its own."""
    flood = """
import os, sys, threading, time
def flood():
    while not getattr(sys.modules.get("promptdrop.captured"), "_is_captured", False):
        time.sleep(0.01)
    for n in range(40_000):
        os.write(2, b"%d " % n + b"x" * 100 + bytes([10]))
    open(os.environ["FLOODED"], "w").close()
if "run" in sys.argv:
    threading.Thread(target=flood, daemon=True).start()
"""
    flooded = tmp_path / "flooded"
    env = {**os.environ, **with_site(tmp_path, flood), "FLOODED": str(flooded)}
    daemon.process = subprocess.Popen(
        daemon.command("run"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env
    )
    daemon.drop("a.txt", "a cat\n")
    assert daemon.job("a")["outcome"] == "done"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not flooded.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert flooded.exists()
    daemon.process.send_signal(signal.SIGTERM)
    _, said = daemon.process.communicate(timeout=PATIENCE_SECONDS)
    read = [json.loads(line) for line in said.splitlines()]

    assert daemon.process.returncode == 0
    assert [line["lines"] > 10_000 for line in read if line["event"] == "log.lost"][:1] == [True]


def test_a_line_without_end_comes_in_pieces(daemon: Daemon, tmp_path: Path) -> None:
    """No line of the log is longer than a few KiB, whatever a library prints."""
    daemon.start(
        env=with_site(tmp_path, NOISE.replace('"printed by', '"y" * 100_000 + "printed by'))
    )
    daemon.until_log("stderr.line", text="cut off by the daemon")
    daemon.stop()
    said = "".join(e["text"] for e in daemon.log("stderr.line"))

    assert max(len(line) for line in daemon.log_file.read_text().splitlines()) < 20_000
    assert said.count("y") >= 100_000


def test_a_console_escapes_every_value(make_daemon: MakeDaemon) -> None:
    """A terminal is sent no control character by a name, a reason or a library."""
    code = (
        "from promptdrop import log; log.set_up('info', 'console'); harm = '\\x1b]0;harm\\x07';"
        "log.get().info('a.b', name=harm, many=[harm], error='x\\n' + harm); log.settle()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stderr.count("harm") == 3
    assert "\x1b]" not in done.stderr
    assert "\x07" not in done.stderr
    assert done.stderr.count("\n") == 1
