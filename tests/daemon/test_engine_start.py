"""An engine that cannot load or warm up ends the daemon, with the reason."""

from datetime import datetime

import pytest

from harness import MakeDaemon, alive


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("!load-raise", 1, "scripted by !load-raise"),
        ("!load-crash", 1, "exit status 3"),
        ("!load-hang", 1, "engine.load_timeout_seconds"),
    ],
)
def test_an_engine_that_cannot_load_ends_the_daemon(
    make_daemon: MakeDaemon, fault: str, status: int, said: str
) -> None:
    """The exit status and the reason come at once, and the jobs stay where they are."""
    limit = 1 if fault == "!load-hang" else 60
    daemon = make_daemon({"model": {"revision": fault}, "engine": {"load_timeout_seconds": limit}})
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    assert daemon.process

    assert daemon.process.wait(30) == status
    ending = daemon.log("daemon.ending")[-1]
    assert said in ending["reason"]
    assert ending["exit_status"] == status
    assert daemon.published() == []
    assert (daemon.inbox / "a.txt").exists() or len(daemon.unfinished()) == 1
    assert not alive(daemon.engine_pid())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("!warm-crash", "while loading weights: the engine died: exit status 3"),
        ("!warm-raise", "warm-up failed: scripted by !raise"),
        ("!warm-segfault", "SIGSEGV"),
        ("!warm-hang-gil", "engine.load_timeout_seconds"),
        ("!warm-garbage", "cannot be read"),
    ],
)
def test_an_engine_that_cannot_warm_up_ends_the_daemon(
    make_daemon: MakeDaemon, fault: str, said: str
) -> None:
    """The exit status is 1 with the reason, and the job stays."""
    limit = 1 if fault == "!warm-hang-gil" else 60
    daemon = make_daemon({"model": {"revision": fault}, "engine": {"load_timeout_seconds": limit}})
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    assert daemon.process

    assert daemon.process.wait(30) == 1
    assert said in daemon.log("daemon.ending")[-1]["reason"]
    assert (daemon.inbox / "a.txt").exists() or len(daemon.unfinished()) == 1
    assert not alive(daemon.engine_pid())


def test_a_daemon_whose_engine_cannot_load_does_not_wait_for_its_end(
    make_daemon: MakeDaemon,
) -> None:
    """It ends when it knows the reason, though the engine process would linger for ever."""
    daemon = make_daemon({"model": {"revision": "!load-linger"}})
    daemon.start()
    assert daemon.process
    assert daemon.process.wait(30) == 1
    loading, ending = daemon.log("engine.stage")[0], daemon.log("daemon.ending")[0]
    known_after = datetime.fromisoformat(ending["timestamp"]) - datetime.fromisoformat(
        loading["timestamp"]
    )
    stopped = daemon.log("daemon.stopped")[0]
    ended_after = datetime.fromisoformat(stopped["timestamp"]) - datetime.fromisoformat(
        ending["timestamp"]
    )

    assert "scripted by !load-linger" in ending["reason"]
    assert known_after.total_seconds() < 1
    assert ended_after.total_seconds() < 1
    assert not alive(daemon.engine_pid())
