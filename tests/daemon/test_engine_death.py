"""Engines that are killed or stopped from outside, and daemons that die: who is charged."""

import os
import signal
from pathlib import Path

import pytest

import disks
from harness import Daemon, MakeDaemon, alive, jsonl, until
from notified import Notified

QUICK = {"image_timeout_seconds": 0.3, "kill_grace_seconds": 0.3, "max_attempts": 2}
ONE_STEP = {"defaults": {"steps": 1}}  # the next image's text is not encoded after the last step


def test_an_engine_killed_between_images_is_replaced_and_nobody_is_charged(
    daemon: Daemon,
) -> None:
    """A death without an image in hand costs a restart and nothing else."""
    daemon.start().until_ready()
    first = daemon.engine_pid()
    os.kill(first, signal.SIGKILL)
    daemon.until_log("engine.ready", times=2)
    daemon.drop("a.txt", "a cat\n")

    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["job"]["attempt"] == 1
    assert daemon.engine_pid() != first
    assert daemon.log("engine.died")[0]["how"] == "killed by SIGKILL"
    assert daemon.stop() == 0


def test_an_engine_killed_with_an_image_in_hand_charges_that_image(
    make_daemon: MakeDaemon,
) -> None:
    """SIGKILL from outside while rendering is a failed attempt; the next one succeeds."""
    daemon = make_daemon(ONE_STEP)
    go = daemon.home / "go"
    daemon.drop("a.jsonl", jsonl(f"!wait {go}", "second"))
    daemon.start()
    daemon.until_begun()
    os.kill(daemon.engine_pid(), signal.SIGKILL)
    go.touch()

    assert daemon.job("a")["outcome"] == "done"
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [2, 1]
    assert daemon.stop() == 0


def test_an_engine_that_keeps_dying_idle_ends_the_daemon(daemon: Daemon) -> None:
    """Five deaths in a row without an image begun: something else kills it, and the daemon says so."""
    daemon.start()
    for life in range(1, 6):
        daemon.until_log("engine.ready", times=life)
        os.kill(daemon.engine_pid(), signal.SIGKILL)
    assert daemon.process

    assert daemon.process.wait(30) == 1
    assert "died 5 times in a row" in daemon.log("daemon.ending")[-1]["reason"]


@pytest.mark.parametrize("prompt", ["!slow 5", "!hang-gil", "!hang"])
def test_no_engine_outlives_a_killed_daemon(daemon: Daemon, prompt: str) -> None:
    """SIGKILL of the daemon alone ends the engine, whatever it is doing (PR_SET_PDEATHSIG)."""
    daemon.drop("a.txt", f"{prompt}\n")
    daemon.start()
    daemon.until_begun()
    engine = daemon.engine_pid()
    assert daemon.process
    daemon.process.kill()
    daemon.process.wait(10)

    until(lambda: not alive(engine), "the end of the engine", 10)


def test_no_engine_outlives_a_daemon_killed_while_it_loads(make_daemon: MakeDaemon) -> None:
    """SIGKILL of the daemon ends the engine also while the weights are being read."""
    daemon = make_daemon({"model": {"revision": "!load-hang"}})
    daemon.start()
    daemon.until_log("engine.stage", stage="loading weights")
    engine = daemon.engine_pid()
    assert daemon.process
    daemon.process.kill()
    daemon.process.wait(10)

    until(lambda: not alive(engine), "the end of the engine", 10)


def test_a_death_while_prompts_are_measured_measures_them_again(make_daemon: MakeDaemon) -> None:
    """A job whose prompts wait to be counted is not lost with the engine."""
    daemon = make_daemon({"prompt": {"overflow": "refuse"}, "engine": {"max_attempts": 1}})
    daemon.drop("a.txt", f"!wait {daemon.home}/never\n")
    daemon.start()
    daemon.until_begun()
    daemon.drop("b.txt", "a dog\n")
    daemon.until_log("job.claimed", times=2)
    os.kill(daemon.engine_pid(), signal.SIGKILL)

    assert daemon.job("a")["outcome"] == "failed"
    assert daemon.job("b")["outcome"] == "done"
    assert daemon.stop() == 0


def test_an_engine_stopped_while_idle_does_not_begin_and_charges_nobody(
    make_daemon: MakeDaemon,
) -> None:
    """It reads nothing, however much it is sent. It is killed after stall_seconds; no image is charged."""
    daemon = make_daemon(
        {"engine": {"stall_seconds": 1, "max_attempts": 1}, "prompt": {"overflow": "refuse"}}
    )
    daemon.start().until_ready()
    os.kill(daemon.engine_pid(), signal.SIGSTOP)
    long = [f"{n} " + "\U0001f98a" * 19000 for n in range(10)]  # 760 kB, more than a pipe holds
    daemon.drop("a.txt", "\n".join(long))
    killed = daemon.until_log("engine.killed")
    job = daemon.job("a")

    assert "stall_seconds" in killed["reason"]
    assert job["outcome"] == "done"
    assert {s["job"]["attempt"] for s in daemon.sidecars("a")} == {1}
    assert len(daemon.log("engine.starting")) == 2
    assert daemon.stop() == 0


def test_a_stopped_engine_with_a_prefetched_image_charges_only_the_one_in_hand(
    make_daemon: MakeDaemon,
) -> None:
    """After a SIGSTOP in the middle of an image, that image is charged and the prefetched one is not."""
    daemon = make_daemon({"engine": {"stall_seconds": 1.5}, **ONE_STEP})
    go = daemon.home / "go"
    daemon.drop("a.jsonl", jsonl(f"!wait {go}", "second"))
    daemon.start()
    daemon.until_begun()
    os.kill(daemon.engine_pid(), signal.SIGSTOP)
    go.touch()

    assert daemon.job("a")["outcome"] == "done"
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [2, 1]
    assert daemon.stop() == 0


@pytest.mark.parametrize("at_the_end", ["cured", "stopped"])
def test_an_engine_in_uninterruptible_sleep_is_reported_and_waited_for(
    make_daemon: MakeDaemon, tmp_path: Path, at_the_end: str
) -> None:
    """An engine that writes to a frozen file system outlives SIGKILL. Status, log and STATUS= say so, the
    watchdog is fed no more, a stop is bounded, and once the engine has ended the work goes on."""
    daemon = make_daemon({"engine": {**QUICK, "stop_seconds": 1}})
    with Notified(tmp_path / "notify") as systemd, disks.block(tmp_path / "block") as disk:
        daemon.start(env=systemd.environment)
        daemon.until_ready()
        disk.freeze()
        daemon.drop("a.jsonl", jsonl(f"!once-write {tmp_path}/flag {disk.path}/file", "second"))
        daemon.until_log("engine.unkillable")
        status = daemon.until_status("the reason", lambda s: "does not end" in (s["reason"] or ""))
        reported = systemd.first("does not end")
        engine = daemon.engine_pid()
        state = Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[0]
        with pytest.raises(AssertionError):
            until(lambda: "WATCHDOG=1" in systemd.heard[reported:], "food for the watchdog", 1)
        if at_the_end == "stopped":
            assert daemon.stop() == 0
            disk.thaw()
            until(lambda: not alive(engine), "its end")
        else:
            disk.thaw()
            job = daemon.job("a")
            until(lambda: "WATCHDOG=1" in systemd.heard[reported:], "food for the watchdog")
            assert daemon.stop() == 0

    assert (state, status["state"]) == ("D", "waiting")
    if at_the_end == "cured":
        assert job["outcome"] == "done"
    else:
        assert len(daemon.unfinished()) == 1


def test_an_image_that_daemons_die_of_goes_behind_and_then_fails(make_daemon: MakeDaemon) -> None:
    """Nobody is charged for a daemon's death, but 3 in a row with the same image in hand put it
    behind all other work, and 10 fail it with that reason."""
    daemon = make_daemon({"engine": {"warmup": []}, "queue": {"policy": "fifo"}})
    daemon.drop("a.txt", "!slow 60 x\n")
    for death in range(1, 11):
        daemon.start()
        if death == 4:
            assert daemon.job("b")["outcome"] == "done"
        counted = f'"deaths": {death}}}'
        until(lambda counted=counted: counted in _begun(daemon), counted)
        if death == 3:  # the next life knows this job before its engine is ready
            daemon.drop("b.txt", "a dog\n")
            until(lambda: len(list(daemon.own.glob("*/*/request.json"))) == 2, "b.txt is claimed")
        assert daemon.process
        daemon.process.kill()
        daemon.process.wait(10)
    daemon.drain()
    job = daemon.job("a")

    assert job["outcome"] == "failed"
    assert "daemon died 10 times" in job["images"][0]["error"]
    assert daemon.log("image.failed") == []


def _begun(daemon: Daemon) -> str:
    return "".join(path.read_text() for path in daemon.own.glob("active/*/0001.begun"))
