"""An image that takes too long: the alarm, the kill, the placeholder."""

import time

from harness import MakeDaemon, jsonl

QUICK = {"image_timeout_seconds": 0.3, "kill_grace_seconds": 0.3, "max_attempts": 2}


def test_a_timeout_in_python_leaves_the_engine_alive(make_daemon: MakeDaemon) -> None:
    """SIGALRM at image_timeout_seconds ends the image, charges it, and keeps the engine."""
    daemon = make_daemon({"engine": QUICK})
    daemon.drop("a.jsonl", jsonl("!hang", "fine"))
    done = daemon.drain()
    job = daemon.job("a")

    assert done.returncode == 0
    assert job["outcome"] == "partial"
    assert [i["outcome"] for i in job["images"]] == ["failed", "rendered"]
    assert "0.3 s (timeout_seconds)" in job["images"][0]["error"]
    assert "attempt 2 of 2" in job["images"][0]["error"]
    assert [e["attempt"] for e in daemon.log("image.failed")] == [1, 2]
    assert len(daemon.log("engine.starting")) == 1


def test_timeout_seconds_of_a_job_overrules_the_configuration(make_daemon: MakeDaemon) -> None:
    """`timeout_seconds` in the job file is the image's own limit, up to `limits.timeout_seconds`."""
    daemon = make_daemon({
        "engine": {"max_attempts": 1, "image_timeout_seconds": 3}, "limits": {"timeout_seconds": 2},
    })  # fmt: skip
    daemon.drop("a.yaml", 'prompt: "!hang"\ntimeout_seconds: 0.2\n')
    daemon.drop("b.yaml", 'prompt: "!hang"\ntimeout_seconds: 86400\n')
    daemon.drain()

    assert "longer than 0.2 s" in daemon.job("a")["images"][0]["error"]
    assert "at most 2 (limits.timeout_seconds)" in daemon.error("b.yaml")["error"]


def test_a_hang_that_holds_the_gil_costs_the_engine_and_only_that_image(
    make_daemon: MakeDaemon,
) -> None:
    """It is killed kill_grace_seconds after the timeout and replaced; the prefetched image is not charged."""
    daemon = make_daemon({"engine": QUICK})
    daemon.drop("a.jsonl", jsonl("!hang-gil", "second", "third"))
    done = daemon.drain()
    job = daemon.job("a")

    assert done.returncode == 0
    assert job["outcome"] == "partial"
    assert [i["outcome"] for i in job["images"]] == ["failed", "rendered", "rendered"]
    assert "kill_grace_seconds" in job["images"][0]["error"]
    assert [(s["job"]["image"], s["job"]["attempt"]) for s in daemon.sidecars("a")] == [
        (2, 1),
        (3, 1),
    ]
    assert len(daemon.log("engine.killed")) == 2
    assert len(daemon.log("engine.starting")) == 3
    record = daemon.error("a.jsonl")
    assert (record["outcome"], record["missing"]) == ("partial", [1])
    assert (record["id"], record["folder"]) == (job["id"], "a")
    assert (daemon.failed / "a.jsonl").read_text() == jsonl("!hang-gil", "second", "third")


def test_a_stopped_engine_is_silent_for_stall_seconds_and_killed(make_daemon: MakeDaemon) -> None:
    """Silence for stall_seconds counts as death, long before the image's own timeout."""
    daemon = make_daemon({"engine": {"stall_seconds": 0.5, "max_attempts": 1}})
    daemon.drop("a.jsonl", jsonl("!stop", "fine"))
    began = time.monotonic()
    daemon.drain()

    assert time.monotonic() - began < 20  # not the 60 s of image_timeout_seconds
    assert "stall_seconds" in daemon.job("a")["images"][0]["error"]
    assert [s["job"]["image"] for s in daemon.sidecars("a")] == [2]


def test_on_timeout_placeholder_publishes_a_marked_picture(make_daemon: MakeDaemon) -> None:
    """After the last attempt a placeholder stands in the outbox; the image still counts as failed."""
    daemon = make_daemon({"engine": {**QUICK, "on_timeout": "placeholder"}})
    daemon.drop("a.jsonl", jsonl("!hang", "fine"))
    daemon.drop("b.txt", "!hang-gil\n")
    done = daemon.drain()
    a, b = daemon.job("a"), daemon.job("b")
    placeholder, rendered = daemon.sidecars("a")

    assert done.returncode == 0
    assert (a["outcome"], b["outcome"]) == ("partial", "failed")
    assert [i["outcome"] for i in a["images"]] == ["placeholder", "rendered"]
    assert (placeholder["outcome"], rendered["outcome"]) == ("placeholder", "rendered")
    assert placeholder["latency_ms"]["render"] is None
    assert (daemon.outbox / "a" / placeholder["image"]["file"]).stat().st_size > 0
    assert a["totals"]["failed"] == 1
    assert daemon.error("a.jsonl")["missing"] == [1]
    assert daemon.error("b.txt")["outcome"] == "failed"


def test_on_timeout_placeholder_is_for_timeouts_only(make_daemon: MakeDaemon) -> None:
    """An image that failed for another reason gets no picture."""
    daemon = make_daemon({"engine": {"max_attempts": 1, "on_timeout": "placeholder"}})
    daemon.drop("a.txt", "!raise\n")
    daemon.drain()

    assert daemon.job("a")["images"][0]["outcome"] == "failed"
    assert daemon.sidecars("a") == []
