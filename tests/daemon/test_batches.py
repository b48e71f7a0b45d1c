"""`engine.batch`: which images the daemon has rendered together, and who pays when that fails."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from harness import PATIENCE_SECONDS, Daemon, MakeDaemon, until

FOUR: dict[str, Any] = {"engine": {"batch": 4, "max_attempts": 2}}


def job(*prompts: str, **fields: Any) -> str:
    """A JSON job, one image a prompt."""
    return json.dumps({"prompts": prompts, **fields})


@contextmanager
def waiting(daemon: Daemon, jobs: int) -> Iterator[None]:
    """Keep the engine busy until the `jobs` that are dropped in this block have been claimed."""
    daemon.drop("hold.json", job("!slow 0.1 x", steps=100, timeout_seconds=600, priority=100))
    if daemon.process is None:
        daemon.start()
    daemon.until_begun()
    yield
    daemon.until_log("job.claimed", times=jobs + 1)
    until(lambda: len(list(daemon.own.glob("active/*"))) == jobs + 1, "all of them with the engine")
    daemon.run("cancel", "hold.json")


def batches(daemon: Daemon, folder: str) -> list[int]:
    """The size of the batch in which each image was rendered, by image number."""
    return [sidecar["batch"] for sidecar in daemon.sidecars(folder)]


def attempts(daemon: Daemon, folder: str) -> list[int]:
    """The attempt at which each image was rendered, by image number."""
    return [sidecar["job"]["attempt"] for sidecar in daemon.sidecars(folder)]


def test_the_images_of_a_job_are_rendered_together(make_daemon: MakeDaemon) -> None:
    """A batch has as many as engine.batch allows; its images are those that are rendered alone."""
    together, alone = make_daemon(FOUR, "together"), make_daemon(home="alone")
    for daemon in (together, alone):
        daemon.drop("a.json", job("a cat", "a dog", count=3, seed=7))
        daemon.drain()
    shas = [[s["image"]["sha256"] for s in d.sidecars("a")] for d in (together, alone)]

    assert batches(together, "a") == [4, 4, 4, 4, 2, 2]
    assert batches(alone, "a") == [1] * 6
    assert shas[0] == shas[1]


def test_a_lone_image_is_not_kept_waiting(make_daemon: MakeDaemon) -> None:
    """An image that is there is rendered at once; it does not wait for a batch to be full."""
    daemon = make_daemon(FOUR)
    daemon.start().until_ready()
    daemon.drop("a.txt", "a cat\n")

    assert daemon.job("a")["outcome"] == "done"
    assert batches(daemon, "a") == [1]
    assert daemon.stop() == 0


def test_jobs_share_batches_in_fair_order(make_daemon: MakeDaemon) -> None:
    """Images of one kind are taken together from several jobs; another kind keeps its turn."""
    daemon = make_daemon(FOUR)
    with waiting(daemon, 4):
        daemon.drop("a.json", job("a cat", "a dog"))
        daemon.drop("sub/b.json", job("a cow", size="128x64"))
        daemon.drop("sub/c.json", job("a hen", size="128x64"))
        daemon.drop("d.json", job("an owl"))
    folders = ("a", "d", "sub/b", "sub/c")
    for folder in folders:
        assert daemon.job(folder)["outcome"] == "done"

    assert [batches(daemon, folder) for folder in folders] == [[3, 3], [3], [2], [2]]
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    "field",
    [
        {"width": 128}, {"height": 128}, {"steps": 4}, {"guidance_scale": 1.5},
        {"scheduler": "heun"}, {"timeout_seconds": 50}, {"priority": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_rendered_together_is_alike(make_daemon: MakeDaemon, field: dict[str, Any]) -> None:
    """Size, steps, guidance, scheduler, timeout and priority are the same in a batch; other fields differ."""
    daemon = make_daemon(FOUR)
    with waiting(daemon, 3):
        daemon.drop("a.json", job("a cat", seed=1))
        daemon.drop("b.json", job("a dog", seed=2, format="jpeg"))
        daemon.drop("c.json", job("a hen", **field))
    jobs = [daemon.job(folder)["outcome"] for folder in ("a", "b", "c")]

    assert jobs == ["done"] * 3
    assert [batches(daemon, folder) for folder in ("a", "b", "c")] == [[2], [2], [1]]
    assert daemon.stop() == 0


@pytest.mark.parametrize("fault", ["!raise", "!constant"])
def test_an_image_that_fails_in_a_batch_is_charged_alone(
    make_daemon: MakeDaemon, fault: str
) -> None:
    """The other images are published at their first attempt."""
    daemon = make_daemon(FOUR)
    daemon.drop("a.json", job("a cat", fault, "a dog", "a hen"))
    daemon.drain()

    assert daemon.job("a")["outcome"] == "partial"
    assert [s["job"]["image"] for s in daemon.sidecars("a")] == [1, 3, 4]
    assert attempts(daemon, "a") == [1, 1, 1]
    assert [e["attempt"] for e in daemon.log("image.failed")] == [1, 2]
    assert daemon.log("image.alone") == []


@pytest.mark.parametrize(
    "fault", ["!crash", "!segfault", "!unknown", "!hang", "!hang-gil", "!stop"]
)
def test_whoever_ends_a_batch_is_found_alone(make_daemon: MakeDaemon, fault: str) -> None:
    """No image is charged for the batch; each is then rendered alone, and only the guilty one fails."""
    quick = {"image_timeout_seconds": 0.3, "kill_grace_seconds": 0.3, "stall_seconds": 3}
    daemon = make_daemon({"engine": {**FOUR["engine"], **quick}})
    daemon.drop("a.json", job("a cat", fault, "a dog", "a hen"))
    daemon.drain()
    failed = daemon.log("image.failed")

    assert daemon.job("a")["outcome"] == "partial"
    assert [s["job"]["image"] for s in daemon.sidecars("a")] == [1, 3, 4]
    assert (batches(daemon, "a"), attempts(daemon, "a")) == ([1, 1, 1], [1, 1, 1])
    assert sorted(e["image"] for e in daemon.log("image.alone")) == [1, 2, 3, 4]
    assert [(e["image"], e["attempt"]) for e in failed] == [(2, 1), (2, 2)]


def test_a_batch_that_fails_as_one(make_daemon: MakeDaemon) -> None:
    """An error of the whole batch is charged to none; alone, each is rendered at its first attempt."""
    daemon = make_daemon(FOUR)
    daemon.drop("a.json", job("a cat", "!together", "a dog"))
    daemon.drain()

    assert daemon.job("a")["outcome"] == "done"
    assert (batches(daemon, "a"), attempts(daemon, "a")) == ([1, 1, 1], [1, 1, 1])
    assert [e["error"] for e in daemon.log("image.alone")] == ["scripted by !together"] * 3
    assert len(daemon.log("engine.starting")) == 1


def test_the_time_of_a_batch_is_that_of_its_images(make_daemon: MakeDaemon) -> None:
    """A batch may take image_timeout_seconds times its images: four with 1 s each may take 1.5 s."""
    daemon = make_daemon({"engine": {**FOUR["engine"], "image_timeout_seconds": 1}})
    daemon.drop("a.json", job(*["!slow 0.5 a cat"] * 4))
    daemon.drain()

    assert batches(daemon, "a") == [4, 4, 4, 4]
    assert daemon.log("image.alone") == []


def test_a_cancelled_job_leaves_the_others_of_its_batch(make_daemon: MakeDaemon) -> None:
    """The others are rendered to the end; no image of the cancelled job is published."""
    daemon = make_daemon(FOUR)
    with waiting(daemon, 2):
        daemon.drop("a.json", job("!slow 0.2 a cat", steps=30))
        daemon.drop("b.json", job("a dog", steps=30))
    until(lambda: len(list(daemon.own.glob("active/*/0001.begun"))) == 2, "both begun")
    daemon.run("cancel", "b.json")

    assert daemon.job("a")["outcome"] == "done"
    assert daemon.job("b")["outcome"] == "cancelled"
    assert (batches(daemon, "a"), batches(daemon, "b")) == ([2], [])
    assert daemon.stop() == 0


def test_a_job_cancelled_before_its_batch_is_left_out(make_daemon: MakeDaemon) -> None:
    """The batch is rendered without its images."""
    daemon = make_daemon(FOUR)
    with waiting(daemon, 2):
        daemon.drop("a.json", job("a cat"))
        daemon.drop("b.json", job("a dog"))
        daemon.until_log("job.claimed", times=3)
        daemon.run("cancel", "b.json")
        daemon.until_log("job.cancelled", file="b.json")
        daemon.drop("c.json", job("a hen"))
        daemon.until_log("job.claimed", times=4)

    assert daemon.job("a")["outcome"] == daemon.job("c")["outcome"] == "done"
    assert (batches(daemon, "a"), batches(daemon, "c")) == ([2], [2])
    assert daemon.stop() == 0


@pytest.mark.parametrize("victim", ["engine", "daemon"])
def test_a_kill_in_a_batch_loses_nothing(make_daemon: MakeDaemon, victim: str) -> None:
    """Each image is published once, with the seed it had, at its first attempt, and alone."""
    daemon = make_daemon(FOUR)
    go = daemon.home / "go"
    daemon.drop("a.json", job(f"!wait {go}", "a dog", "a hen", "an owl", "a cow"))
    daemon.start()
    until(lambda: len(list(daemon.own.glob("active/*/*.begun"))) == 4, "four begun")
    seeds = [json.loads(p.read_bytes()) for p in daemon.own.glob("active/*/request.json")]
    if victim == "engine":
        os.kill(daemon.engine_pid(), signal.SIGKILL)
    else:
        daemon.kill()
        daemon.start()
    go.touch()
    made = daemon.job("a")

    assert made["outcome"] == "done"
    assert [image["seed"] for image in made["images"]] == [
        image["seed"] for image in seeds[0]["images"]
    ]
    assert sorted(image for _, image in daemon.published()) == [1, 2, 3, 4, 5]
    assert (batches(daemon, "a"), attempts(daemon, "a")) == ([1] * 5, [1] * 5)
    assert daemon.stop() == 0


def test_a_stop_in_a_batch_finishes_it(make_daemon: MakeDaemon) -> None:
    """After SIGTERM images that were begun are published; the next daemon renders the others."""
    daemon = make_daemon(FOUR)
    go = daemon.home / "go"
    daemon.drop("a.json", job(f"!wait {go}", *["a dog"] * 5))
    daemon.start()
    until(lambda: len(list(daemon.own.glob("active/*/*.begun"))) == 4, "four begun")
    assert daemon.process
    daemon.process.send_signal(signal.SIGTERM)
    daemon.until_log("daemon.stopping")
    go.touch()

    assert daemon.process.wait(PATIENCE_SECONDS) == 0
    assert sorted(image for _, image in daemon.published()) == [1, 2, 3, 4]
    daemon.drain()
    assert daemon.job("a")["outcome"] == "done"
    assert batches(daemon, "a") == [4, 4, 4, 4, 2, 2]


def test_two_engines_share_what_waits(make_daemon: MakeDaemon) -> None:
    """Each renders batches of its own; nothing is lost or done twice."""
    daemon = make_daemon({"engine": {"batch": 4, "workers": 2}})
    daemon.start()
    daemon.until_log("engine.ready", times=2)
    daemon.drop("a.json", job(*["!slow 0.05 a cat"] * 24))
    made = daemon.job("a")

    assert made["outcome"] == "done"
    assert sorted(image for _, image in daemon.published()) == list(range(1, 25))
    assert {s["device"]["engine"] for s in daemon.sidecars("a")} == {"engine-1", "engine-2"}
    assert max(batches(daemon, "a")) > 1
    assert daemon.stop() == 0
