"""The demonstration model that ships, through the daemon."""

import json

import numpy as np
import pytest
from PIL import Image

from demo_model.judge import is_right, look
from demo_model.world import Scene, Thing
from harness import MakeDaemon
from promptdrop import weights
from promptdrop.nouns import SCHEDULERS


def test_the_prompt_decides_the_picture(make_daemon: MakeDaemon) -> None:
    """The published picture shows what its prompt asks for, in either language."""
    asked = {
        "a large red circle in the center on a white background": Scene(
            (Thing("red", "circle", "large"),), "white", position="center"
        ),
        "右下角有一个小的黄色三角形，蓝色背景": Scene(
            (Thing("yellow", "triangle", "small"),), "blue", position="bottom right"
        ),
        "a large red circle above a small blue square on a yellow background": Scene(
            (Thing("red", "circle", "large"), Thing("blue", "square", "small")),
            "yellow",
            relation="above",
        ),
    }
    daemon = make_daemon()
    daemon.settings = {**daemon.settings, "model": {"path": str(weights.DEMO)}}
    daemon.write_config()
    images = [{"prompt": text, "seed": 5, "size": "160x160"} for text in asked]
    daemon.drop("shapes.json", json.dumps({"images": images}))
    done = daemon.drain(timeout=120)

    assert done.returncode == 0, done.stderr
    for sidecar in daemon.sidecars("shapes"):
        with Image.open(daemon.outbox / "shapes" / sidecar["image"]["file"]) as picture:
            seen = look(np.asarray(picture))
        assert is_right(seen, asked[sidecar["prompt"]["text"]]), (sidecar["prompt"], seen)


def test_a_job_of_every_scheduler(make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sidecars have each scheduler's evaluations, and the pixels do not depend on the order."""
    monkeypatch.setenv(
        "OMP_NUM_THREADS", "1"
    )  # inherited by the daemon; much quicker on a busy machine
    daemon = make_daemon({"engine": {"max_attempts": 1}})
    daemon.settings = {**daemon.settings, "model": {"path": str(weights.DEMO)}}
    daemon.write_config()
    images = [{"scheduler": name, "steps": 3} for name in SCHEDULERS]
    common = {"prompt": "a blue star", "seed": 7, "size": "96x64"}
    late = {"scheduler": "heun", "steps": 100, "size": "256x256", "timeout_seconds": 0.2}
    daemon.drop("a.json", json.dumps({**common, "images": [*images, late]}))
    daemon.drop("b.json", json.dumps({**common, "images": images[::-1]}))
    done = daemon.drain(timeout=120)
    a, b = daemon.sidecars("a"), daemon.sidecars("b")

    assert done.returncode == 0, done.stderr
    assert "took longer than 0.2 s" in json.dumps(daemon.job("a"))
    assert [s["request"]["scheduler"] for s in a] == list(SCHEDULERS)
    assert [s["evaluations"] for s in a] == [3, 3, 3, 3, 5]
    assert [len(s["steps_ms"]) for s in a] == [3, 3, 3, 3, 5]
    for one, other in zip(a, reversed(b), strict=True):
        with (
            Image.open(daemon.outbox / "a" / one["image"]["file"]) as first,
            Image.open(daemon.outbox / "b" / other["image"]["file"]) as second,
        ):
            assert first.tobytes() == second.tobytes(), one["request"]["scheduler"]
