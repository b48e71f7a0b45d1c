"""`run --drain`: the rows it prints, and what it cannot finish."""

from harness import Daemon, MakeDaemon


def test_drain_prints_a_row_for_each_image(make_daemon: MakeDaemon) -> None:
    """It also prints a line for each job that did not end well."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.drop("a.txt", "one\ntwo\n")
    daemon.drop("b.txt", "!raise\n")
    daemon.drop("c.yaml", "promt: x\n")
    done = daemon.drain()
    rows = done.stdout.splitlines()

    assert done.returncode == 0
    assert rows[0].split("\t") == ["image", "seed", "latency", "file"]
    assert [row.split("\t")[0] for row in rows[1:3]] == ["a.txt 1/2", "a.txt 2/2"]
    assert any(row.startswith("failed: b.txt: ") and "!raise" in row for row in rows)
    assert any(row.startswith("refused: c.yaml: ") and "promt" in row for row in rows)


def test_a_drain_while_paused_exits_1(daemon: Daemon) -> None:
    """It says why it cannot finish, and the job stays."""
    daemon.run("pause")
    daemon.drop("a.txt", "a cat\n")
    done = daemon.drain()

    assert done.returncode == 1
    assert "paused" in daemon.log("daemon.ending")[-1]["reason"]
    assert daemon.published() == []
    assert (daemon.inbox / "a.txt").exists() or len(daemon.unfinished()) == 1


def test_a_drain_without_enough_disk_exits_1(make_daemon: MakeDaemon) -> None:
    """It says which disk it waits for."""
    daemon = make_daemon({"limits": {"min_free_disk_mib": 10**9}})
    daemon.drop("a.txt", "a cat\n")
    done = daemon.drain()

    assert done.returncode == 1
    assert "min_free_disk_mib" in daemon.log("daemon.ending")[-1]["reason"]


def test_a_drain_without_its_outbox_exits_1(make_daemon: MakeDaemon) -> None:
    """It makes no configured folder, even if that was never there, and says which is missing."""
    daemon = make_daemon({"paths": {"outbox": "elsewhere"}})
    daemon.drop("a.txt", "a cat\n")
    done = daemon.drain(timeout=20)

    assert done.returncode == 1
    assert "elsewhere is missing" in daemon.log("daemon.ending")[-1]["reason"]
    assert not (daemon.home / "elsewhere").exists()
    assert (daemon.inbox / "a.txt").exists() or len(daemon.unfinished()) == 1


def test_a_drain_does_not_wait_for_a_mark_for_ever(daemon: Daemon) -> None:
    """If a file's mark is missing, it exits 1 and says so."""
    daemon.write_config({"watch": {"ready_suffix": ".done"}})
    daemon.drop("a.txt", "a cat\n")
    done = daemon.drain()

    assert done.returncode == 1
    assert "waiting for a.txt.done" in done.stderr
