"""SIGHUP: the keys that apply, the jobs they apply to, and a file that is wrong."""

import signal

import pytest

from harness import Daemon


def test_sighup_applies_to_jobs_claimed_from_then_on(daemon: Daemon) -> None:
    """defaults, limits, watch apply; other changed keys are named; the engine stays warm."""
    daemon.start().until_ready()
    daemon.drop("a.txt", "a cat\n")
    daemon.job("a")
    daemon.write_config(
        {
            "defaults": {"width": 128, "steps": 2},
            "limits": {"images_per_job": 2, "timeout_seconds": 5},
            "watch": {"settle_seconds": 0.1},
            "model": {"revision": "other"},
            "metrics": {"window": 7},
            "inbox": {"recursive": False},
        }
    )
    assert daemon.process
    daemon.process.send_signal(signal.SIGHUP)
    reloaded = daemon.until_log("config.reloaded")
    daemon.drop("b.txt", "a dog\n")
    daemon.drop("c.txt", "one\ntwo\nthree\n")
    daemon.drop("d.txt", '--prompt "a" --timeout_seconds 6\n')
    daemon.job("b")
    refused, too_long = daemon.error("c.txt"), daemon.error("d.txt")
    (a,), (b,) = daemon.sidecars("a"), daemon.sidecars("b")

    assert sorted(reloaded["needs_restart"]) == [
        "inbox.recursive",
        "metrics.window",
        "model.revision",
    ]
    assert (a["request"]["width"], a["request"]["steps"]) == (64, 3)
    assert (b["request"]["width"], b["request"]["steps"]) == (128, 2)
    assert b["model"]["revision"] is None
    assert "images_per_job" in refused["error"]
    assert "at most 5 (limits.timeout_seconds)" in too_long["error"]
    assert len(daemon.log("engine.starting")) == 1
    assert daemon.stop() == 0


def test_sighup_does_not_change_a_claimed_job(daemon: Daemon) -> None:
    """A job is resolved once, when it is claimed."""
    daemon.run("pause")
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    daemon.until_log("job.claimed", times=1)
    daemon.write_config({"defaults": {"width": 128}, "output": {"format": "jpeg"}})
    assert daemon.process
    daemon.process.send_signal(signal.SIGHUP)
    daemon.until_log("config.reloaded")
    daemon.run("resume")
    daemon.job("a")
    (sidecar,) = daemon.sidecars("a")

    assert (sidecar["image"]["width"], sidecar["image"]["file"]) == (64, "a-0001.png")
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    "wrong", ["defaults: {width: 63}\n", "nonsense: [\n", "modle: {id: gradient}\n", ""]
)
def test_a_wrong_file_changes_nothing(daemon: Daemon, wrong: str) -> None:
    """After SIGHUP its error is logged, and the daemon goes on as before."""
    daemon.start().until_ready()
    daemon.config.write_text(wrong)
    assert daemon.process
    daemon.process.send_signal(signal.SIGHUP)
    refused = daemon.until_log("config.refused")
    daemon.drop("a.txt", "a cat\n")

    assert str(daemon.config) in refused["error"]
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.sidecars("a")[0]["image"]["width"] == 64
    assert daemon.stop() == 0
