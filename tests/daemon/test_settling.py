"""When a file is complete: writers that pause, never close, correct themselves or withdraw."""

from harness import Daemon, MakeDaemon


def test_a_file_corrected_in_time_is_rendered(make_daemon: MakeDaemon) -> None:
    """A file that would be refused waits give_up_seconds for its rest, and status says why."""
    daemon = make_daemon({"watch": {"give_up_seconds": 60}})
    daemon.start()
    path = daemon.drop("a.json", '{"prompt": "a c')
    why = daemon.until_waiting("a.json", "refused")
    shown = daemon.run("status").stdout
    with path.open("a") as file:
        file.write('at"}')

    assert "would be refused" in why
    assert "a.json" in shown
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["request"]["prompt"] == "a cat"
    assert not any(daemon.failed.iterdir())
    assert daemon.stop() == 0


def test_a_withdrawn_file_is_forgotten(make_daemon: MakeDaemon) -> None:
    """It may be withdrawn before it settles, or while it waits to be refused."""
    daemon = make_daemon({"watch": {"settle_seconds": 60, "give_up_seconds": 60}})
    daemon.start().until_ready()
    path = daemon.drop("a.txt", "a cat\n")
    daemon.until_waiting("a.txt", "settling")
    path.unlink()
    daemon.until_status("nothing waiting", lambda s: not s["waiting"])
    path = daemon.drop("b.txt", "")
    daemon.until_waiting("b.txt", "empty")
    path.unlink()
    daemon.until_status("nothing waiting", lambda s: not s["waiting"])

    assert daemon.stop() == 0
    assert daemon.tree() == []
    assert daemon.unfinished() == []


def test_a_slow_writer_is_not_half_taken(daemon: Daemon) -> None:
    """A file that is open for writing is not complete, however long it does not change."""
    daemon.start().until_ready()
    with (daemon.inbox / "a.txt").open("w", buffering=1) as file:
        file.write("one\n")
        daemon.until_waiting("a.txt", "open for writing")
        file.write("two\n")
        daemon.until_waiting("a.txt", "open for writing")
        file.write("three\n")

    assert len(daemon.job("a")["images"]) == 3
    assert daemon.stop() == 0


def test_a_writer_that_never_closes_is_waited_for_only_so_long(make_daemon: MakeDaemon) -> None:
    """After watch.writer_seconds the file is taken as it is."""
    daemon = make_daemon({"watch": {"writer_seconds": 0.5}})
    daemon.start()
    with (daemon.inbox / "a.txt").open("w", buffering=1) as file:
        file.write("one\n")

        assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0


def test_ready_suffix(make_daemon: MakeDaemon) -> None:
    """With watch.ready_suffix a file is taken only once its marker stands beside it."""
    daemon = make_daemon({"watch": {"ready_suffix": ".done"}})
    daemon.start()
    daemon.drop("a.txt", "a cat\n")
    why = daemon.until_waiting("a.txt", "a.txt.done")
    daemon.drop("a.txt.done", "")

    assert why == "waiting for a.txt.done"
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.stop() == 0
