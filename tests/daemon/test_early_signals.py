"""SIGINT and SIGTERM at any moment of a start.

What Python itself does before our first line is Python's: there SIGINT ends the process as a signal or
with Python's own traceback.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from harness import PATIENCE_SECONDS, REPOSITORY, Daemon, MakeDaemon, alive, until

EARLY = f"{REPOSITORY / 'tests' / 'support' / 'early'}:{REPOSITORY / 'daemon'}"
MOMENTS = (
    *("promptdrop.cli.main", "argparse", "promptdrop.cli.parser", "promptdrop.config_file", "yaml"),
    *("structlog", "pydantic", "promptdrop.supervisor.supervisor", "promptdrop.pool.process"),
)


def ends_without_an_engine(daemon: Daemon, status: int) -> None:
    """Assert that a signalled start has ended as a stop does, and that no engine is left."""
    said = daemon.log_file.read_text()

    assert (status, "Traceback" in said) == (0, False), said
    assert not any(alive(line["pid"]) for line in daemon.log("engine.starting"))


@pytest.mark.parametrize("module", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_daemon_is_imported_ends_it(
    make_daemon: MakeDaemon, module: str, number: int
) -> None:
    """The exit status is 0, the daemon says that it stops, and no engine was begun."""
    daemon = make_daemon()
    daemon.start(env={"PYTHONPATH": EARLY, "SIGNAL_AT": f"{module}:{int(number)}"})
    assert daemon.process
    ends_without_an_engine(daemon, daemon.process.wait(PATIENCE_SECONDS))

    assert daemon.log("daemon.stopping")
    assert daemon.log("engine.starting") == []


def test_a_signal_at_any_moment_of_a_start_ends_it(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """Moments all over the first second after our first line."""
    for n in range(16):
        daemon, begun = make_daemon(home=f"home{n}"), tmp_path / f"begun{n}"
        daemon.start(env={"PYTHONPATH": EARLY, "TOUCH_AT": f"promptdrop.cli.main:{begun}"})
        until(begun.exists, "the first line of ours")
        time.sleep(n / 16)
        assert daemon.process
        daemon.process.send_signal(signal.SIGINT)
        ends_without_an_engine(daemon, daemon.process.wait(PATIENCE_SECONDS))


def test_a_signal_once_there_is_a_daemon_ends_it(make_daemon: MakeDaemon) -> None:
    """Whatever the engine is at just then, it goes with the daemon."""
    for event in ("daemon.started", "engine.starting", "engine.stage", "engine.ready"):
        daemon = make_daemon(home=event)
        daemon.start().until_log(event)
        ends_without_an_engine(daemon, daemon.stop(signal.SIGINT))


def test_a_second_signal_while_it_is_imported_ends_it_at_once(
    daemon: Daemon, tmp_path: Path
) -> None:
    """Nothing is in hand yet; the exit status is 0 all the same."""
    begun = tmp_path / "begun"
    wait = {"SIGNAL_AT": f"promptdrop.cli.parser:{int(signal.SIGSTOP)}"}
    touch = {"TOUCH_AT": f"promptdrop.cli.main:{begun}"}
    daemon.start(env={"PYTHONPATH": EARLY, **wait, **touch})
    until(begun.exists, "the first line of ours")
    assert daemon.process
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        daemon.process.send_signal(number)

    assert daemon.process.wait(PATIENCE_SECONDS) == 0
    assert daemon.log() == []


@pytest.mark.parametrize("module", ["promptdrop.cli.parser", "argparse"])
def test_other_commands_end_as_programs_do(daemon: Daemon, module: str) -> None:
    """SIGINT is exit status 130, without a traceback; SIGTERM is a death by it."""
    ends = []
    for number in (signal.SIGINT, signal.SIGTERM):
        env = {**os.environ, "PYTHONPATH": EARLY, "SIGNAL_AT": f"{module}:{int(number)}"}
        done = subprocess.run(
            daemon.command("status"), env=env, capture_output=True, text=True, check=False
        )
        ends.append((done.returncode, done.stderr))

    assert ends == [(130, ""), (-signal.SIGTERM, "")]
