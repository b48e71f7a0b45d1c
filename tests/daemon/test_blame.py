"""If two images are in one engine, the one at fault is charged in the end."""

import pytest

from harness import MakeDaemon, jsonl

QUICK = {"image_timeout_seconds": 0.3, "kill_grace_seconds": 0.3, "max_attempts": 2}


def test_a_charged_image_is_tried_again_after_the_others_of_its_job(
    make_daemon: MakeDaemon,
) -> None:
    """An image that kills engines is retried last; it costs max_attempts lives, then it alone fails."""
    daemon = make_daemon({"engine": {"max_attempts": 3}})
    daemon.drop("a.jsonl", jsonl("!segfault", "second", "third", "fourth"))
    daemon.drain()
    failed = [e["timestamp"][:23] for e in daemon.log("image.failed")]
    started = [s["time"]["started"][:23] for s in daemon.sidecars("a")]

    assert [e["image"] for e in daemon.log("image.failed")] == [1, 1, 1]
    assert len(started) == 3
    assert failed[0] < min(started) <= max(started) < failed[1]
    assert len(daemon.log("engine.starting")) == 4
    assert daemon.job("a")["outcome"] == "partial"


@pytest.mark.parametrize("fault", ["crash", "unknown", "hang", "hang-gil"])
def test_a_text_that_ends_the_engine_beside_another_image_charges_its_own(
    make_daemon: MakeDaemon, fault: str
) -> None:
    """The next image's text is encoded while one is in hand: when that ends or hangs the engine, nobody
    is charged, the one in hand is rendered alone, and the other, found out, beside nobody any more."""
    daemon = make_daemon({"engine": {**QUICK, "image_timeout_seconds": 1}})
    daemon.drop("a.jsonl", jsonl("first", f"!text-{fault}", "!slow 0.1 third"))
    daemon.drain()
    job = daemon.job("a")

    assert [e["image"] for e in daemon.log("image.alone")] == [1]
    assert [e["image"] for e in daemon.log("image.failed")] == [2, 2]
    assert [i["outcome"] for i in job["images"]] == ["rendered", "failed", "rendered"]
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [1, 1]
    assert len(daemon.log("engine.starting")) == (1 if fault == "hang" else 4)


def test_an_image_that_ends_the_engine_beside_anothers_text_is_charged_in_the_end(
    make_daemon: MakeDaemon,
) -> None:
    """Nobody knows which of the two was at fault. The image is not charged at first; it is rendered with
    nothing beside it, and then it is charged."""
    daemon = make_daemon({"engine": {"max_attempts": 2}})
    daemon.drop("a.jsonl", jsonl("!late-crash 0.2", "second", "third", "fourth", "fifth"))
    daemon.drain()

    assert [e["image"] for e in daemon.log("image.alone")] == [1]
    assert [e["attempt"] for e in daemon.log("image.failed")] == [1, 2]
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [1, 1, 1, 1]
    assert len(daemon.log("engine.starting")) == 4


def test_a_text_that_fails_beside_another_image_costs_nothing_there(
    make_daemon: MakeDaemon,
) -> None:
    """An error of a text is reported for its own image only."""
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.drop("a.jsonl", jsonl("first", "!text-raise", "third"))
    daemon.drain()

    assert daemon.log("image.alone") == []
    assert [e["image"] for e in daemon.log("image.failed")] == [2]
    assert [s["job"]["attempt"] for s in daemon.sidecars("a")] == [1, 1]
