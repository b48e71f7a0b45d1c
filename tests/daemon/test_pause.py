"""`pause` and `resume`: nothing begins while paused, across restarts and late disks."""

from harness import Daemon, MakeDaemon, jsonl, until


def test_pause_survives_a_restart(daemon: Daemon) -> None:
    """Until `resume`, files are claimed and no image is rendered."""
    paused = daemon.run("pause")
    daemon.drop("a.txt", "a cat\n")
    daemon.start().until_ready()
    daemon.until_log("job.claimed", times=1)
    daemon.until_status("paused", lambda s: s["state"] == "paused" and "resume" in s["reason"])
    assert daemon.stop() == 0
    daemon.start()
    daemon.until_log("engine.ready", times=2)
    status = daemon.until_status("paused", lambda s: s["state"] == "paused")
    shown = daemon.run("status")
    before = daemon.published()
    resumed = daemon.run("resume")

    assert (paused.returncode, resumed.returncode) == (0, 0)
    assert "promptdrop resume" in status["reason"]
    assert "paused" in shown.stdout
    assert before == []
    assert daemon.job("a")["outcome"] == "done"
    assert daemon.run("resume").stdout == "was not paused\n"
    assert daemon.stop() == 0


def test_pause_holds_back_the_prefetched_image_too(daemon: Daemon) -> None:
    """The image in hand is finished; no new one begins, though the engine has it already."""
    go = daemon.home / "go"
    daemon.drop("a.jsonl", jsonl(f"!wait {go}", "second", "third"))
    daemon.start()
    daemon.until_begun()
    daemon.run("pause")
    daemon.until_log("daemon.paused")
    go.touch()
    daemon.until_log("image.published", image=1)
    daemon.until_status("nothing in hand", lambda s: s["images_published"] and not s["current"])
    rendered = [image for _, image in daemon.published()]
    daemon.run("resume")

    assert rendered == [1]
    assert daemon.job("a")["outcome"] == "done"
    assert {s["job"]["attempt"] for s in daemon.sidecars("a")} == {1}
    assert daemon.stop() == 0


def test_pause_holds_from_the_first_moment_of_a_start(make_daemon: MakeDaemon) -> None:
    """Jobs of the last life are not begun while paused, even if the disks come late."""
    daemon = make_daemon({"paths": {"outbox": "out"}})
    out = daemon.home / "out"
    out.mkdir()
    daemon.run("pause")
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    daemon.until_log("job.claimed", times=1)
    assert daemon.stop() == 0
    out.rename(daemon.home / "away")
    daemon.start()
    daemon.until_log("engine.ready", times=1)
    until(lambda: len(daemon.log("disk.trouble")) >= 1, "disk.trouble")
    daemon.until_status("the engine ready", lambda s: s["engine"]["state"] == "ready")
    (daemon.home / "away").rename(out)
    daemon.until_log("spool.recovered")
    daemon.until_status("paused", lambda s: s["state"] == "paused")
    current = daemon.status()["current"]
    stopped = daemon.stop()

    assert (current, daemon.published(), stopped) == (None, [], 0)
