"""`engine.workers`: several engines under one supervision."""

import json
import os
import signal
from pathlib import Path

import pytest

from harness import Daemon, MakeDaemon, until

TWO = {"engine": {"workers": 2}}


def prompts(*texts: str) -> str:
    """A JSONL job, one image a text."""
    return "\n".join(json.dumps({"prompt": text}) for text in texts)


def names(daemon: Daemon, folder: str) -> list[str]:
    """The engine that rendered each image, by image number."""
    return [sidecar["device"]["engine"] for sidecar in daemon.sidecars(folder)]


def both_warm(daemon: Daemon) -> Daemon:
    """Start the daemon, and wait until both engines are warm."""
    daemon.start()
    daemon.until_log("engine.ready", times=2)
    return daemon


def test_engines_render_at_once_and_sign_their_images(make_daemon: MakeDaemon) -> None:
    """Two images are in hand at a time; each sidecar names its engine, status shows both."""
    daemon = both_warm(make_daemon(TWO))
    go = daemon.home / "go"
    daemon.drop("a.jsonl", prompts(f"!wait {go} a cat", f"!wait {go} a dog"))
    status = daemon.until_status(
        "two images in hand", lambda s: all(engine["current"] for engine in s["engines"])
    )
    go.touch()
    daemon.job("a")

    assert [engine["name"] for engine in status["engines"]] == ["engine-1", "engine-2"]
    assert {engine["current"]["image"] for engine in status["engines"]} == {1, 2}
    assert sorted(names(daemon, "a")) == ["engine-1", "engine-2"]
    assert daemon.stop() == 0


def test_a_slow_engine_is_given_less(make_daemon: MakeDaemon) -> None:
    """Images that it has not begun go to an idle engine, so that none waits behind a slow image."""
    daemon = both_warm(make_daemon({"engine": {"workers": 2, "image_timeout_seconds": 600}}))
    slow = json.dumps({"prompt": "!slow 1 a cat", "steps": 100})
    daemon.drop("a.jsonl", f"{slow}\n{prompts(*['a dog'] * 9)}")
    until(lambda: len(daemon.published()) == 9, "all but the slow one")
    begun = daemon.status()["current"]

    assert begun is None or begun["image"] == 1
    assert len(set(names(daemon, "a"))) == 1
    daemon.run("cancel", "a.jsonl")
    assert daemon.job("a")["outcome"] == "cancelled"
    assert daemon.stop() == 0


def test_an_engine_that_dies_costs_the_others_nothing(make_daemon: MakeDaemon) -> None:
    """The image in its hand is charged and rendered again; the other engine never stops."""
    one_step = {
        "defaults": {"steps": 1}
    }  # the next image's text is not encoded after the last step
    daemon = both_warm(make_daemon({**TWO, **one_step}))
    go = daemon.home / "go"
    daemon.drop("a.jsonl", prompts(*[f"!wait {go} a cat"] * 2, *["a cat"] * 4))
    status = daemon.until_status(
        "two images in hand", lambda s: all(engine["current"] for engine in s["engines"])
    )
    victim, survivor = status["engines"]
    os.killpg(victim["pid"], signal.SIGKILL)
    go.touch()
    job = daemon.job("a")
    attempts = [sidecar["job"]["attempt"] for sidecar in daemon.sidecars("a")]
    after = {engine["name"]: engine["pid"] for engine in daemon.status()["engines"]}

    assert job["outcome"] == "done"
    assert sorted(attempts) == [1, 1, 1, 1, 1, 2]
    assert attempts[victim["current"]["image"] - 1] == 2
    assert after["engine-2"] == survivor["pid"]
    assert len(daemon.published()) == 6
    assert daemon.stop() == 0


def test_a_poison_image_costs_its_attempts_whoever_renders_it(make_daemon: MakeDaemon) -> None:
    """max_attempts is a bound over all engines; everything else is rendered."""
    daemon = make_daemon({"engine": {"workers": 2, "max_attempts": 3}})
    daemon.drop("a.jsonl", prompts("!segfault", *["a cat"] * 5))
    daemon.drain()
    outcomes = [image["outcome"] for image in daemon.job("a")["images"]]

    assert outcomes == ["failed", *["rendered"] * 5]
    assert len(daemon.log("engine.died")) == 3


def test_one_engine_that_cannot_load_leaves_the_others_at_work(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """Status and log have its reason; the daemon goes on with the other."""
    daemon = make_daemon({**TWO, "model": {"revision": f"!once-load-raise {tmp_path}/flag"}})
    daemon.start()
    daemon.until_log("engine.not_started")
    daemon.drop("a.txt", "a cat\n")
    job = daemon.job("a")
    status = daemon.until_status("a reason", lambda s: any(e["reason"] for e in s["engines"]))

    assert job["outcome"] == "done"
    assert sorted(str(engine["reason"]) for engine in status["engines"]) == [
        "None",
        "scripted by !load-raise",
    ]
    assert daemon.stop() == 0


def test_engines_none_of_which_can_load_end_the_daemon(make_daemon: MakeDaemon) -> None:
    """The exit status is 1 with the reason, since no engine can be expected; jobs stay."""
    daemon = make_daemon({**TWO, "model": {"revision": "!load-raise"}})
    daemon.drop("a.txt", "a cat\n")
    done = daemon.drain()

    assert done.returncode == 1
    assert "scripted by !load-raise" in done.stderr
    assert daemon.tree() == ["inbox/a.txt"] or daemon.unfinished()


def test_jobs_that_must_fit_are_measured_by_whoever_is_warm(make_daemon: MakeDaemon) -> None:
    """`overflow: refuse` needs one engine, not all."""
    daemon = both_warm(make_daemon({**TWO, "prompt": {"max_tokens": 16, "overflow": "refuse"}}))
    daemon.drop("a.txt", "x " * 40 + "\n")
    daemon.drop("b.txt", "a cat\n")

    assert "more than prompt.max_tokens: 16" in daemon.error("a.txt")["error"]
    assert daemon.job("b")["outcome"] == "done"
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("workers", "model", "said"),
    [
        (3, {"device": "auto"}, "engine.workers: 3; expected at most 2, one a GPU of this machine"),
        (2, {"device": "cuda:1"}, "is one device; expected auto"),
        ("many", {"device": "auto"}, "engine.workers"),
    ],
)
def test_more_engines_than_gpus_are_refused(
    make_daemon: MakeDaemon, workers: object, model: dict[str, str], said: str
) -> None:
    """The exit status is 78, before anything is loaded."""
    daemon = make_daemon({"engine": {"workers": workers}, "model": model})
    daemon.start(env={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert daemon.process

    assert daemon.process.wait(60) == 78
    assert said in daemon.log_file.read_text()
