"""How a daemon stops: the image in hand, a second signal, one that is loading."""

import json
import signal

import pytest

from harness import PATIENCE_SECONDS, Daemon, MakeDaemon, alive, jsonl


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_the_image_in_hand(daemon: Daemon, number: int) -> None:
    """The rest is rendered by the next start, and nothing twice."""
    go = daemon.home / "go"
    daemon.drop("a.jsonl", jsonl(f"!wait {go}", "second", "third"))
    daemon.start()
    daemon.until_begun()
    assert daemon.process
    daemon.process.send_signal(number)
    daemon.until_log("daemon.stopping")
    go.touch()
    status = daemon.process.wait(PATIENCE_SECONDS)
    images_then = [s["job"]["image"] for s in daemon.sidecars("a")]
    daemon.drain()

    assert status == 0
    assert images_then == [1]
    assert daemon.job("a")["outcome"] == "done"
    assert sorted(image for _, image in daemon.published()) == [1, 2, 3]
    assert {s["job"]["attempt"] for s in daemon.sidecars("a")} == {1}
    assert daemon.unfinished() == []


def test_a_stop_abandons_an_image_that_takes_longer_than_stop_seconds(
    make_daemon: MakeDaemon,
) -> None:
    """The image is put back, uncharged, with its seed."""
    daemon = make_daemon({"engine": {"stop_seconds": 0.3}})
    go = daemon.home / "go"
    daemon.drop("a.txt", f"!wait {go}\n")
    daemon.start()
    daemon.until_begun()
    (home,) = (daemon.own / "active").iterdir()
    seed = json.loads((home / "request.json").read_bytes())["images"][0]["seed"]
    status = daemon.stop()
    before = daemon.published()
    go.touch()
    daemon.drain()
    (sidecar,) = daemon.sidecars("a")

    assert status == 0
    assert before == []
    assert (sidecar["job"]["attempt"], sidecar["request"]["seed"]) == (1, seed)


def test_a_second_signal_stops_at_once(make_daemon: MakeDaemon) -> None:
    """stop_seconds does not matter; the exit status is 0, and no engine is left."""
    daemon = make_daemon({"engine": {"stop_seconds": 600}})
    daemon.drop("a.txt", "!slow 100\n")
    daemon.start()
    daemon.until_begun()
    assert daemon.process
    daemon.process.send_signal(signal.SIGTERM)
    daemon.until_log("daemon.stopping")
    still_running = daemon.process.poll() is None

    assert still_running
    assert daemon.stop() == 0
    assert not alive(daemon.engine_pid())
    assert len(daemon.unfinished()) == 1


def test_a_stop_while_loading_is_immediate(make_daemon: MakeDaemon) -> None:
    """There is no image in hand to wait for."""
    daemon = make_daemon({"model": {"revision": "!load-slow 100"}, "engine": {"stop_seconds": 600}})
    daemon.drop("a.txt", "a cat\n")
    daemon.start()
    daemon.until_log("job.claimed", times=1)

    assert daemon.stop() == 0
    assert not alive(daemon.engine_pid())
    assert len(daemon.unfinished()) == 1
