"""Time that stands still: a service that was stopped or frozen charges nobody for it."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from harness import Daemon, MakeDaemon, until, works

STILL_SECONDS = 4.0  # longer than every limit below
LIMITS = {
    "image_timeout_seconds": 2.0,
    "kill_grace_seconds": 0.5,
    "stall_seconds": 1.5,
    "load_timeout_seconds": 3.0,
    "stop_seconds": 2.0,
}


def waits(daemon: Daemon) -> Path:
    """Start a daemon with an image in hand that is done once the file exists."""
    go = daemon.home / "go"
    daemon.start().until_ready()
    daemon.drop("a.txt", f"!wait {go}\n")
    daemon.until_begun()
    daemon.until_status("the image in hand", lambda status: status["current"])
    return go


def stand_still(*pids: int) -> None:
    """Stop processes, and continue them in this order after STILL_SECONDS."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(STILL_SECONDS)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def pid_of(daemon: Daemon) -> int:
    """The daemon's process."""
    assert daemon.process
    return daemon.process.pid


def nobody_is_charged(daemon: Daemon) -> None:
    """Assert that the job was done by the first engine, at its first attempt."""
    assert daemon.job("a")["outcome"] == "done"
    assert [sidecar["job"]["attempt"] for sidecar in daemon.sidecars("a")] == [1]
    assert daemon.log("image.failed") == []
    assert len(daemon.log("engine.starting")) == 1


@pytest.mark.parametrize("first", ["daemon", "engine"])
def test_a_service_that_was_stopped_charges_nobody(make_daemon: MakeDaemon, first: str) -> None:
    """SIGSTOP of daemon and engine for longer than all limits; whoever goes on first."""
    daemon = make_daemon({"engine": LIMITS})
    go = waits(daemon)
    pids = [pid_of(daemon), daemon.engine_pid()]
    stand_still(*(pids if first == "daemon" else reversed(pids)))
    daemon.until_log("daemon.stood_still")
    go.touch()

    nobody_is_charged(daemon)
    assert daemon.stop() == 0


def test_a_daemon_that_was_stopped_alone_charges_nobody(make_daemon: MakeDaemon) -> None:
    """What its engine has said meanwhile is heard before anything is overdue."""
    daemon = make_daemon({"engine": LIMITS})
    go = waits(daemon)
    os.kill(pid_of(daemon), signal.SIGSTOP)
    go.touch()
    stand_still(pid_of(daemon))

    nobody_is_charged(daemon)
    assert daemon.stop() == 0


def test_an_engine_that_was_stopped_alone_is_killed(make_daemon: MakeDaemon) -> None:
    """The daemon's time went on."""
    daemon = make_daemon({"engine": LIMITS})
    go = waits(daemon)
    os.kill(daemon.engine_pid(), signal.SIGSTOP)
    daemon.until_log("engine.killed")
    go.touch()

    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["job"]["attempt"] == 2
    assert daemon.stop() == 0


def test_an_image_that_hangs_has_its_time_and_no_more(make_daemon: MakeDaemon) -> None:
    """After the pause the rest of its time runs, in the engine, which ends the image itself."""
    daemon = make_daemon({"engine": {**LIMITS, "stall_seconds": None, "max_attempts": 1}})
    waits(daemon)
    stand_still(daemon.engine_pid(), pid_of(daemon))
    daemon.until_log("image.failed")

    assert "longer than 2 s" in daemon.job("a")["images"][0]["error"]
    assert len(daemon.log("engine.starting")) == 1
    assert daemon.stop() == 0


def test_an_engine_that_loads_has_its_time(make_daemon: MakeDaemon) -> None:
    """engine.load_timeout_seconds does not run meanwhile."""
    daemon = make_daemon({"engine": LIMITS, "model": {"revision": "!load-slow 1"}})
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    daemon.until_log("engine.stage")
    stand_still(daemon.engine_pid(), pid_of(daemon))

    nobody_is_charged(daemon)
    assert daemon.stop() == 0


def test_an_idle_service_goes_on(make_daemon: MakeDaemon) -> None:
    """The engine is as warm as before."""
    daemon = make_daemon({"engine": LIMITS})
    daemon.start().until_ready()
    stand_still(pid_of(daemon), daemon.engine_pid())
    works(daemon)

    assert len(daemon.log("engine.starting")) == 1
    assert daemon.stop() == 0


def test_a_stop_waits_for_the_image_in_hand_as_long_as_ever(make_daemon: MakeDaemon) -> None:
    """engine.stop_seconds does not run meanwhile."""
    daemon = make_daemon({"engine": {**LIMITS, "image_timeout_seconds": 60}})
    go = waits(daemon)
    os.kill(pid_of(daemon), signal.SIGTERM)
    daemon.until_log("daemon.stopping")
    stand_still(daemon.engine_pid(), pid_of(daemon))
    go.touch()

    nobody_is_charged(daemon)
    assert daemon.process
    assert daemon.process.wait() == 0


def test_a_writer_that_stood_still_with_us_is_waited_for(make_daemon: MakeDaemon) -> None:
    """A drop has stood still for as long as we looked, not for as long as we did not."""
    daemon = make_daemon({"watch": {"settle_seconds": 3.0}})
    daemon.start().until_ready()
    dropped = daemon.drop("a.txt", "a c")
    daemon.until_waiting("a.txt", "settling")
    stand_still(pid_of(daemon), daemon.engine_pid())
    daemon.until_log("daemon.stood_still")
    with dropped.open("a") as file:
        file.write("at\n")

    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["request"]["prompt"] == "a cat"
    assert daemon.stop() == 0


class Freezer:
    """A cgroup of processes that can be frozen, of whichever version is mounted."""

    def __init__(self, folder: Path, version: int) -> None:
        self._folder = folder
        self._switch, self._on, self._off = (
            ("freezer.state", "FROZEN", "THAWED") if version == 1 else ("cgroup.freeze", "1", "0")
        )

    def add(self, *pids: int) -> None:
        """Move processes into it."""
        for pid in pids:
            (self._folder / "cgroup.procs").write_text(str(pid))

    def freeze(self) -> None:
        """Freeze them, and wait until all are."""
        (self._folder / self._switch).write_text(self._on)
        where, said = ("cgroup.events", "frozen 1") if self._on == "1" else (self._switch, self._on)
        until(lambda: said in (self._folder / where).read_text(), "processes that are frozen")

    def thaw(self) -> None:
        """Let them go on."""
        (self._folder / self._switch).write_text(self._off)

    def close(self) -> None:
        """Thaw, and remove the cgroup once it is empty."""
        self.thaw()
        until(lambda: not (self._folder / "cgroup.procs").read_text(), "a cgroup that is empty")
        self._folder.rmdir()


@pytest.fixture
def freezer(make_daemon: MakeDaemon) -> Iterator[Freezer]:
    """A cgroup that can be frozen; it outlives no process in it."""
    root = Path("/sys/fs/cgroup")
    for version, parent in ((1, root / "freezer"), (2, root / "unified"), (2, root)):
        folder = parent / f"promptdrop-test-{os.getpid()}"
        with suppress(OSError):
            folder.mkdir()
            names = [path.name for path in folder.iterdir()]
            if "freezer.state" in names or "cgroup.freeze" in names:
                made = Freezer(folder, version)
                yield made
                made.close()
                return
            folder.rmdir()
    pytest.skip("no cgroup can be made here")


def test_a_service_that_was_frozen_charges_nobody(
    make_daemon: MakeDaemon, freezer: Freezer
) -> None:
    """As `systemctl freeze` does: no signal tells the processes of it."""
    daemon = make_daemon({"engine": LIMITS})
    go = waits(daemon)
    freezer.add(pid_of(daemon), daemon.engine_pid())
    freezer.freeze()
    time.sleep(STILL_SECONDS)
    freezer.thaw()
    daemon.until_log("daemon.stood_still")
    go.touch()

    nobody_is_charged(daemon)
    assert daemon.stop() == 0
