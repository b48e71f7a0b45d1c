"""`engine.unload_after_seconds`: an engine that nobody needs gives its device back."""

from typing import Any

import pytest

from harness import PATIENCE_SECONDS, Daemon, MakeDaemon, alive, until


def unloading(**engine: Any) -> dict[str, Any]:
    """A configuration that unloads engines after a moment without work."""
    return {"engine": {"unload_after_seconds": 0.3, **engine}}


def until_unloaded(daemon: Daemon, times: int = 1) -> None:
    """Wait until the engine processes have ended and the status says so."""
    daemon.until_log("engine.unloaded", times=times)
    daemon.until_status("an unloaded engine", lambda s: s["engine"]["stage"] == "unloaded, idle")


def test_an_idle_engine_is_unloaded_and_comes_back(make_daemon: MakeDaemon) -> None:
    """It comes back with each drop; unloading is no death and is charged to no image."""
    daemon = make_daemon(unloading())
    daemon.start()
    for life in range(1, 7):  # one more than the idle deaths that would end the daemon
        until_unloaded(daemon, life)
        assert not alive(daemon.log("engine.starting")[-1]["pid"])
        daemon.drop(f"a{life}.txt", "a cat\n")
        assert daemon.job(f"a{life}")["outcome"] == "done"

    assert [s["job"]["attempt"] for n in range(1, 7) for s in daemon.sidecars(f"a{n}")] == [1] * 6
    assert daemon.log("engine.died") == daemon.log("engine.killed") == []
    assert daemon.stop() == 0


def test_what_the_status_says_of_an_unloaded_engine(make_daemon: MakeDaemon) -> None:
    """The daemon is ready, its engine stopped; nothing waits for a reason."""
    daemon = make_daemon(unloading())
    daemon.start()
    until_unloaded(daemon)
    status = daemon.status()

    assert (status["state"], status["reason"]) == ("ready", None)
    assert (status["engine"]["state"], status["current"]) == ("stopped", None)
    assert "unloaded, idle" in daemon.run("status").stdout
    assert daemon.stop() == 0


def test_a_paused_daemon_gives_the_device_back(make_daemon: MakeDaemon) -> None:
    """It does so though images wait; `resume` loads the engine again, and they are rendered."""
    daemon = make_daemon(unloading())
    daemon.start().until_ready()
    daemon.run("pause")
    daemon.until_log("daemon.paused")
    daemon.drop("a.txt", "a cat\na dog\n")
    daemon.until_log("job.claimed")
    until_unloaded(daemon)

    assert daemon.published() == []
    daemon.run("resume")
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_resume_warms_the_engine_though_nothing_waits(make_daemon: MakeDaemon) -> None:
    """It is loaded because somebody is likely to drop something."""
    daemon = make_daemon(unloading())
    daemon.start().until_ready()
    daemon.run("pause")
    until_unloaded(daemon)
    begun = len(daemon.log("engine.ready"))
    daemon.until_log("daemon.paused")
    daemon.run("resume")

    daemon.until_log("engine.ready", times=begun + 1)
    assert daemon.stop() == 0


def test_an_engine_with_work_is_not_idle(make_daemon: MakeDaemon) -> None:
    """It is not unloaded while an image takes longer than that, nor between images."""
    daemon = make_daemon(unloading())
    daemon.drop("a.txt", "!slow 0.01 a hen\n!slow 0.4 a cat\n!slow 0.01 a dog\n")
    daemon.start()

    assert daemon.job("a")["outcome"] == "done"
    events = [entry["event"] for entry in daemon.log()]
    since_the_first = events[events.index("image.published") : events.index("job.done")]
    assert "engine.starting" not in since_the_first
    assert daemon.stop() == 0


@pytest.mark.parametrize("overflow", ["keep_head", "refuse"])
def test_a_drain_ends_with_the_engine_unloaded(make_daemon: MakeDaemon, overflow: str) -> None:
    """The engine may be unloaded while the daemon waits for a file to be closed."""
    daemon = make_daemon({**unloading(), "prompt": {"overflow": overflow}})
    with (daemon.inbox / "a.txt").open("w", buffering=1) as file:
        file.write("a cat\n")
        daemon.start("--drain")
        until_unloaded(daemon)
    assert daemon.process

    assert daemon.process.wait(PATIENCE_SECONDS) == 0
    assert daemon.job("a")["outcome"] == "done"


def test_several_engines_go_and_come_together(make_daemon: MakeDaemon) -> None:
    """All of them are unloaded and loaded, and they share the work again."""
    daemon = make_daemon(unloading(workers=2))
    daemon.start()
    until_unloaded(daemon, 2)
    daemon.drop("a.txt", "!slow 0.3 a cat\n" * 8)

    assert daemon.job("a")["outcome"] == "done"
    engines = {sidecar["device"]["engine"] for sidecar in daemon.sidecars("a")}
    assert engines <= {"engine-1", "engine-2"}
    until(lambda: len(daemon.log("engine.unloaded")) == 4, "both unloaded again")
    assert daemon.stop() == 0
